"""One training step of a GAN, on any two modules: discriminator on real and on generated images, then the generator.

Goodfellow et al., "Generative Adversarial Nets" (2014), algorithm 1 with the non-saturating generator loss; one-sided
label smoothing from Salimans et al., "Improved Techniques for Training GANs" (2016), section 3.4.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fastdcgan.checks import AMOUNT
from fastdcgan.losses import bce_with_logits

PENALTIES = ("wgan-gp", "r1")
PROBABILITIES = (
    "the discriminator ends in a sigmoid, and the loss takes the sigmoid of what it gives once more: take it out, so "
    "that the discriminator ends in its logit, or give a loss of probabilities"
)
_SAME_VALUES = ("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Select", "ToCopy")  # nodes of autograd


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

    - "wgan-gp": weight * mean((|grad| - 1)^2) on random mixtures of real and generated images
      (Gulrajani et al., 2017, "Improved Training of Wasserstein GANs", equation 3)
    - "r1": weight / 2 * mean(|grad|^2) on real images (Mescheder et al., 2018, "Which Training Methods for GANs do
      actually Converge?", section 4.1)
    """

    weight: float
    kind: str = "wgan-gp"

    def __post_init__(self) -> None:
        if self.kind not in PENALTIES:
            raise ValueError(f"gradient penalty is {self.kind!r}: expected one of {', '.join(PENALTIES)}")
        AMOUNT.check("the gradient penalty's weight", self.weight)

    def __call__(self, discriminator: nn.Module, real: Tensor, fake: Tensor, *labels: Tensor) -> Tensor:
        """The penalty for images `real` and `fake` [N, C, H, W], a scalar that can be differentiated again; `labels`
        are what D takes besides."""
        if self.kind == "r1":
            x = real.detach().clone()
        else:
            mix = torch.rand(real.shape[0], 1, 1, 1, device=real.device, dtype=real.dtype)
            x = torch.lerp(fake.to(real.dtype), real, mix)
        x.requires_grad_(True)
        outputs = _wide(discriminator(x, *labels)).sum()
        (grad,) = torch.autograd.grad(outputs, x, create_graph=True)
        with torch.autocast(x.device.type, enabled=False):
            square = _wide(grad).square().sum(dim=(1, 2, 3))
            if self.kind == "r1":
                return self.weight / 2 * square.mean()
            # The gradient of sqrt is infinite at 0.
            return self.weight * ((square + 1e-12).sqrt() - 1).square().mean()


class GANLoss(NamedTuple):
    """A pair of losses on logits [N]: `discriminator(real, generated)` and `generator(generated)`, scalars."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


# Lim and Ye, "Geometric GAN" (2017), and Miyato et al., "Spectral Normalization for GANs" (2018), equations 16 and 17.
HINGE = GANLoss(lambda real, fake: (1 - real).relu().mean() + (1 + fake).relu().mean(), lambda fake: -fake.mean())
# Arjovsky et al., "Wasserstein GAN" (2017), equation 2; its critic is to be kept Lipschitz, say by a penalty.
WASSERSTEIN = GANLoss(lambda real, fake: fake.mean() - real.mean(), lambda fake: -fake.mean())
# Mao et al., "Least Squares Generative Adversarial Networks" (2017), equation 9.
LEAST_SQUARES = GANLoss(
    lambda real, fake: ((real - 1).square().mean() + fake.square().mean()) / 2,
    lambda fake: (fake - 1).square().mean() / 2,
)


def train_step(
    generator: nn.Module,
    discriminator: nn.Module,
    optimizer_g: Optimizer,
    optimizer_d: Optimizer,
    real: Tensor,
    z: Tensor,
    *,
    labels: Tensor | None = None,
    loss: GANLoss | None = None,
    real_label: float = 0.9,
    penalty: GradientPenalty | None = None,
    dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    accumulate: int = 1,
) -> StepMetrics:
    """Update D on `real` [N, C, H, W] and on `G(z)`, then G through the new D, once each.

    `discriminator` gives one logit per image. One whose `forward` takes `stat_groups` sees real and generated images as
    one batch with BatchNorm statistics per half, which is the same as two passes and faster; any other gets two passes.
    The images are generated once: D sees them detached, and G's gradient flows through the same graph. In G's part D's
    parameters ask for no gradient, so none is computed for them.

    `labels` [N, ...], the classes of the real images say, make both networks conditional: G is called as `G(z, labels)`
    and D as `D(images, labels)`, with the same labels for the real images and for those generated.
    `loss` None is binary cross-entropy with `real_label` for real images. `dtype` float16 or bfloat16 runs both
    networks under autocast, losses in float32; `scaler` is for float16. `accumulate` k takes the batch in k equal
    parts, one after the other, and averages their gradients and metrics; BatchNorm's statistics are of a part. Modules
    may be wrapped in DistributedDataParallel. Nothing here waits for the device.

    Raises TypeError for images that are no floating-point tensor; ValueError for a batch without images, for `z` or
    `labels` of another number than the images, if `accumulate` doesn't divide the batch, and for images of another
    shape than those generated; no weight is changed then. Warns of a discriminator that ends in a sigmoid where the
    loss has its own.
    """
    check_batch(real, z, labels)
    if accumulate < 1 or real.shape[0] % accumulate:
        raise ValueError(f"accumulate={accumulate} must divide the batch, got {real.shape[0]} images")
    bare = unwrapped(discriminator)
    autocast = torch.autocast(real.device.type, dtype=dtype, enabled=dtype is not None)
    seen: list[tuple[Tensor, ...]] = []
    fakes: list[Tensor] = []

    optimizer_d.zero_grad(set_to_none=True)
    givens: list[tuple[Tensor, ...]] = [()] * accumulate
    if labels is not None:
        givens = [(part,) for part in labels.chunk(accumulate)]
    for x, noise, given in zip(real.chunk(accumulate), z.chunk(accumulate), givens, strict=True):
        with autocast:
            fake = generator(noise, *given)
            if fake.shape != x.shape:
                made, got = list(fake.shape[1:]), list(x.shape[1:])
                raise ValueError(f"the generator makes images {made}: expected real ones of that shape, got {got}")
            loss_d, d_real, d_fake = _discriminator_loss(discriminator, x, fake.detach(), given, loss, real_label)
            extra = loss_d.new_zeros(())
            if penalty is not None:
                # Gradients of single pixels are out of float16's range: its penalty is computed in float32.
                with torch.autocast(real.device.type, dtype=dtype, enabled=dtype == torch.bfloat16):
                    extra = penalty(bare, x, fake.detach(), *given)
                loss_d = loss_d + extra
        _backward(loss_d, accumulate, scaler)
        fakes.append(fake)
        seen.append((loss_d.detach(), d_real, d_fake, extra.detach()))
    _step(optimizer_d, scaler)

    optimizer_g.zero_grad(set_to_none=True)
    for i, fake in enumerate(fakes):
        with autocast, frozen(bare):
            loss_g, d_fake_after = _generator_loss(bare(fake, *givens[i]), loss)
        _backward(loss_g, accumulate, scaler)
        seen[i] += (loss_g.detach(), d_fake_after)
    _step(optimizer_g, scaler)
    if scaler is not None:
        scaler.update()

    loss_d, d_real, d_fake, extra, loss_g, d_fake_after = (
        values[0] if accumulate == 1 else torch.stack(values).mean() for values in zip(*seen, strict=True)
    )
    return StepMetrics(loss_d, loss_g, d_real, d_fake, d_fake_after, extra)


def check_batch(real: object, z: object, labels: object = None) -> None:
    """Raise TypeError or ValueError unless they are tensors of as many images as z and labels, at least one."""
    if not isinstance(real, Tensor) or not real.is_floating_point():
        raise TypeError(f"expected real images as a floating-point tensor, got {getattr(real, 'dtype', type(real))}")
    if not isinstance(z, Tensor):
        raise TypeError(f"expected z as a tensor, got {type(z)}")
    images, many = (t.shape[0] if t.dim() else 0 for t in (real, z))
    if images == 0 or images != many:
        raise ValueError(f"expected as many z as images, at least one, got {many} z and {images} images")
    if labels is not None and (not isinstance(labels, Tensor) or labels.shape[:1] != real.shape[:1]):
        given = list(labels.shape) if isinstance(labels, Tensor) else type(labels)
        raise ValueError(f"expected labels as a tensor with one for each of the {images} images, got {given}")


def _warn_of_probabilities(logits: Tensor) -> None:
    """Warn, once, of logits that come out of a sigmoid by way of nothing but other shapes and dtypes."""
    node: Any = logits.grad_fn
    while node is not None and node.name().partition("Backward")[0] in _SAME_VALUES:
        node = node.next_functions[0][0]
    if node is None:
        return
    program = getattr(node, "program", None)  # of a chain of fused blocks
    if node.name() == "SigmoidBackward0" or (program is not None and program.plan.blocks[-1].act == "sigmoid"):
        warnings.warn(PROBABILITIES, stacklevel=2)


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


def _discriminator_loss(
    discriminator: nn.Module,
    real: Tensor,
    fake: Tensor,
    given: tuple[Tensor, ...],
    loss: GANLoss | None,
    real_label: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """D's loss, and the mean probabilities that it gives to real and to generated images; `given` goes with both."""
    if "stat_groups" in inspect.signature(unwrapped(discriminator).forward).parameters:
        twice = (torch.cat([labels, labels]) for labels in given)
        logits = discriminator(torch.cat([real.to(fake.dtype), fake]), *twice, stat_groups=2)
        if loss is None:
            _warn_of_probabilities(logits)
            losses, (d_real, d_fake) = bce_with_logits(logits, (real_label, 0.0))
            return losses.sum(), d_real, d_fake
        on_real, on_fake = _wide(logits.flatten()).chunk(2)
    else:
        on_real, on_fake = discriminator(real, *given), discriminator(fake, *given)
        if loss is None:
            _warn_of_probabilities(on_real)
            (of_real, d_real), (of_fake, d_fake) = bce_with_logits(on_real, real_label), bce_with_logits(on_fake, 0.0)
            return of_real + of_fake, d_real, d_fake
        on_real, on_fake = _wide(on_real.flatten()), _wide(on_fake.flatten())
    return loss.discriminator(on_real, on_fake), _probability(on_real), _probability(on_fake)


def _generator_loss(logits: Tensor, loss: GANLoss | None) -> tuple[Tensor, Tensor]:
    """G's loss, and the mean probability that D gives to its images."""
    if loss is None:
        return bce_with_logits(logits, 1.0)
    wide = _wide(logits.flatten())
    return loss.generator(wide), _probability(wide)


def _probability(logits: Tensor) -> Tensor:
    return logits.detach().sigmoid().mean()


def _backward(loss: Tensor, parts: int, scaler: torch.amp.GradScaler | None) -> None:
    loss = loss if parts == 1 else loss / parts
    (loss if scaler is None else scaler.scale(loss)).backward()


def _step(optimizer: Optimizer, scaler: torch.amp.GradScaler | None) -> None:
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
