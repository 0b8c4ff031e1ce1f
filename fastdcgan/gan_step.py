"""A whole training step of a GAN as one object: captured as one CUDA graph on a GPU, run eagerly anywhere else.

What a step does is written in `train_step.py`, what a graph needs around it in `capture.py`.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fastdcgan import backends
from fastdcgan.capture import Captured, Granted, Snapshot, check_first_state, check_optimizers, record
from fastdcgan.checks import COUNT, Range
from fastdcgan.dispatch import router
from fastdcgan.train_step import (
    PROBABILITIES,
    GANLoss,
    GradientPenalty,
    StepMetrics,
    check_batch,
    train_step,
    unwrapped,
)

_WARM_UPS = 3  # calls, for autotuners, cuDNN's search and lazily made state
OTHER_SHAPES = ("eager", "capture")


class GANStep:
    """One step of training: D on real and on generated images, D's optimiser, G through the new D, G's optimiser.

        step = fastdcgan.GANStep(G, D, opt_g, opt_d, noise=(100,), dtype=torch.bfloat16)
        for real in batches:
            metrics = step(real)              # scalars on the device: loss_d, loss_g, d_real, d_fake, ...

    Goodfellow et al., "Generative Adversarial Nets" (2014), algorithm 1, with the non-saturating loss of G. Equal to
    the plain loop: real and generated images go through a D whose `forward` takes `stat_groups` as one batch with
    statistics of their own, the images are generated once, no gradient is computed that nothing needs.

    On a GPU the step is one CUDA graph. The first call of a shape warms up, puts back everything that this changed
    (weights, buffers, optimisers, scaler, random generators), and captures. Learning rates may change between
    calls, by a scheduler or by hand; when weights have moved in memory, or settings of optimisers or modules have
    changed, it is captured anew.

    Args:
        generator, discriminator: any two modules, z -> images [N, C, H, W] and images -> one logit each, fused or not.
        optimizer_g, optimizer_d: to be captured they must be capturable: `fastdcgan.optim.FusedAdam(...,
            capturable=True)`, or PyTorch's with `capturable=True` where they have that.
        noise: the shape of one z, drawn on the device by `rng` (default: PyTorch's own generator), say (100,) or
            (100, 1, 1); without it each call needs `z`.
        loss, real_label, penalty, dtype, scaler, accumulate: as in `train_step`.
        ema: decay of a moving average of G's weights in `self.ema`, a copy of G in eval mode; 0 for none.
        graph: whether to capture; None where that is possible: on a GPU, without DistributedDataParallel.
        other_shapes: what becomes of batches of another shape than the first, such as a last short one: they run
            "eager", or are captured too ("capture").
        compile: run both networks through torch.compile.
        rng: the generator of the noise, on the device.

    Raises ValueError or TypeError for arguments that don't fit.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        optimizer_g: Optimizer,
        optimizer_d: Optimizer,
        *,
        noise: Sequence[int] | None = None,
        loss: GANLoss | None = None,
        real_label: float = 0.9,
        penalty: GradientPenalty | None = None,
        dtype: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
        accumulate: int = 1,
        ema: float = 0.0,
        graph: bool | None = None,
        other_shapes: str = "eager",
        compile: bool = False,
        rng: torch.Generator | None = None,
    ) -> None:
        for name, net in (("generator", generator), ("discriminator", discriminator)):
            if not isinstance(net, nn.Module):
                raise TypeError(f"{name} must be an nn.Module, got {type(net).__name__}")
        check_parameters(generator, discriminator, optimizer_g, optimizer_d)
        check_settings(loss, real_label, penalty, dtype, scaler, rng)
        COUNT.check("accumulate", accumulate)
        Range(0, None, below=1, whole=False).check("ema", ema)
        for name, value, expected in (("graph", graph, (bool, type(None))), ("compile", compile, bool)):
            if not isinstance(value, expected):
                raise TypeError(f"{name} is {value!r}: expected True or False")
        if noise is not None and not isinstance(noise, (tuple, list)):
            raise TypeError(f"noise is {noise!r}: expected the shape of one z, say (100,)")
        for length in noise or ():
            COUNT.check("noise, the shape of one z,", length)
        # Of what a compiled network gives, a step can't tell.
        if compile and loss is None and isinstance(list(discriminator.modules())[-1], nn.Sigmoid):
            warnings.warn(PROBABILITIES, stacklevel=2)
        if other_shapes not in OTHER_SHAPES:
            raise ValueError(f"other_shapes is {other_shapes!r}: expected one of {', '.join(OTHER_SHAPES)}")
        self.generator, self.discriminator = generator, discriminator
        self.optimizer_g, self.optimizer_d = optimizer_g, optimizer_d
        self.noise, self.rng, self.other_shapes = noise, rng, other_shapes
        self.device = next(generator.parameters()).device
        self.graph = self._capturable() if graph is None else graph
        if self.graph:
            self._check_capture()
        self.decay = ema
        self.ema: nn.Module | None = None
        if ema:
            self.ema = copy.deepcopy(unwrapped(generator)).eval().requires_grad_(False)
        self._scaler = scaler
        self._settings: dict[str, Any] = {
            "loss": loss,
            "real_label": real_label,
            "penalty": penalty,
            "dtype": dtype,
            "scaler": scaler,
            "accumulate": accumulate,
        }
        self._g: Any = torch.compile(generator) if compile else generator
        self._d: Any = torch.compile(discriminator) if compile else discriminator
        self._rates: dict[int, list[Tensor]] = {}
        self._captured: dict[Hashable, Captured] = {}
        self._granted: Granted | None = None
        self._first = self._first_parameters()

    def __call__(self, real: Tensor, z: Tensor | None = None, labels: Tensor | None = None) -> StepMetrics:
        """A step on `real` [N, C, H, W] and `z` [N, ...], drawn if not given; `labels` [N, ...] are for networks that
        take them (`train_step`). Nothing here waits for the device.

        Raises ValueError if there is neither `z` nor `noise`, or if the networks have other parameters now than those
        that the optimisers update; else what `train_step` raises.
        """
        check_batch(real, real if z is None else z, labels)
        if z is None and self.noise is None:
            raise ValueError("no z given: pass it, or give GANStep the shape of one, as in noise=(100,)")
        if not self.graph:
            self._check_parameters()
            return self._run(real, z, labels)
        self._settle_rates()
        if self._granted is None or not self._granted.holds():
            self._check_parameters()
            self._captured.clear()
        others = (None if given is None else (given.shape, given.dtype) for given in (z, labels))
        key = (real.shape, real.dtype, real.stride(), *others)
        captured = self._captured.get(key)
        if captured is None:
            if self._captured and self.other_shapes == "eager":
                return self._run(real, z, labels)
            captured = self._captured[key] = self._capture(real, z, labels)
            nets = [net for net in (self.generator, self.discriminator, self.ema) if net is not None]
            self._granted = Granted(nets, (self.optimizer_g, self.optimizer_d))
        return captured(real, z, labels)

    def _check_parameters(self) -> None:
        first = self._first_parameters()
        if first[0] is not self._first[0] or first[1] is not self._first[1]:  # by load_state_dict(assign=True), say
            check_parameters(self.generator, self.discriminator, self.optimizer_g, self.optimizer_d)
            self._first = first

    def _first_parameters(self) -> tuple[Tensor, Tensor]:
        return next(self.generator.parameters()), next(self.discriminator.parameters())

    # --- eager ---

    def _run(self, real: Tensor, z: Tensor | None, labels: Tensor | None = None) -> StepMetrics:
        if z is None:
            assert self.noise is not None
            z = torch.randn((real.shape[0], *self.noise), device=self.device, generator=self.rng)
        nets = (self._g, self._d, self.optimizer_g, self.optimizer_d)
        metrics = train_step(*nets, real, z, labels=labels, **self._settings)
        if self.ema is not None:
            self._average(self.ema)
        return metrics

    @torch.no_grad()
    def _average(self, ema: nn.Module) -> None:
        source = unwrapped(self.generator)
        torch._foreach_lerp_(list(ema.parameters()), list(source.parameters()), 1 - self.decay)
        for mean, buffer in zip(ema.buffers(), source.buffers(), strict=True):
            mean.copy_(buffer)

    # --- captured ---

    def _capturable(self) -> bool:
        nets = (self.generator, self.discriminator)
        return self.device.type == "cuda" and not any(isinstance(net, DistributedDataParallel) for net in nets)

    def _check_capture(self) -> None:
        if self.device.type != "cuda":
            raise ValueError(f"graph=True needs networks on a GPU, these are on {self.device}: leave it out")
        if not self._capturable():
            raise ValueError("graph=True does not go with DistributedDataParallel: leave it out")
        check_optimizers(self.optimizer_g, self.optimizer_d)

    def _settle_rates(self) -> None:
        """Learning rates as tensors on the device that stay the same objects, whoever sets them."""
        for optimizer in (self.optimizer_g, self.optimizer_d):
            rates = self._rates.setdefault(id(optimizer), [])
            for i, group in enumerate(optimizer.param_groups):
                if i == len(rates):
                    rates.append(torch.as_tensor(group["lr"], dtype=torch.float32).to(self.device, copy=True))
                elif group["lr"] is not rates[i]:
                    rates[i].fill_(group["lr"])
                group["lr"] = rates[i]

    def _capture(self, real: Tensor, *others: Tensor | None) -> Captured:
        real, others = real.clone(), tuple(None if given is None else given.clone() for given in others)
        self.warm_up(real, *others)
        recorded = record(lambda: torch.stack(self._run(real, *others)), self.device, self.rng)
        return Captured(*recorded, (real, *others))

    def warm_up(self, real: Tensor, z: Tensor | None = None, labels: Tensor | None = None) -> None:
        """Run the step a few times, and put back everything that this changed.

        Raises ValueError, before anything runs, where that can't be done.
        """
        optimizers = (self.optimizer_g, self.optimizer_d)
        check_first_state(optimizers)
        modules = [unwrapped(net) for net in (self.generator, self.discriminator)]
        snapshot = Snapshot(
            [*modules, *([self.ema] if self.ema is not None else [])], optimizers, self._scaler, self.rng
        )
        if self.device.type == "cuda":
            side = torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                self._compile_ahead(real, z, labels)
                snapshot.restore()
                for _ in range(_WARM_UPS):
                    self._run(real, z, labels)
            torch.cuda.current_stream(self.device).wait_stream(side)
        else:
            for _ in range(_WARM_UPS):
                self._run(real, z, labels)
        snapshot.restore()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _compile_ahead(self, real: Tensor, z: Tensor | None, labels: Tensor | None) -> None:
        """One step whose kernels are compiled side by side; what it leaves is no numbers."""
        try:
            with router.compiling_ahead(backends.requested()) as compiles:
                if compiles:
                    self._run(real, z, labels)
        except Exception as error:  # Then they are compiled one after the other, as they are used.
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(f"fastdcgan can't compile kernels ahead: {reason}", RuntimeWarning, stacklevel=2)


def check_parameters(generator: nn.Module, discriminator: nn.Module, of_g: Optimizer, of_d: Optimizer) -> None:
    """Raise TypeError or ValueError for an optimiser that updates none of its network's parameters."""
    nets = {"generator": generator, "discriminator": discriminator}
    for name, optimizer in (("generator", of_g), ("discriminator", of_d)):
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer_{name[0]} must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
        found = [other for other, net in nets.items() if any(id(p) in updated for p in net.parameters())]
        if name not in found:
            instead = f", but of the {found[0]}'s: are the two optimisers swapped?" if found else ""
            raise ValueError(f"optimizer_{name[0]} updates none of the {name}'s parameters{instead}")


def check_settings(
    loss: object, real_label: object, penalty: object, dtype: object, scaler: object, rng: object
) -> None:
    """Raise TypeError or ValueError for what `train_step` can't take."""
    for name, value, expected, fits in (
        ("loss", loss, "a GANLoss", isinstance(loss, GANLoss)),
        ("penalty", penalty, "a GradientPenalty", callable(penalty)),
        ("dtype", dtype, "a floating-point torch.dtype", isinstance(dtype, torch.dtype) and dtype.is_floating_point),
        ("scaler", scaler, "a torch.amp.GradScaler", isinstance(scaler, torch.amp.GradScaler)),
        ("rng", rng, "a torch.Generator", isinstance(rng, torch.Generator)),
    ):
        if value is not None and not fits:
            raise TypeError(f"{name} must be {expected} or None, got {value!r}")
    if not isinstance(real_label, (int, float)) or not math.isfinite(real_label):
        raise ValueError(f"real_label must be a finite number, got {real_label!r}")
