"""The C++ kernels of csrc/cpu: contractions, norm-and-activation passes and statistics.

One library was built for each vector width; the one for this processor is loaded when the backend is first used. That
for AVX-512 multiplies bfloat16 on AMX tiles or by `vdpbf16ps` where the processor has them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdcgan.activations import ACTIVATIONS
from fastdcgan.backends.base import Backend
from fastdcgan.build_info import build_info, library, why_missing, why_stale
from fastdcgan.spec import Algorithm, Block, Call, Operand, Unavailable, Update, memory_format, says_channels_last

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The rule where nothing was measured: PyTorch's own contraction was found to be as fast or faster
# (benchmarks/NOTES-CPU.md, "Contractions") for few channels that are more than an image's, in float32 where few taps
# read padding, and where a weight is packed for few rows.
FEWEST_CHANNELS = 16  # of the side that taps shift over
MOST_IMAGE_CHANNELS, MOST_IMAGE_DEPTH = 4, 256  # of that side, and of a sum: kernels of their own
FEWEST_FEATURES = 8  # of the other side of an image, in float32
MOST_PIXELS = 16  # of the other side, in float32
# Of 2x2 outputs: below these, minimal filtering loses by transforming the weight; sums are too short for its rounding.
# A transformed weight may also stay in the packed-weight cache. Tiles of 4x4 outputs, for 3x3 kernels, need be few.
FEWEST_TILES, FEWEST_CACHED_TILES, FEWEST_SUMMED_TILES, FEWEST_LARGE_TILES = 128, 32, 16, 8
FEWEST_TERMS = 64  # of a sum, for tiles of 4x4 outputs: the rounding of their transforms doesn't shrink with it
FEWEST_ROWS, FEWEST_WIDE_ROWS, FEWEST_PROJECTED = 128, 512, 16  # pixels of all samples: 16-bit, float32, from one pixel
FEWEST_WIDE_CACHED = 32  # of `conv` in float32 with a weight in the packed-weight cache
# Pixels of the other side up to which a weight may be multiplied where it lies; it is by rule from so many elements on.
MOST_ROWS, LEAST_UNPACKED = 64, 2**18
# Multiply-adds below which a call of PyTorch's convolution takes longer to set up than ours to run, if a packed weight
# serves so many rows, or has few elements itself.
FEW_PRODUCTS, FEW_ROWS, FEW_WEIGHTS = 2**20, 8, 2**14
# Of `vdpbf16ps` to FMA, from which on bfloat16 is multiplied as it is: some processors have a half, some 2.
LEAST_DOT_RATE = 1.3

NAMESPACE = "fastdcgan_cpu"  # of the operators
# Of the algorithms in csrc/cpu/contraction/algorithms.cpp; the library says which of them can run a call.
_AMX, _DOT = ("amx_col2im", "amx"), ("avx512_bf16_col2im", "avx512_bf16")
_WINOGRAD = ("winograd_2x2", "winograd_4x4")  # by the outputs of a tile
_NAMES = ("split_bf16", *_AMX, *_DOT, *_WINOGRAD, "col2im", "image_side", "gemm", "unpacked")

Size = Sequence[int]


def extension_name() -> str:
    """The library for this processor; ATEN_CPU_CAPABILITY (default, avx2, avx512) caps what PyTorch reports, and
    "avx512" leaves out our AMX tiles."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return f"_cpu_{capability}" if capability in ("avx2", "avx512") else "_cpu_default"


def _stored(a: Operand) -> Tensor:
    """The tensor that a finished operand has the shape, dtype and memory format of."""
    return a.x if a.y is None else a.y


def _lie_alike(x: Tensor, y: Tensor) -> bool:
    """Whether `x` lies in memory as the raw output `y` does, with no gaps: a result of the shape of `y` can take its
    place."""
    if x.stride() != y.stride() or x.shape != y.shape or x.dtype != y.dtype:
        return False
    return x.is_contiguous(memory_format=torch.channels_last) or x.is_contiguous()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _in_channels_last(call: Call) -> bool:
    """Whether PyTorch's result would be channels_last."""
    other = _stored(call.b) if call.op == "weight_grad" else call.b
    return says_channels_last(_stored(call.a)) or says_channels_last(other)


class Sides(NamedTuple):
    """What the rules look at: sizes [N, C, H, W] of the side that the taps shift over, and of the other."""

    gathered: Size
    linear: Size
    taps: int
    dtype: torch.dtype
    cached: bool  # whether a packed weight can be expected to hold for several calls

    @property
    def products(self) -> int:
        """Multiply-adds."""
        n, channels, height, width = self.linear
        return n * channels * height * width * self.gathered[1] * self.taps

    @property
    def rows(self) -> int:
        """Pixels of the other side."""
        return self.linear[0] * self.linear[2] * self.linear[3]

    def small(self, op: str) -> bool:
        """Whether PyTorch's own takes longer to set up than ours to run."""
        packs_little = op == "weight_grad" or self.rows >= FEW_ROWS or self.products <= FEW_WEIGHTS * self.rows
        return self.products <= FEW_PRODUCTS and packs_little


def sides(call: Call) -> Sides:
    """The `Sides` of a call."""
    x, g = _stored(call.a), call.geometry
    gathered: Size
    linear: Size
    if call.op == "weight_grad":
        gathered, linear = x.shape, _stored(call.b).shape
    else:
        if call.op == "conv":
            gathered, linear = x.shape, (x.shape[0], call.b.shape[0], *call.size)
        else:
            gathered, linear = (x.shape[0], call.b.shape[1], *call.size), x.shape
    return Sides(gathered, linear, g.kernel[0] * g.kernel[1], x.dtype, call.stays)


class Rates(NamedTuple):
    """Of one thread: GFLOP/s of float32 FMA and of `vdpbf16ps` in registers (0 where there is none), GB/s, read and
    written, of a copy past the caches."""

    fma: float
    vdpbf16ps: float
    copy: float


class CPUBackend(Backend):
    """float32, bfloat16 and float16 tensors [N, C, H, W] on the CPU, channels_last or contiguous; arithmetic and
    per-channel vectors are float32."""

    name = "cpu"
    casts_weights = True

    def __init__(self) -> None:
        self._only_passes = extension_name() == "_cpu_default"
        self._processor_has_amx = torch.cpu._is_amx_tile_supported()
        self.amx = False  # whether the library multiplies on AMX tiles

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
        self.amx = not self._only_passes and self.contractions.amx_usable()

    def why_not(self, device_type: str, dtype: torch.dtype) -> str | None:
        if device_type != "cpu":
            return f"it runs on the device type 'cpu', not {device_type!r}"
        if dtype not in DTYPES:
            return f"it takes {', '.join(map(_name, DTYPES))}, not {_name(dtype)}"
        return None

    @functools.cached_property
    def rates(self) -> Rates:
        """Of this processor, measured once, in milliseconds."""
        return Rates(*torch.ops.fastdcgan_cpu.rates())

    # --- contractions ---

    @property
    def contractions(self) -> Any:
        return getattr(torch.ops, NAMESPACE)

    def settings(self) -> tuple:
        return (torch.get_num_threads(), self.amx and _less_precision())

    def algorithms(self, op: str) -> Sequence[Algorithm]:
        return [
            Algorithm(
                f"cpu {name}",
                functools.partial(self._why_not_run, name),
                functools.partial(self._run, name),
                why_last=functools.partial(self._why_last, name),
                least_ms=functools.partial(self._least_ms, name),
            )
            for name in _NAMES
        ]

    def _least_ms(self, name: str, call: Call) -> float:
        return 0.0 if name in _WINOGRAD else self.direct_ms(call)

    def direct_ms(self, call: Call) -> float:
        # Fewer bits multiply faster; by how much is not known.
        less = _less_precision() or _less_precision("conv")
        if less or _stored(call.a).dtype != torch.float32 or call.geometry.groups != 1:
            return 0.0
        s = sides(call)
        reads = call.geometry.reads((s.gathered[2], s.gathered[3]), (s.linear[2], s.linear[3]))
        products = s.linear[0] * s.linear[1] * s.gathered[1] * reads
        return 2 * products / (1e6 * self.rates.fma * torch.get_num_threads())

    def _why_not_run(self, name: str, call: Call) -> str | None:
        """Why an algorithm can't run a call, or None."""
        x, other = _stored(call.a), _stored(call.b) if call.op == "weight_grad" else call.b
        if self._only_passes:
            return "the contractions of csrc/cpu need AVX2"
        if call.geometry.groups != 1:
            return f"the contractions of csrc/cpu have no groups, and here are {call.geometry.groups}"
        for t in (x, other):
            one_dtype = t.dtype == x.dtype or (call.op != "weight_grad" and t.dtype == torch.float32)
            if t.numel() == 0 or not one_dtype:
                return f"the contractions of csrc/cpu take elements of one dtype, not {list(t.shape)} of {t.dtype}"
        if name == "split_bf16" and not (x.dtype == torch.float32 and self.amx and _less_precision()):
            return "it is for float32 on AMX tiles, where torch.set_float32_matmul_precision is not 'highest'"
        if name not in (*_AMX, *_DOT, "unpacked") and x.dtype == torch.bfloat16 and self.amx:
            return "bfloat16 is multiplied on AMX tiles"
        if name == "unpacked" and (rows := sides(call).rows) > MOST_ROWS:
            return f"it is for few pixels, and here are {rows}"
        g, channels = call.geometry, (x.shape[1], other.shape[0 if call.op == "conv" else 1])
        terms = channels[0] * math.prod(g.kernel) // (1 if call.op == "conv" else math.prod(g.stride))
        if name == "winograd_4x4" and call.op != "weight_grad" and terms < FEWEST_TERMS:
            return f"its rounding is more than that of sums of {terms} terms"
        if name not in self.contractions.algorithms(
            call.op, *channels, g.kernel, g.stride, g.dilation, x.dtype, call.epilogue.kind == "stats"
        ):
            return f"it is not for such a {call.op}"
        return None

    def _why_last(self, name: str, call: Call) -> str | None:
        """Why another algorithm is likely to be faster, or None."""
        if name in ("amx_col2im", "amx", "split_bf16"):
            return None if _in_channels_last(call) else "it is channels_last, and these tensors are not"
        if name in _DOT and self.amx:
            return "AMX tiles are faster"
        if name in _DOT and self.rates.vdpbf16ps < LEAST_DOT_RATE * self.rates.fma:
            return "vdpbf16ps is hardly faster than FMA here"
        s = sides(call)
        if name not in _WINOGRAD and s.small(call.op):
            return None
        if name == "unpacked":  # which takes weights and their gradients in either format
            large = s.products >= LEAST_UNPACKED * s.rows
            return None if large and not s.cached else "packing so small a weight, or once for many calls, costs little"
        if not _in_channels_last(call):
            return "the contractions of csrc/cpu are channels_last, and these tensors are not"
        if name == "winograd_4x4" and s.taps % 9 != 0:
            return "tiles of 2x2 outputs round less"
        if name in _WINOGRAD:
            return self._why_not_filter(call.op, s)
        if self._processor_has_amx and s.dtype == torch.bfloat16:
            return "PyTorch's own multiplies bfloat16 on AMX tiles"
        if s.gathered[1] < FEWEST_CHANNELS:
            return None if s.dtype == torch.float16 else _why_not_image(call.op, s)
        return None if call.op == "weight_grad" else _why_not_gemm(call.op, s)

    def _why_not_filter(self, op: str, s: Sides) -> str | None:
        if min(s.gathered[1], s.linear[1]) < FEWEST_CHANNELS:
            return f"{s.gathered[1]} and {s.linear[1]} channels are few"
        if s.dtype == torch.bfloat16 and (self._processor_has_amx or self.amx):
            return "bfloat16 is faster on AMX tiles"
        side = 4 if s.taps % 9 == 0 else 2
        tiles = s.linear[0] * -(-s.linear[2] // side) * -(-s.linear[3] // side)
        fewest = FEWEST_SUMMED_TILES if op == "weight_grad" else FEWEST_CACHED_TILES if s.cached else FEWEST_TILES
        fewest = FEWEST_LARGE_TILES if side == 4 else fewest
        return None if tiles >= fewest else f"{tiles} tiles are few"

    def prefers_channels_last(self, blocks: Sequence[Block], weights: Sequence[Tensor], x: Tensor) -> bool:
        if self._only_passes or any(map(says_channels_last, (x, *weights))):
            return False
        if self._processor_has_amx and x.dtype == torch.bfloat16 and not self.amx:
            return False
        # Whole nets, whose ends are images, noise or logits: converting those costs little.
        size = (x.shape[2], x.shape[3])
        if x.shape[1] >= FEWEST_CHANNELS and size != (1, 1):
            return False
        for block in blocks:
            size = block.output_size(*size)
        return weights[-1].shape[1 if blocks[-1].transposed else 0] < FEWEST_CHANNELS or size == (1, 1)

    def _run(self, name: str, call: Call, tile: None) -> Any:
        g, x = call.geometry, self.finished(call.a)
        if call.op == "weight_grad":
            dy = self.finished(call.b)
            contiguous = call.contiguous or memory_format(x) == torch.contiguous_format
            dw = self.contractions.weight_grad(x, dy, g.kernel, g.stride, g.padding, g.dilation, name, contiguous)
            return dw if call.contiguous else dw.contiguous(memory_format=memory_format(x))
        e = call.epilogue
        fused, act, slope, groups = None, 0, 0.0, 0
        if e.kind == "stats":
            groups = e.stat_groups
        elif e.kind == "bias":
            assert e.coef is not None
            fused = e.coef.to(torch.float32)
        elif e.kind == "activate" and e.coef is not None and e.coef.shape[1] == 1:
            fused, act, slope = e.coef, ACTIVATIONS[e.act].id, e.slope
        contract = self.contractions.conv if call.op == "conv" else self.contractions.conv_transpose
        out, stats = contract(
            x, call.b, g.stride, g.padding, g.dilation, call.size, fused, act, slope, groups, name, call.stays
        )  # fmt: skip
        if not _in_channels_last(call):
            out = out.contiguous()
        if fused is None and groups == 0 and e.kind != "none":
            return self.apply_epilogue(out, e)
        return out, stats

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
        return torch.ops.fastdcgan_cpu.grad_stats(da, y, coef, ACTIVATIONS[act].id, slope)

    def grad_stats_(self, da: Tensor, y: Tensor, coef: Tensor, act: str, slope: float) -> tuple[Tensor, Tensor]:
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
        if mean.dtype == var.dtype and mean.dtype in DTYPES and mean.is_contiguous() and var.is_contiguous():
            torch.ops.fastdcgan_cpu.update_running_(mean, var, stats, shift, factor, momentum)
        else:
            super().update_running(mean, var, stats, shift, factor, momentum)

    def grad_coefficients(self, sums: Tensor, coef: Tensor, count: int) -> Tensor:
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

    def update_all_running(self, updates: Sequence[Update]) -> None:
        means, variances, stats, shifts, factors, momenta = zip(*updates, strict=True)
        plain = all(t.dtype in DTYPES and t.is_contiguous() for t in (*means, *variances))
        if not plain or any(factor is not None for factor in factors):
            super().update_all_running(updates)
            return
        none = means[0].new_empty(0)
        given = [none if shift is None else shift for shift in shifts]
        torch.ops.fastdcgan_cpu.update_all_running_(means, variances, stats, given, momenta)


def _less_precision(op: str = "matmul") -> bool:
    """Whether float32 products of "matmul", or of PyTorch's "conv", may be of less precision: by
    `torch.set_float32_matmul_precision("high")`, which PyTorch keeps here as "tf32", or "medium": "bf16". (What gets
    that setting raises where PyTorch's backends differ in it; `torch.backends.mkldnn.matmul.fp32_precision` asks the
    same in five times the time.)"""
    return torch._C._get_fp32_precision_getter("mkldnn", op) in ("tf32", "bf16")


def _why_not_gemm(op: str, s: Sides) -> str | None:
    pixels, wide = s.linear[2] * s.linear[3], s.dtype == torch.float32
    if wide and pixels > MOST_PIXELS:
        return f"PyTorch's own is as fast for {s.linear[2]}x{s.linear[3]} pixels in float32"
    fewest = FEWEST_WIDE_ROWS if wide else FEWEST_ROWS
    if s.cached:
        fewest = FEWEST_WIDE_CACHED if wide and op == "conv" else 1
    elif pixels == 1:
        fewest = 1 if op == "conv" else FEWEST_PROJECTED
    if s.linear[0] * pixels < fewest:
        return f"PyTorch's own is faster for {s.linear[0]} times {pixels} pixels"
    return None


def _why_not_image(op: str, s: Sides) -> str | None:
    """Of few channels of the gathered side."""
    image = s.gathered[1] <= MOST_IMAGE_CHANNELS and s.gathered[1] * s.taps <= MOST_IMAGE_DEPTH
    if op != "conv_transpose" and not image:
        return f"PyTorch's own is faster for {s.gathered[1]} channels"
    if image and (s.taps == 1 or s.linear[2] * s.linear[3] == 1):
        return f"PyTorch's own is faster between {s.gathered[1]} channels and one pixel"
    if image and s.dtype == torch.float32 and s.linear[1] < FEWEST_FEATURES:
        return f"PyTorch's own is faster between {s.gathered[1]} and {s.linear[1]} channels"
    return None
