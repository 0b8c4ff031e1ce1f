"""The C++ kernels of csrc/cpu: contractions, norm-and-activation passes and statistics.

One library was built for each vector width; the one for this processor is loaded when the backend is first used. That
for AVX-512 multiplies bfloat16 on AMX tiles where the processor has them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastdcgan.activations import ACTIVATIONS
from fastdcgan.backends.base import Backend
from fastdcgan.build_info import build_info, library, why_missing, why_stale
from fastdcgan.dispatch import autotune
from fastdcgan.geometry import Geometry, Pair
from fastdcgan.spec import Epilogue, Operand, Unavailable, Update, memory_format, says_channels_last

if TYPE_CHECKING:
    from fastdcgan.spec import Block

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Where PyTorch's own contraction was measured to be as fast or faster (benchmarks/NOTES-CPU.md, "Contractions"): for
# few channels that are more than an image's, in float32 where few taps read padding, and where a weight is packed for
# few rows.
FEWEST_CHANNELS = 16  # of the side that taps shift over
MOST_IMAGE_CHANNELS, MOST_IMAGE_DEPTH = 4, 256  # of that side, and of a sum: kernels of their own (csrc/cpu/narrow.h)
FEWEST_FEATURES = 8  # of the other side of an image, in float32
MOST_PIXELS = 16  # of the other side, in float32
# Of 2x2 outputs: below these, minimal filtering loses by transforming the weight; sums are too short for its rounding.
# A transformed weight may also be kept from call to call (csrc/cpu/kept.h).
FEWEST_TILES, FEWEST_KEPT_TILES, FEWEST_SUMMED_TILES = 128, 32, 16
FEWEST_ROWS, FEWEST_WIDE_ROWS, FEWEST_PROJECTED = 128, 512, 16  # pixels of all samples: 16-bit, float32, from one pixel
FEWEST_WIDE_KEPT = 32  # of `conv` in float32 with a packed weight that is kept from call to call (csrc/cpu/kept.h)


# The namespace of the contractions' operators (csrc/cpu/conv_ops.cpp).
CONTRACTIONS = "fastdcgan_cpu"
KIND, KIND_HALVES = "contractions on tiles", "float32 contractions in halves on tiles"  # of what was measured

Size = Sequence[int]


def extension_name() -> str:
    """The library for this processor; ATEN_CPU_CAPABILITY (default, avx2, avx512) caps what PyTorch reports, and
    "avx512" leaves out our AMX tiles."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return f"_cpu_{capability}" if capability in ("avx2", "avx512") else "_cpu_default"


def _stored(a: Operand) -> Tensor:
    """The tensor that a finished operand has the shape, dtype and memory format of."""
    return a.x if a.y is None else a.y


def _shape(argument: Any) -> Any:
    """What a contraction's time depends on."""
    if isinstance(argument, Tensor):
        return (*argument.shape, memory_format(argument) == torch.channels_last)
    if isinstance(argument, Operand | Epilogue):
        return tuple(map(_shape, argument))
    return argument


def _lie_alike(x: Tensor, y: Tensor) -> bool:
    """Whether `x` lies in memory as the raw output `y` does, with no gaps: a result of the shape of `y` can take its
    place."""
    if x.stride() != y.stride() or x.shape != y.shape or x.dtype != y.dtype:
        return False
    return x.is_contiguous(memory_format=torch.channels_last) or x.is_contiguous()


@functools.cache
def _has_tiles(namespace: str) -> bool:
    return getattr(torch.ops, namespace).bfloat16_on_tiles()


def _may_be_halves() -> bool:
    """Whether float32 products may be of less precision: by `torch.set_float32_matmul_precision("high")`, which PyTorch
    keeps here as "tf32", or "medium": "bf16". (What gets that setting raises where PyTorch's backends differ in it.)"""
    return torch.backends.mkldnn.matmul.fp32_precision in ("tf32", "bf16")  # type: ignore[attr-defined]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Route(NamedTuple):
    """Which way a contraction goes."""

    pytorch: str | None  # why PyTorch's own runs it, or None
    filters: bool = False  # by minimal filtering
    halves: bool = False  # float32 as three products of bfloat16 halves (csrc/cpu/halves.h)
    beside: str = ""  # what `explain` says of it, where ours runs it


class CPUBackend(Backend):
    """float32, bfloat16 and float16 tensors [N, C, H, W] on the CPU, channels_last or contiguous; arithmetic and
    per-channel vectors are float32."""

    name = "cpu"
    casts_weights = True

    def __init__(self) -> None:
        self._slow = extension_name() == "_cpu_default"
        self._tiles = torch.cpu._is_amx_tile_supported()

    def require(self) -> None:
        name = extension_name()
        path = library(name)
        if not path.exists():
            raise Unavailable(f"backend 'cpu' needs the C++ extension {name}: {why_missing(name)}")
        stale = why_stale(name)
        if stale is not None:
            raise Unavailable(f"backend 'cpu': {stale}")
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            built = build_info().torch
            hint = f"it was built with torch {built} and this is {torch.__version__}: build it again"
            raise Unavailable(
                f"backend 'cpu' can't load {path.name}: {error}" + ("" if built == torch.__version__ else f"; {hint}")
            ) from error

    def covers(self, device_type: str, dtype: torch.dtype) -> str | None:
        if device_type != "cpu":
            return f"it runs on the device type 'cpu', not {device_type!r}"
        if dtype not in DTYPES:
            return f"it takes {', '.join(map(_name, DTYPES))}, not {_name(dtype)}"
        return None

    # --- contractions ---

    @property
    def contractions(self) -> Any:
        return getattr(torch.ops, CONTRACTIONS)

    def on_tiles(self, dtype: torch.dtype) -> bool:
        """Whether our contractions of `dtype` run on AMX tiles."""
        return dtype == torch.bfloat16 and _has_tiles(CONTRACTIONS)

    def why_not(self, op: str, *args: Any) -> str | None:
        return self._choose(op, *args).pytorch

    def _choose(self, op: str, *args: Any) -> Route:
        first, second, geometry = args[:3]
        x = _stored(first)
        gathered: Size
        linear: Size
        if op == "weight_grad":
            other = _stored(second)
            gathered, linear = x.shape, other.shape
        else:
            other, batch = second, x.shape[0]
            if op == "conv":
                gathered, linear = x.shape, (batch, other.shape[0], *geometry.conv_size(*x.shape[2:]))
            else:
                gathered, linear = (batch, other.shape[1], *args[3]), x.shape
        reason = self.cannot(geometry, x, other, casts=op != "weight_grad")
        if reason is None and self._tiles and self.on_tiles(x.dtype):
            return Route(self.compared(op, *args))
        # Most often of generation, where weights stay the same; training with normalisation has other epilogues. What
        # was cast for a gradient is another tensor at every call.
        kept = op != "weight_grad" and args[-1].kind in ("bias", "activate") and isinstance(second, torch.nn.Parameter)
        if reason is None and self.filters(op, gathered, linear, geometry, x.dtype, kept):
            exact = Route(None, filters=True)
        else:
            exact = Route(reason or self.slower(op, gathered, linear, geometry, x.dtype, kept))
        if reason is None and x.dtype == torch.float32 and _has_tiles(CONTRACTIONS) and _may_be_halves():
            return self.compared_halves(exact, op, *args)
        return exact

    def cannot(self, geometry: Geometry, *tensors: Tensor, casts: bool = False) -> str | None:
        """Why the kernels of csrc/cpu can't run a contraction, or None if they can. `casts`: float32 goes with any."""
        if self._slow:
            return "the contractions of csrc/cpu need AVX2"
        if geometry.groups != 1:
            return f"the contractions of csrc/cpu have no groups, and here are {geometry.groups}"
        if not any(map(says_channels_last, tensors)):  # PyTorch's result would not be channels_last
            return "the contractions of csrc/cpu are channels_last, and these tensors are not"
        for t in tensors:
            if t.numel() == 0 or not (t.dtype == tensors[0].dtype or (casts and t.dtype == torch.float32)):
                return f"the contractions of csrc/cpu take elements of one dtype, not {list(t.shape)} of {t.dtype}"
        return None

    def filters(
        self, op: str, gathered: Size, linear: Size, geometry: Geometry, dtype: torch.dtype, kept: bool = False
    ) -> bool:
        """Whether minimal filtering (csrc/cpu/winograd.h) runs a contraction: it covers it, and is the fastest there.

        Arguments as in `slower`.
        """
        if not self.can_filter(geometry) or min(gathered[1], linear[1]) < FEWEST_CHANNELS:
            return False
        if dtype == torch.bfloat16 and (self._tiles or self.on_tiles(dtype)):
            return False
        tiles = linear[0] * ((linear[2] + 1) // 2) * ((linear[3] + 1) // 2)
        if op == "weight_grad":
            return tiles >= FEWEST_SUMMED_TILES
        return tiles >= (FEWEST_KEPT_TILES if kept else FEWEST_TILES)

    @staticmethod
    def can_filter(geometry: Geometry) -> bool:
        """Whether minimal filtering covers convolutions of this geometry."""
        g = geometry
        return g.dilation == (1, 1) and max(g.stride) <= 2 and g.kernel == (2 * g.stride[0], 2 * g.stride[1])

    def slower(
        self, op: str, gathered: Size, linear: Size, geometry: Geometry, dtype: torch.dtype, kept: bool = False
    ) -> str | None:
        """Why PyTorch's own contraction is as fast or faster, or None if it isn't.

        `gathered`, `linear`: sizes [N, C, H, W] of the side that the taps shift over, and of the other; `kept`: whether
        a packed weight can be expected to hold for several calls.
        """
        pixels, wide = linear[2] * linear[3], dtype == torch.float32
        if self._tiles and dtype == torch.bfloat16:
            return "it multiplies bfloat16 on AMX tiles"
        if gathered[1] < FEWEST_CHANNELS:
            return None if dtype == torch.float16 else self.slower_image(op, gathered, linear, geometry, dtype)
        if op == "weight_grad":
            return None
        if wide and pixels > MOST_PIXELS:
            return f"it is as fast for {linear[2]}x{linear[3]} pixels in float32"
        fewest = FEWEST_WIDE_ROWS if wide else FEWEST_ROWS
        if kept:
            fewest = FEWEST_WIDE_KEPT if wide and op == "conv" else 1
        elif pixels == 1:
            fewest = 1 if op == "conv" else FEWEST_PROJECTED
        if linear[0] * pixels < fewest:
            return f"it is faster for {linear[0]} times {pixels} pixels"
        return None

    @staticmethod
    def slower_image(op: str, gathered: Size, linear: Size, geometry: Geometry, dtype: torch.dtype) -> str | None:
        """`slower` for few channels of the gathered side."""
        taps = geometry.kernel[0] * geometry.kernel[1]
        image = gathered[1] <= MOST_IMAGE_CHANNELS and gathered[1] * taps <= MOST_IMAGE_DEPTH
        if op != "conv_transpose" and not image:
            return f"it is faster for {gathered[1]} channels"
        if image and (taps == 1 or linear[2] * linear[3] == 1):
            return f"it is faster between {gathered[1]} channels and one pixel"
        if image and dtype == torch.float32 and linear[1] < FEWEST_FEATURES:
            return f"it is faster between {gathered[1]} and {linear[1]} channels"
        return None

    def compared(self, op: str, *args: Any) -> str | None:
        """Why PyTorch's own contraction is faster where both are on AMX tiles, or None if it isn't: measured, at first
        use. Ours where bits should not depend on that."""
        if torch.are_deterministic_algorithms_enabled():
            return None
        calls = {"cpu": functools.partial(getattr(self, f"_{op}"), *args)}
        calls["pytorch"] = functools.partial(self._pytorch, op, *args)
        times = autotune.cpu_times(KIND, repr((op, *map(_shape, args), torch.get_num_threads())), calls)
        if times["cpu"] * (1 - autotune.MARGIN) <= times["pytorch"]:
            return None
        return f"it is faster: {times['pytorch']:.4f} ms, and ours {times['cpu']:.4f} ms, measured here"

    def compared_halves(self, exact: Route, op: str, *args: Any) -> Route:
        """`exact`, or three products of halves on AMX tiles where those are faster: measured, at first use. Halves
        where bits should not depend on that."""
        name = "three products of bfloat16 halves on AMX tiles"
        if torch.are_deterministic_algorithms_enabled():
            return Route(None, halves=True, beside=name)
        calls = {"halves": functools.partial(getattr(self, f"_{op}"), *args, halves=True)}
        if exact.pytorch is not None:
            calls["float32"] = functools.partial(self._pytorch, op, *args)
        else:
            calls["float32"] = functools.partial(getattr(self, f"_{op}"), *args, filters=exact.filters)
        key = repr((op, exact[:2], *map(_shape, args), torch.get_num_threads()))
        times = autotune.cpu_times(KIND_HALVES, key, calls)
        both = f"{times['halves']:.4f} ms, float32 {times['float32']:.4f} ms, measured here"
        if times["halves"] < (1 - autotune.MARGIN) * times["float32"]:  # or they cost precision for nothing
            return Route(None, halves=True, beside=f"{name}: {both}")
        beside = f"float32 products; {name} take {both}"
        return exact._replace(pytorch=exact.pytorch and f"{exact.pytorch}; {name} take {both}", beside=beside)

    def turns(self, blocks: Sequence[Block], weights: Sequence[Tensor], x: Tensor) -> bool:
        if self._slow or any(map(says_channels_last, (x, *weights))):
            return False
        if self._tiles and x.dtype == torch.bfloat16 and not self.on_tiles(x.dtype):
            return False
        # Whole nets, whose ends are images, noise or logits: turning those costs little.
        size = (x.shape[2], x.shape[3])
        if x.shape[1] >= FEWEST_CHANNELS and size != (1, 1):
            return False
        for block in blocks:
            size = block.output_size(*size)
        return weights[-1].shape[1 if blocks[-1].transposed else 0] < FEWEST_CHANNELS or size == (1, 1)

    def _route(self, op: str, *args: Any) -> Route:
        route = self._choose(op, *args)
        if self.seen is not None:
            self.seen.append(route.beside if route.pytorch is None else f"PyTorch's convolution: {route.pytorch}")
        return route

    def _pytorch(self, op: str, first: Operand, second: Any, *args: Any) -> Any:
        """The contraction by way of PyTorch's own."""
        if op != "weight_grad":
            second = second.to(_stored(first).dtype)
        return getattr(super(), op)(first, second, *args)

    def conv(self, a: Operand, weight: Tensor, geometry: Geometry, epilogue: Epilogue) -> tuple[Tensor, Tensor]:
        route = self._route("conv", a, weight, geometry, epilogue)
        if route.pytorch is not None:
            return self._pytorch("conv", a, weight, geometry, epilogue)
        return self._conv(a, weight, geometry, epilogue, route.filters, route.halves)

    def _conv(
        self,
        a: Operand,
        weight: Tensor,
        geometry: Geometry,
        epilogue: Epilogue,
        filters: bool = False,
        halves: bool = False,
    ) -> tuple[Tensor, Tensor]:
        size = geometry.conv_size(a.x.shape[2], a.x.shape[3])
        return self._run(self.contractions.conv, a, weight, geometry, size, epilogue, filters, halves)

    def conv_transpose(
        self, a: Operand, weight: Tensor, geometry: Geometry, output_size: Pair, epilogue: Epilogue
    ) -> tuple[Tensor, Tensor]:
        route = self._route("conv_transpose", a, weight, geometry, output_size, epilogue)
        if route.pytorch is not None:
            return self._pytorch("conv_transpose", a, weight, geometry, output_size, epilogue)
        return self._conv_transpose(a, weight, geometry, output_size, epilogue, route.filters, route.halves)

    def _conv_transpose(
        self,
        a: Operand,
        weight: Tensor,
        geometry: Geometry,
        size: Pair,
        epilogue: Epilogue,
        filters: bool = False,
        halves: bool = False,
    ) -> tuple[Tensor, Tensor]:
        return self._run(self.contractions.conv_transpose, a, weight, geometry, size, epilogue, filters, halves)

    def _run(
        self,
        op: Callable,
        a: Operand,
        weight: Tensor,
        geometry: Geometry,
        size: Pair,
        e: Epilogue,
        filters: bool,
        halves: bool,
    ) -> tuple[Tensor, Tensor]:
        fused, act, slope, groups = None, ACTIVATIONS["identity"].id, 0.0, 0
        if e.kind == "stats":
            groups = e.stat_groups
        elif e.kind == "bias":
            assert e.coef is not None
            fused = e.coef.to(torch.float32)
        elif e.kind == "activate" and e.coef is not None and e.coef.shape[1] == 1:
            fused, act, slope = e.coef, ACTIVATIONS[e.act].id, e.slope
        g = geometry
        x = self.finished(a)
        out, stats = op(x, weight, g.stride, g.padding, g.dilation, size, fused, act, slope, groups, filters, halves)
        if fused is None and groups == 0:
            return self.apply_epilogue(out, e)
        return out, stats

    def weight_grad(self, gathered: Operand, linear: Operand, geometry: Geometry) -> Tensor:
        route = self._route("weight_grad", gathered, linear, geometry)
        if route.pytorch is not None:
            return self._pytorch("weight_grad", gathered, linear, geometry)
        return self._weight_grad(gathered, linear, geometry, route.filters, route.halves)

    def _weight_grad(
        self, gathered: Operand, linear: Operand, geometry: Geometry, filters: bool = False, halves: bool = False
    ) -> Tensor:
        x, dy, g = self.finished(gathered), self.finished(linear), geometry
        dw = self.contractions.weight_grad(x, dy, g.kernel, g.stride, g.padding, g.dilation, filters, halves)
        return dw.contiguous(memory_format=memory_format(x))

    # --- normalisation and activation ---

    def norm_act(self, a: Operand) -> Tensor:
        assert a.coef is not None
        act = ACTIVATIONS[a.act].id
        if a.y is None:
            return torch.ops.fastdcgan_cpu.norm_act(a.x, a.coef, act, a.slope)
        return torch.ops.fastdcgan_cpu.norm_act_backward(a.x, a.y, a.coef, act, a.slope)

    def norm_act_(self, a: Operand) -> Tensor:
        if not _lie_alike(a.x, _stored(a)):
            return self.norm_act(a)
        act = ACTIVATIONS[a.act].id
        if a.y is None:
            torch.ops.fastdcgan_cpu.norm_act_(a.x, a.coef, act, a.slope)
        else:
            torch.ops.fastdcgan_cpu.norm_act_backward_(a.x, a.y, a.coef, act, a.slope)
        return a.x

    def norm_act_reduce(self, da: Tensor, y: Tensor, coef: Tensor, act: str, slope: float) -> Tensor:
        return torch.ops.fastdcgan_cpu.norm_act_reduce(da, y, coef, ACTIVATIONS[act].id, slope)

    def grad_stats(self, da: Tensor, y: Tensor, coef: Tensor, act: str, slope: float) -> tuple[Tensor, Tensor]:
        # In place, so `da` has to lie as `y` does.
        if y.is_contiguous(memory_format=torch.channels_last):
            g = da.contiguous(memory_format=torch.channels_last)
        else:
            y, g = y.contiguous(), da.contiguous()
        sums = torch.ops.fastdcgan_cpu.grad_stats_(g, y, coef, ACTIVATIONS[act].id, slope)
        return g, sums

    def batch_stats(self, y: Tensor, stat_groups: int) -> Tensor:
        return torch.ops.fastdcgan_cpu.batch_stats(y, stat_groups)

    def coefficients(
        self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None, eps: float
    ) -> Tensor:
        return torch.ops.fastdcgan_cpu.coefficients(mean, var, weight, bias, shift, eps)

    def update_running(
        self, mean: Tensor, var: Tensor, stats: Tensor, shift: Tensor | None, factor: Tensor | None, momentum: float
    ) -> None:
        if mean.dtype == var.dtype == torch.float32 and mean.is_contiguous() and var.is_contiguous():
            torch.ops.fastdcgan_cpu.update_running_(mean, var, stats, shift, factor, momentum)
        else:
            super().update_running(mean, var, stats, shift, factor, momentum)

    def grad_coefficients(self, sums: Tensor, coef: Tensor, count: float) -> Tensor:
        return torch.ops.fastdcgan_cpu.grad_coefficients(sums, coef, count)

    # --- several in one call ---

    def normalize(
        self, y: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, act: str, slope: float
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.fastdcgan_cpu.normalize(y, stats, weight, bias, eps, ACTIVATIONS[act].id, slope)

    def normalize_backward(
        self, da: Tensor, y: Tensor, coef: Tensor, count: int, act: str, slope: float
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.fastdcgan_cpu.normalize_backward(da, y, coef, count, ACTIVATIONS[act].id, slope)

    def normalize_backward_(
        self, da: Tensor, y: Tensor, coef: Tensor, count: int, act: str, slope: float
    ) -> tuple[Tensor, Tensor]:
        if not _lie_alike(da, y):
            return self.normalize_backward(da, y, coef, count, act, slope)
        return da, torch.ops.fastdcgan_cpu.normalize_backward_(da, y, coef, count, ACTIVATIONS[act].id, slope)

    def bias_coefficients(self, like: Tensor, bias: Tensor | None, channels: int) -> Tensor:
        return torch.ops.fastdcgan_cpu.bias_coefficients(bias, channels)

    def update_all_running(self, first: Tensor, updates: Sequence[Update]) -> None:
        means, variances, stats, shifts, factors, momenta = zip(*updates, strict=True)
        plain = all(t.dtype == torch.float32 and t.is_contiguous() for t in (*means, *variances))
        if not plain or any(factor is not None for factor in factors):
            super().update_all_running(first, updates)
            return
        none = first.new_empty(0)
        given = [none if shift is None else shift for shift in shifts]
        torch.ops.fastdcgan_cpu.update_all_running_(means, variances, stats, given, momenta)
