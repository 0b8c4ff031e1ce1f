"""`FusedSequential` and the drop-in layers: `nn.Sequential`s of named `conv`, `bn`, `act` that run as one block."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastdcgan import checks
from fastdcgan.activations import to_module
from fastdcgan.engine.deferred import deferring
from fastdcgan.engine.run import run_sequential

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class FusedSequential(nn.Sequential):
    """An `nn.Sequential` that runs the blocks in it fused: convolution [+ BatchNorm2d] [+ activation].

    Blocks that follow each other, through nested Sequentials too, run as one chain with one autograd node. Everything
    else is called as `nn.Sequential` calls it, and the parameters, buffers, state_dict keys and hooks are its own.
    `fuse(model)` turns a model's Sequentials into this; `explain(model)` says what runs how.

    `boundaries`: "auto" lets the plan choose whether a chain keeps finished activations between its blocks ("finished":
    faster where the backend can't recompute them on load) or only raw outputs ("deferred": less memory).
    """

    boundaries: str = "auto"

    def forward(self, input: Tensor, stat_groups: int = 1) -> Tensor:
        """[N, C, H, W] (or what the first module takes) -> the last module's output, in PyTorch's memory format.

        `stat_groups`: batch statistics are taken over each of so many equal parts of the batch, and the running ones
        updated once per part in order, as if the parts had been passed one after another.
        """
        return run_sequential(self, input, stat_groups, self.boundaries)

    forward.runs_blocks = True  # type: ignore[attr-defined]  # how `engine/match.py` knows it

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError("torch.jit.script can't compile fused blocks: call fastdcgan.unfuse(model) first")

    def __getitem__(self, idx: int | slice) -> Any:
        if isinstance(idx, slice):  # a part of a layer is no longer that layer
            return FusedSequential(OrderedDict(list(self._modules.items())[idx]))
        return super().__getitem__(idx)


class _Layer(FusedSequential):
    """conv [+ bn] [+ act] under those names."""

    conv: nn.Conv2d | nn.ConvTranspose2d

    def __init__(
        self, conv: nn.Conv2d | nn.ConvTranspose2d, bn: nn.BatchNorm2d | None, activation: str, slope: float | None
    ):
        checks.check_activation(activation)
        checks.check_conv(conv)
        if slope is not None:
            checks.FINITE.check("slope", slope)
        if bn is not None:
            checks.check_norm(bn.eps, bn.momentum)
        parts = {"conv": conv, "bn": bn, "act": to_module(activation, slope)}
        super().__init__(OrderedDict((name, part) for name, part in parts.items() if part is not None))

    @property
    def weight(self) -> Tensor:
        """The convolution's: initialisers look for it in classes whose names have "Conv" in them."""
        return self.conv.weight


class _TransposedLayer(_Layer):
    """One of a transposed convolution."""

    def forward(  # type: ignore[override]
        self, input: Tensor, output_size: Sequence[int] | None = None, stat_groups: int = 1
    ) -> Tensor:
        """As `FusedSequential.forward`; `output_size` is that of `nn.ConvTranspose2d.forward`: [H', W'] or
        [N, Co, H', W'], in place of `output_padding`.

        Raises ValueError, as PyTorch does, for a size that no output_padding gives.
        """
        if output_size is None:
            return super().forward(input, stat_groups)
        checks.check_stat_groups(stat_groups)
        if stat_groups == 1:
            return _call_one_by_one(self, input, output_size)
        if input.shape[0] % stat_groups:
            raise ValueError(f"stat_groups={stat_groups} must divide the batch size, got a batch of {input.shape[0]}")
        return torch.cat([_call_one_by_one(self, part, output_size) for part in input.chunk(stat_groups)])

    forward.runs_blocks = True  # type: ignore[attr-defined]


@deferring
def _call_one_by_one(layer: nn.Sequential, x: Tensor, output_size: Sequence[int]) -> Tensor:
    conv, *others = layer
    x = conv(x, output_size)
    for module in others:
        x = module(x)
    return x


class ConvBNAct2d(_Layer):
    """`nn.Conv2d`, `nn.BatchNorm2d` and an activation as one block: [N, Ci, H, W] -> [N, Co, H', W'].

    The positional arguments are `nn.Conv2d`'s, `eps` to `track_running_stats` are `nn.BatchNorm2d`'s; `activation` is
    a name of `fastdcgan.activations.ACTIVATIONS`, `slope` leaky_relu's negative slope (default 0.2) or elu's alpha.
    A bias costs nothing, but in front of a BatchNorm it does nothing in training either: DCGAN's nets have none.
    Raises ValueError for an unknown activation, TypeError or ValueError for numbers that no convolution or
    normalisation has (a stride of 0, an infinite slope); else what PyTorch's modules raise.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str = "leaky_relu",
        slope: float | None = None,
    ) -> None:
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        bn = nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats, device, dtype)
        super().__init__(conv, bn, activation, slope)


class ConvTransposeBNAct2d(_TransposedLayer):
    """`nn.ConvTranspose2d`, `nn.BatchNorm2d` and an activation as one block: [N, Ci, H, W] -> [N, Co, H', W'].

    The positional arguments are `nn.ConvTranspose2d`'s, and a call takes an `output_size`; all else is `ConvBNAct2d`'s.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, int] = 1,
        padding_mode: PaddingMode = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str = "relu",
        slope: float | None = None,
    ) -> None:
        conv = nn.ConvTranspose2d(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation,
            padding_mode, device, dtype,
        )  # fmt: skip
        bn = nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats, device, dtype)
        super().__init__(conv, bn, activation, slope)


class ConvAct2d(_Layer):
    """`nn.Conv2d` and an activation as one block; arguments are `nn.Conv2d`'s, `activation` and `slope`."""

    def __init__(self, *args: Any, activation: str = "leaky_relu", slope: float | None = None, **kwargs: Any) -> None:
        super().__init__(nn.Conv2d(*args, **kwargs), None, activation, slope)


class ConvTransposeAct2d(_TransposedLayer):
    """`nn.ConvTranspose2d` and an activation as one block; its arguments, `activation` and `slope`."""

    def __init__(self, *args: Any, activation: str = "tanh", slope: float | None = None, **kwargs: Any) -> None:
        super().__init__(nn.ConvTranspose2d(*args, **kwargs), None, activation, slope)


class ConvBNLeakyReLU2d(ConvBNAct2d):
    """The discriminator's block (Radford et al., 2015, section 3): `ConvBNAct2d` with LeakyReLU."""

    def __init__(self, *args: Any, negative_slope: float = 0.2, **kwargs: Any) -> None:
        super().__init__(*args, activation="leaky_relu", slope=negative_slope, **kwargs)


class ConvLeakyReLU2d(ConvAct2d):
    """The discriminator's first block, which has no BatchNorm: `ConvAct2d` with LeakyReLU."""

    def __init__(self, *args: Any, negative_slope: float = 0.2, **kwargs: Any) -> None:
        super().__init__(*args, activation="leaky_relu", slope=negative_slope, **kwargs)


class ConvTransposeBNReLU2d(ConvTransposeBNAct2d):
    """The generator's block (Radford et al., 2015, section 3): `ConvTransposeBNAct2d` with ReLU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, activation="relu", **kwargs)


class ConvTransposeTanh2d(ConvTransposeAct2d):
    """The generator's last block, which has no BatchNorm: `ConvTransposeAct2d` with Tanh."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, activation="tanh", **kwargs)
