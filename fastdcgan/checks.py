"""All validation: TypeError or ValueError with the offending value and the expected one, before anything is written."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdcgan.activations import ACTIVATIONS
from fastdcgan.geometry import Geometry, Pair
from fastdcgan.spec import Block, BlockTensors, of_block


def check_chain(
    blocks: Sequence[Block],
    stat_groups: int,
    x: Tensor,
    tensors: Sequence[Tensor | None],
    casts_weights: bool = False,
) -> None:
    """Raise TypeError or ValueError unless the chain can run on `x` [N, C, H, W] with its blocks' tensors.

    `casts_weights`: whether float32 weights go with any `x`.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a torch.Tensor as input, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"expected 4D input [N, C, H, W], got {x.dim()}D input of shape {list(x.shape)}")
    if x.shape[0] % stat_groups:
        raise ValueError(f"stat_groups={stat_groups} must divide the batch size, got a batch of {x.shape[0]}")
    channels, size = x.shape[1], (x.shape[2], x.shape[3])
    for i, block in enumerate(blocks):
        t = of_block(tensors, i)
        where = f"block {i}" if len(blocks) > 1 else "the block"
        _check_tensors(where, block, t, x, casts_weights)
        channels, size = _check_shapes(where, block, t, channels, size, x)
        norm = block.norm
        if norm is not None and norm.batch_stats and norm.process_group is None and x.shape[0] > 0:
            values = x.shape[0] // norm.groups(stat_groups, x.shape[0]) * size[0] * size[1]
            if values == 1:
                raise ValueError(
                    f"expected more than 1 value per channel when training, got an output of "
                    f"{[x.shape[0], channels, *size]} with stat_groups={stat_groups} at {where}"
                )


def _check_tensors(where: str, block: Block, t: BlockTensors, x: Tensor, casts_weights: bool) -> None:
    dtype = x.dtype if t.weight is None else t.weight.dtype
    if dtype != x.dtype and not (casts_weights and dtype == torch.float32):
        raise TypeError(
            f"input and weight must have one dtype, got an input of {x.dtype} and a weight of {dtype} "
            f"at {where}: cast the input, or run under torch.autocast"
        )
    if t.slope is not None and t.slope.dtype != x.dtype:
        raise TypeError(f"PReLU's weight of {where} must have the dtype of the input, {x.dtype}, got {t.slope.dtype}")
    check_values(f"the input of {where}", x)
    for name, tensor in zip(t._fields, t, strict=True):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} of {where} must be a torch.Tensor or None, got {type(tensor).__name__}")
        check_values(f"{name} of {where}", tensor)
        if tensor.device != x.device:
            raise ValueError(f"{name} of {where} is on {tensor.device}, expected {x.device}, where the input is")
    if block.norm is not None and not (block.norm.eps > 0 or (block.norm.eps == 0 and not block.norm.batch_stats)):
        least = "positive with batch statistics" if block.norm.batch_stats else "0 or more"
        raise ValueError(f"eps of {where} must be {least}, got {block.norm.eps}")
    if block.norm is not None and not block.norm.batch_stats and (t.running_mean is None or t.running_var is None):
        raise ValueError(f"{where} is asked to use running statistics, but running_mean or running_var is None")


def check_values(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is dense and of floating-point numbers."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "a nested one" if tensor.is_nested else f"one of layout {tensor.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {kind}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")


def _check_shapes(
    where: str, block: Block, t: BlockTensors, channels: int, size: tuple[int, int], x: Tensor
) -> tuple[int, tuple[int, int]]:
    shape = (channels, channels) if t.weight is None else t.weight.shape
    outputs, expected = shape[0], shape[1] * block.geometry.groups
    if block.transposed:
        outputs, expected = expected, outputs
    if channels != expected:
        source = f"the input of shape {list(x.shape)}" if where in ("the block", "block 0") else "the block before"
        raise ValueError(f"{where} expects {expected} input channels, got {channels} from {source}")
    for name, vector in zip(t._fields[1:], t[1:], strict=True):
        if vector is not None and tuple(vector.shape) not in ((outputs,), (1,) if name == "slope" else ()):
            raise ValueError(f"{name} of {where} must have shape [{outputs}], got {list(vector.shape)}")
    out_size = block.output_size(*size)
    if min(out_size) < 1 or min(size) < 1:
        raise ValueError(
            f"the input of {where}, {size[0]}x{size[1]}, is too small for kernel {block.geometry.kernel}, "
            f"padding {block.geometry.padding}, dilation {block.geometry.dilation}: output would be "
            f"{out_size[0]}x{out_size[1]}"
        )
    return outputs, out_size


def check_activation(name: str) -> None:
    """Raise ValueError for a name that is not in the activation table."""
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: expected one of {', '.join(map(repr, ACTIVATIONS))}")


def check_pair(name: str, value: object, minimum: int) -> None:
    """Raise TypeError or ValueError unless `value` is an int, or two ints, of at least `minimum` and at most `MOST`."""
    values = value if isinstance(value, (tuple, list)) else (value,)
    if len(values) not in (1, 2) or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise TypeError(f"{name} must be an int or two ints, got {value!r}")
    if any(v < minimum for v in values):
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}")
    if any(v > MOST for v in values):
        raise ValueError(f"{name} must be at most {MOST}, got {value!r}")


def check_output_padding(output_padding: Pair, geometry: Geometry) -> None:
    """Raise ValueError unless it is smaller than the stride or the dilation, as PyTorch asks."""
    for extra, stride, dilation in zip(output_padding, geometry.stride, geometry.dilation, strict=True):
        if extra >= max(stride, dilation):
            raise ValueError(
                f"output_padding must be smaller than stride or dilation, got output_padding={output_padding}, "
                f"stride={geometry.stride}, dilation={geometry.dilation}"
            )


def check_weight(weight: Tensor, groups: int, transposed: bool) -> None:
    """Raise TypeError or ValueError unless `weight` is a 4-d floating-point tensor whose channels `groups` divides."""
    if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point:
        raise TypeError(
            f"weight must be a floating-point tensor, got {getattr(weight, 'dtype', type(weight).__name__)}"
        )
    if weight.dim() != 4:
        layout = "[Ci, Co/groups, kh, kw]" if transposed else "[Co, Ci/groups, kh, kw]"
        raise ValueError(f"weight must have 4 dimensions {layout}, got shape {list(weight.shape)}")
    if not isinstance(groups, int) or isinstance(groups, bool):
        raise TypeError(f"groups must be an int, got {groups!r}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups must divide the weight's {weight.shape[0]} channels, got groups={groups}")


def check_norm(eps: object, momentum: object) -> None:
    """Raise TypeError or ValueError for numbers that no normalisation has; `momentum` may be None, for an average."""
    FINITE.check("eps", eps)
    if momentum is not None:
        FINITE.check("momentum", momentum)


def check_boundaries(boundaries: str) -> None:
    """Raise ValueError for a choice that the plan does not have."""
    if boundaries not in ("auto", "finished", "deferred"):
        raise ValueError(f"boundaries must be 'auto', 'finished' or 'deferred', got {boundaries!r}")


def check_stat_groups(stat_groups: int) -> None:
    """Raise TypeError or ValueError unless `stat_groups` is a positive int."""
    if not isinstance(stat_groups, (int, torch.SymInt)) or isinstance(stat_groups, bool):
        raise TypeError(f"stat_groups must be an int, got {type(stat_groups).__name__}")
    if stat_groups < 1:
        raise ValueError(f"stat_groups must be at least 1, got {stat_groups}")


def check_module(model: object) -> None:
    """Raise TypeError unless `model` is an `nn.Module`, ValueError if a module in it contains itself."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    _check_tree(model, "", {}, set())


def _check_tree(module: nn.Module, path: str, above: dict[nn.Module, str], seen: set[nn.Module]) -> None:
    if module in above:
        raise ValueError(f"module {path!r} is {above[module] or 'the model'!r} itself: a module can't contain itself")
    if module in seen:
        return
    seen.add(module)
    above[module] = path
    for name, child in module._modules.items():
        if child is not None:
            _check_tree(child, f"{path}.{name}" if path else name, above, seen)
    del above[module]


def check_conv(conv: nn.Conv2d | nn.ConvTranspose2d) -> None:
    """Raise TypeError or ValueError for numbers that no convolution has; PyTorch's modules wait for the call."""
    least = {"kernel_size": 1, "stride": 1, "padding": 0, "output_padding": 0, "dilation": 1}
    for name, minimum in least.items():
        value = getattr(conv, name)
        if not isinstance(value, str):
            check_pair(name, value, minimum)


MOST = 2**31 - 1  # of what is counted, where nothing else limits it


@dataclass(frozen=True)
class Range:
    """The numbers that a setting takes: whole ones, or finite ones with `whole=False`, between limits that belong to
    them (`least`, `most`) or not (`above`, `below`)."""

    least: float | None = None
    most: float | None = MOST
    above: float | None = None
    below: float | None = None
    whole: bool = True

    def check(self, name: str, value: object) -> None:
        """Raise TypeError for what is no such number, ValueError for one outside of the limits."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            raise TypeError(f"{name} is {value!r}: expected a {'whole ' if self.whole else ''}number")
        limits = {
            "at least": (self.least, operator.ge),
            "more than": (self.above, operator.gt),
            "at most": (self.most, operator.le),
            "below": (self.below, operator.lt),
        }
        given = {words: (limit, holds) for words, (limit, holds) in limits.items() if limit is not None}
        if not (-math.inf < value < math.inf and all(holds(value, limit) for limit, holds in given.values())):
            expected = [
                f"{words} {limit:g}" if isinstance(limit, float) else f"{words} {limit}"
                for words, (limit, _) in given.items()
            ]
            raise ValueError(f"{name} is {value}: expected {' and '.join(expected) or 'a finite number'}")


FINITE = Range(most=None, whole=False)
SEED = Range(0, 2**32 - 1)  # what PyTorch's, NumPy's and scikit-learn's generators have in common
COUNT = Range(1)
AMOUNT = Range(0, 1e12, whole=False)  # a weight or a time


def printable(text: object) -> str:
    """`text` in one line, safe for a terminal: what is not printable, such as the escape codes and line breaks that a
    file's name may hold, is written as Python writes it in a string."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
