"""One training step of a GAN, on any two modules: discriminator on real and on generated images, then the generator.

Goodfellow et al., "Generative Adversarial Nets" (2014), algorithm 1 with the non-saturating generator loss; one-sided
label smoothing from Salimans et al., "Improved Techniques for Training GANs" (2016), section 3.4.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fastdcgan.losses import bce_with_logits

PENALTIES = ("wgan-gp", "r1")


class StepMetrics(NamedTuple):
    """What a step saw; detached scalars on the device, so that reading them is the only synchronisation."""

    loss_d: Tensor  # discriminator: real + generated (+ penalty)
    loss_g: Tensor
    d_real: Tensor  # D(x): mean probability that D gives to real images
    d_fake: Tensor  # D(G(z)) before D's update
    d_fake_after: Tensor  # D(G(z)) after it
    penalty: Tensor  # the weighted gradient penalty, 0 without one


@dataclass(frozen=True)
class GradientPenalty:
    """A penalty on the gradient of D's logit with respect to its input, added to D's loss.

    "wgan-gp": weight * mean((|grad| - 1)^2) on random mixtures of real and generated images
               (Gulrajani et al., 2017, "Improved Training of Wasserstein GANs", equation 3)
    "r1":      weight / 2 * mean(|grad|^2) on real images (Mescheder et al., 2018, "Which Training Methods for GANs do
               actually Converge?", section 4.1)
    """

    weight: float
    kind: str = "wgan-gp"

    def __post_init__(self) -> None:
        if self.kind not in PENALTIES:
            raise ValueError(f"gradient penalty is {self.kind!r}: expected one of {', '.join(PENALTIES)}")

    def __call__(self, discriminator: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
        """The penalty for images `real` and `fake` [N, C, H, W], a scalar that can be differentiated again."""
        if self.kind == "r1":
            x = real.detach().clone()
        else:
            mix = torch.rand(real.shape[0], 1, 1, 1, device=real.device, dtype=real.dtype)
            x = torch.lerp(fake.to(real.dtype), real, mix)
        x.requires_grad_(True)
        outputs = _wide(discriminator(x)).sum()
        (grad,) = torch.autograd.grad(outputs, x, create_graph=True)
        with torch.autocast(x.device.type, enabled=False):
            square = _wide(grad).square().sum(dim=(1, 2, 3))
            if self.kind == "r1":
                return self.weight / 2 * square.mean()
            # The gradient of sqrt is infinite at 0.
            return self.weight * ((square + 1e-12).sqrt() - 1).square().mean()


def train_step(
    generator: nn.Module,
    discriminator: nn.Module,
    optimizer_g: Optimizer,
    optimizer_d: Optimizer,
    real: Tensor,
    z: Tensor,
    *,
    real_label: float = 0.9,
    penalty: GradientPenalty | None = None,
    dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> StepMetrics:
    """Update D on `real` [N, C, H, W] and on `G(z)`, then G through the new D, once each.

    `discriminator` gives one logit per image. One whose `forward` takes `stat_groups` sees real and generated images as
    one batch with BatchNorm statistics per half, which is the same as two passes and faster; any other gets two passes.
    The images are generated once: D sees them detached, and G's gradient flows through the same graph. In G's part D's
    parameters ask for no gradient, so none is computed for them.

    `dtype` float16 or bfloat16 runs both networks under autocast, losses in float32; `scaler` is for float16.
    Modules may be wrapped in DistributedDataParallel. Nothing here waits for the device.
    """
    bare = unwrapped(discriminator)
    autocast = torch.autocast(real.device.type, dtype=dtype, enabled=dtype is not None)

    with autocast:
        fake = generator(z)
        losses, (d_real, d_fake) = _real_and_fake(discriminator, real, fake.detach(), real_label)
        loss_d = losses.sum()
        extra = loss_d.new_zeros(())
        if penalty is not None:
            # Gradients of single pixels are out of float16's range: its penalty is computed in float32.
            with torch.autocast(real.device.type, dtype=dtype, enabled=dtype == torch.bfloat16):
                extra = penalty(bare, real, fake.detach())
            loss_d = loss_d + extra
    optimizer_d.zero_grad(set_to_none=True)
    _backward_and_step(loss_d, optimizer_d, scaler)

    with autocast, frozen(bare):
        loss_g, d_fake_after = bce_with_logits(bare(fake), 1.0)
    optimizer_g.zero_grad(set_to_none=True)
    _backward_and_step(loss_g, optimizer_g, scaler)
    if scaler is not None:
        scaler.update()

    return StepMetrics(
        loss_d=loss_d.detach(),
        loss_g=loss_g.detach(),
        d_real=d_real,
        d_fake=d_fake,
        d_fake_after=d_fake_after,
        penalty=extra.detach(),
    )


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, or the module itself."""
    return module.module if isinstance(module, DistributedDataParallel) else module


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of `module` asks for a gradient inside a `with`; afterwards each is as it was."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def _real_and_fake(discriminator: nn.Module, real: Tensor, fake: Tensor, real_label: float) -> tuple[Tensor, Tensor]:
    """D's losses [2] of real and of generated images, and the probabilities [2] that it gives them."""
    if "stat_groups" in inspect.signature(unwrapped(discriminator).forward).parameters:
        both = torch.cat([real.to(fake.dtype), fake])
        return bce_with_logits(discriminator(both, stat_groups=2), (real_label, 0.0))
    pairs = (bce_with_logits(discriminator(real), real_label), bce_with_logits(discriminator(fake), 0.0))
    losses, probabilities = zip(*pairs, strict=True)
    return torch.stack(losses), torch.stack(probabilities)


def _backward_and_step(loss: Tensor, optimizer: Optimizer, scaler: torch.amp.GradScaler | None) -> None:
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
