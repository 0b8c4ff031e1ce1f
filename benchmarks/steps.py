"""The training step of a DCGAN, written once: every peer runs this very function.

The algorithm is that of Goodfellow et al., 2014, with the non-saturating generator loss, as Radford et al., 2015,
train: the discriminator on real and on generated images in two passes (so with BatchNorm statistics of their own), its
Adam, the generator through the updated discriminator, its Adam.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

LEARNING_RATE = 2e-4
BETAS = (0.5, 0.999)


def adam(net: nn.Module, device: torch.device) -> Adam:
    """DCGAN's Adam in PyTorch's fastest form; step count and learning rate are on the device, where a CUDA graph reads
    them."""
    rate = torch.tensor(LEARNING_RATE, device=device)
    return Adam(net.parameters(), lr=rate, betas=BETAS, fused=True, capturable=device.type == "cuda")


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate in place, where a CUDA graph sees it, of an optimiser made by `adam`."""
    for group in optimiser.param_groups:
        group["lr"].fill_(rate)


def gan_step(
    generator: nn.Module,
    discriminator: nn.Module,
    opt_g: torch.optim.Optimizer,
    opt_d: torch.optim.Optimizer,
    real: Tensor,
    noise: Tensor,
    autocast: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """One step. Reads nothing back to the host, so it can be captured in a CUDA graph.

    Args:
        generator: noise [N, nz, 1, 1] -> images [N, C, H, W].
        discriminator: images -> logits, N of them in any shape.
        opt_g, opt_d: their optimisers; gradients are set to None, not to zero.
        real: images [N, C, H, W] on the nets' device, in the memory format to train in.
        noise: [N, nz, 1, 1].
        autocast: the dtype to autocast to, or None for none.

    Returns:
        (discriminator's loss, generator's loss): float32 scalars on the device, detached.
    """
    # One autocast region a phase: its cache of cast weights must not outlive the optimiser's step.
    enabled = autocast is not None

    opt_d.zero_grad(set_to_none=True)
    with torch.autocast(real.device.type, dtype=autocast, enabled=enabled):
        fake = generator(noise)
        on_real = discriminator(real)
        on_fake = discriminator(fake.detach())
    loss_d = bce(on_real, 1.0) + bce(on_fake, 0.0)
    loss_d.backward()
    opt_d.step()

    # The generator's step needs no weight gradients of the discriminator.
    discriminator.requires_grad_(False)
    opt_g.zero_grad(set_to_none=True)
    with torch.autocast(real.device.type, dtype=autocast, enabled=enabled):
        on_fake = discriminator(fake)
    loss_g = bce(on_fake, 1.0)
    loss_g.backward()
    opt_g.step()
    discriminator.requires_grad_(True)
    return loss_d.detach(), loss_g.detach()


def bce(logits: Tensor, target: float) -> Tensor:
    """Binary cross-entropy of logits against one label, in float32 (float64 of float64)."""
    logits = logits.double() if logits.dtype == torch.float64 else logits.float()
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))
