"""How close what is bound by memory comes to its speed: the bytes that a pass has to move, per second, as a fraction of
what a copy of as many bytes reaches in the same rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from fastdcgan import backends
from fastdcgan.backends.base import Backend
from fastdcgan.benchmarks import harness
from fastdcgan.dcgan import Generator
from fastdcgan.dispatch import router
from fastdcgan.geometry import Geometry
from fastdcgan.images import normalize_images
from fastdcgan.optim import FusedAdam
from fastdcgan.spec import Call, Operand

# (channels, height, width) of the normalised layers of a 64x64 DCGAN with 64 features
LAYERS = ((64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4))
DRY_LAYERS = ((8, 4, 4),)
ROUNDS = 20


@dataclass(frozen=True)
class Bandwidth:
    """One pass of one backend. `fraction` of a copy's bytes per second: median and quartiles over rounds."""

    backend: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes_per_s: float
    fraction: float
    q1: float
    q3: float


def passes(backend: Backend, y: Tensor, da: Tensor) -> dict[str, tuple[Callable[[], object], int]]:
    """name -> (the pass, how often it reads or writes a tensor of `y`'s size)."""
    stats = backend.batch_stats(y, 1)
    coef = backend.coefficients(stats[0], stats[1], None, None, None, 1e-5)
    sums = backend.norm_act_reduce(da, y, coef, "relu", 0.0)
    grad_coef = backend.grad_coefficients(sums, coef, y.numel() // y.shape[1])
    return {
        "batch_stats": (lambda: backend.batch_stats(y, 1), 1),
        "norm_act": (lambda: backend.norm_act(Operand(y, None, coef, "relu")), 2),
        "norm_act_reduce": (lambda: backend.norm_act_reduce(da, y, coef, "relu", 0.0), 2),
        "norm_act_backward": (lambda: backend.norm_act(Operand(da, y, grad_coef, "relu")), 3),
        "grad_stats": (lambda: backend.grad_stats(da, y, coef, "relu", 0.0), 3),
    }


def measure(name: str, batch: int, device: torch.device, dtype: torch.dtype, dry: bool = False) -> list[Bandwidth]:
    """Every pass of the backend `name` over every layer, with caches that hold none of it (on a GPU).

    Passes and a copy of the same bytes take turns in each round.
    """
    backend = backends.get(name)
    timer = harness.timer_for(device, cold=True)
    found = []
    for layer in DRY_LAYERS if dry else LAYERS:
        y, da = (torch.randn(batch, *layer, device=device, dtype=dtype) for _ in range(2))
        y, da = (t.contiguous(memory_format=torch.channels_last) for t in (y, da))
        for what, (run, tensors) in passes(backend, y, da).items():
            moved = tensors * y.numel() * y.element_size()
            entry = Work(what, tuple(y.shape), dtype, run, moved)
            found.append(_against_a_copy(name, entry, timer, device, dry))
    return found


@dataclass(frozen=True)
class Work:
    """Something that moves `moved` bytes, at least."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    run: Callable[[], object]
    moved: int


def image_side(backend: Backend, batch: int, device: torch.device, dtype: torch.dtype, dry: bool = False) -> list[Work]:
    """The image-side contractions of a DCGAN: both tensors once, no weights counted. `shape` is the wide tensor's."""
    side, wide = (8, 16) if dry else (64, 64)
    geometry = Geometry((4, 4), (2, 2), (1, 1), (1, 1), 1)
    last = torch.channels_last
    x = torch.randn(batch, 3, side, side, device=device).to(dtype).contiguous(memory_format=last)
    y = torch.randn(batch, wide, side // 2, side // 2, device=device).to(dtype).contiguous(memory_format=last)
    weight = torch.randn(wide, 3, 4, 4, device=device).to(dtype).contiguous(memory_format=last)
    moved, image, features = (x.numel() + y.numel()) * x.element_size(), Operand(x), Operand(y)
    calls = [
        Call("conv", image, weight, geometry, (side // 2, side // 2)),
        Call("conv_transpose", features, weight, geometry, (side, side)),
        Call("weight_grad", image, features, geometry, geometry.kernel),
    ]
    return [Work(f"image {c.op}", tuple(y.shape), dtype, _first_choice(backend, c), moved) for c in calls]


def _first_choice(backend: Backend, call: Call) -> Callable[[], object]:
    """The call by the first algorithm of the backend that can run it."""
    algorithm = next(a for a in router.offered(backend.name, call.op) if a.why_not(call) is None)
    return lambda: algorithm.run(call, None)


def training(batch: int, device: torch.device, dry: bool = False) -> list[Work]:
    """Adam over the generator of a 64x64 DCGAN (28 bytes a parameter), and a batch of images to bfloat16."""
    side, width = (32, 4) if dry else (64, 64)
    parameters = list(Generator(side, 3, ngf=width).to(device).parameters())
    for p in parameters:
        p.grad = torch.full_like(p, 1e-3)
    optimizer, count = FusedAdam(parameters, lr=0.0), sum(p.numel() for p in parameters)
    pixels = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8, device=device)
    flip = torch.arange(batch, device=device) % 2 == 0
    return [
        Work("adam", (count,), torch.float32, optimizer.step, 28 * count),
        Work(
            "normalize_images",
            tuple(pixels.shape),
            torch.bfloat16,
            lambda: normalize_images(pixels, flip, torch.bfloat16),
            3 * pixels.numel(),
        ),
    ]


def measure_work(name: str, work: Sequence[Work], device: torch.device, dry: bool = False) -> list[Bandwidth]:
    """Each of `work`, done by the backend `name`, as in `measure`."""
    timer = harness.timer_for(device, cold=True)
    return [_against_a_copy(name, each, timer, device, dry) for each in work]


def _against_a_copy(name: str, work: Work, timer: harness.Timer, device: torch.device, dry: bool) -> Bandwidth:
    source = torch.randint(0, 256, (max(1, work.moved // 2),), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    pair = (work.run, lambda: target.copy_(source))
    for segment in pair:
        segment()
    rounds = [timer(pair, 1) for _ in range(3 if dry else ROUNDS)]
    times, copies = zip(*rounds, strict=True)
    ratio = harness.ratio(copies, times)
    rate = work.moved / harness.summarise(times).median
    kind = str(work.dtype).removeprefix("torch.")
    return Bandwidth(name, work.name, work.shape, kind, rate, ratio.median, ratio.q1, ratio.q3)


def markdown(entries: list[dict]) -> str:
    """A table of `Bandwidth` entries as they are in a results file."""
    lines = ["| backend | pass | shape | dtype | GB/s | of a copy |", "|---|---|---|---|---|---|"]
    for e in entries:
        shape = "x".join(map(str, e["shape"]))
        spread = f"{e['fraction']:.0%} ({e['q1']:.0%} to {e['q3']:.0%})"
        lines.append(
            f"| {e['backend']} | {e['name']} | {shape} | {e['dtype']} | {e['bytes_per_s'] / 1e9:.0f} | {spread} |"
        )
    return "\n".join(lines)


def as_entries(found: list[Bandwidth]) -> list[dict]:
    return [asdict(entry) for entry in found]
