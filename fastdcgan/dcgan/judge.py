"""A small classifier, trained on labelled images: a space of features to measure distances in, with no download."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdcgan.dcgan import tensor_files
from fastdcgan.dcgan.console import Bar, say
from fastdcgan.dcgan.models import placed
from fastdcgan.images import normalize_images
from fastdcgan.layers import ConvBNLeakyReLU2d, FusedSequential

_FORMAT, _VERSION = "fastdcgan-classifier", "1"
FEATURES = 64


class Classifier(nn.Module):
    """Images [N, C, H, W] -> logits [N, classes]; `features` gives the layer before, [N, 64]."""

    def __init__(self, channels: int, classes: int, width: int = 16) -> None:
        super().__init__()
        self.channels, self.classes = channels, classes
        self.blocks = FusedSequential(
            OrderedDict(
                a=ConvBNLeakyReLU2d(channels, width, 4, 2, 1, bias=False),
                b=ConvBNLeakyReLU2d(width, 2 * width, 4, 2, 1, bias=False),
                c=ConvBNLeakyReLU2d(2 * width, FEATURES, 4, 2, 1, bias=False),
            )
        )
        self.head = nn.Linear(FEATURES, classes)

    def features(self, x: Tensor) -> Tensor:
        """Means over the last map, [N, 64]."""
        return self.blocks(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def train_classifier(
    pixels: np.ndarray,
    labels: np.ndarray,
    classes: int,
    *,
    steps: int = 600,
    batch: int = 64,
    lr: float = 2e-3,
    shift: int = 2,
    seed: int = 0,
    device: torch.device | str = "cpu",
    title: str = "classifier",
) -> Classifier:
    """A classifier of uint8 images [N, H, W, C], by AdamW with a cosine schedule; images are moved by up to `shift`
    pixels at random. The same arguments give the same bits on a CPU. Returned in `eval`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = placed(Classifier(pixels.shape[3], classes), device).train()
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    images, targets = torch.from_numpy(np.array(pixels)), torch.from_numpy(labels)
    with Bar(title, steps) as bar:
        for step in range(1, steps + 1):
            rows = torch.randint(len(images), (batch,), generator=random)
            x = _shifted(normalize_images(images[rows]), shift, random).to(device)
            loss = F.cross_entropy(net(x), targets[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update(step)
    return net.eval()


def _shifted(x: Tensor, most: int, random: torch.Generator) -> Tensor:
    """Each image moved by -most to `most` pixels both ways; what moves in is the border repeated."""
    if not most:
        return x
    n, _, height, width = x.shape
    padded = F.pad(x, [most] * 4, mode="replicate")
    top, left = torch.randint(2 * most + 1, (2, n), generator=random)
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, None, :]
    return padded[torch.arange(n)[:, None, None, None], torch.arange(x.shape[1])[None, :, None, None], rows, columns]


@torch.inference_mode()
def accuracy(net: Classifier, pixels: np.ndarray, labels: np.ndarray, device: torch.device | str = "cpu") -> float:
    right = 0
    for start in range(0, len(pixels), 256):
        x = normalize_images(torch.from_numpy(np.array(pixels[start : start + 256])).to(device))
        right += int((net(x).argmax(1).cpu().numpy() == labels[start : start + 256]).sum())
    return right / len(pixels)


def cached_classifier(
    path: Path, pixels: np.ndarray, labels: np.ndarray, classes: int, *, device: torch.device | str = "cpu"
) -> Classifier:
    """The classifier in the file `path` if it was trained on these very images, else a new one, which is put there."""
    digest = hashlib.sha256(json.dumps([pixels.shape, classes]).encode())
    for array in (pixels, labels):
        digest.update(np.ascontiguousarray(array).data)
    identity = {"format": _FORMAT, "version": _VERSION, "data": digest.hexdigest()}
    if path.is_file():
        try:
            tensors, metadata = tensor_files.read(path)
            if metadata.pop(tensor_files.CHECKSUM, None) is None:
                raise ValueError("it has no checksum")
            if metadata == identity:
                net = Classifier(pixels.shape[3], classes)
                tensor_files.check(tensors, net.state_dict())
                net.load_state_dict(tensors)
                return placed(net, device).eval()
            say(f"Training the classifier again: {path} was trained on other images")
        except (tensor_files.Damaged, OSError, ValueError) as error:
            say(f"Training the classifier again: {path} can't be read: {error}")
    net = train_classifier(pixels, labels, classes, device=device)
    tensor_files.write(path, net.state_dict(), identity)
    return net
