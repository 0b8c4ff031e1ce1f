"""State dicts of the same networks under other names: PyTorch's DCGAN example, and the two forms of projection.

    load_example_state_dict(generator, torch.load("netG.pth", weights_only=True))
    torch.save(example_state_dict(generator), "netG.pth")

All conversions only rename and reshape, so they are exact.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor, nn

from fastdcgan.dcgan.models import PROJECTIONS, Discriminator, Generator
from fastdcgan.dcgan.tensor_files import check_tensor

_CONV = "blocks.project.conv.weight"
_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")  # of DataParallel and torch.compile
_LINEAR = "blocks.project.conv.linear.weight"
_LINEAR_ROWS = "blocks.project.bn.weight"  # its length: channels


def load_example_state_dict(net: Generator | Discriminator, state_dict: Mapping[str, Tensor]) -> None:
    """Load a state_dict of PyTorch's DCGAN example: `main.0.weight`, ... (of DataParallel: `module.main.0.weight`, of
    torch.compile: `_orig_mod.main.0.weight`).

    The example's networks have 64 pixels; networks of other sizes that are written in its style load too.
    Raises RuntimeError, as `load_state_dict` does, for missing or unexpected keys and for other shapes; TypeError for
    what are no tensors by name, ValueError for tensors that are no real, finite numbers. Then `net` stays as it was.
    """
    for key, value in state_dict.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            raise TypeError(f"{key!r} is of type {type(value).__name__}: expected tensors by their names")
    state = {_WRAPPERS.sub("", key): value for key, value in state_dict.items()}
    names = _example_names(net)
    renamed = {names.get(key, key): value for key, value in state.items()}
    state = convert_projection(renamed, _projection(net))
    expected = net.state_dict()
    for name in state.keys() & expected.keys():
        if state[name].shape == expected[name].shape:  # else it is for `load_state_dict` to say
            check_tensor(name, state[name], expected[name])
    net.load_state_dict(state)


def example_state_dict(net: Generator | Discriminator) -> dict[str, Tensor]:
    """The state_dict of `net` under the names of PyTorch's DCGAN example, which loads it with `load_state_dict`."""
    state = convert_projection(net.state_dict(), "conv")
    return {theirs: state[ours] for theirs, ours in _example_names(net).items() if ours in state}


def convert_projection(state_dict: Mapping[str, Tensor], projection: str) -> dict[str, Tensor]:
    """The state_dict of a `Generator` for the other `projection`, "conv" or "linear"; one that fits already is copied.

    A linear weight [channels*base*base, nz] is the transposed convolution's weight [nz, channels, base, base].
    Raises ValueError for an unknown `projection`, and for a linear weight that is none of that shape.
    """
    if projection not in PROJECTIONS:
        raise ValueError(f"projection is {projection!r}: expected one of {', '.join(PROJECTIONS)}")
    state = dict(state_dict)
    if projection == "linear" and _CONV in state:
        weight = state.pop(_CONV)
        state[_LINEAR] = weight.permute(1, 2, 3, 0).reshape(-1, weight.shape[0])
    elif projection == "conv" and _LINEAR in state:
        weight, channels = state.pop(_LINEAR), len(state.get(_LINEAR_ROWS, ()))
        size = math.isqrt(len(weight) // max(channels, 1))
        if weight.dim() != 2 or len(weight) != channels * size * size:
            raise ValueError(
                f"{_LINEAR} has shape {list(weight.shape)} for {channels} channels: expected squares of them"
            )
        state[_CONV] = weight.reshape(channels, size, size, -1).permute(3, 0, 1, 2).contiguous()
    return state


def _projection(net: nn.Module) -> str:
    return net.projection if isinstance(net, Generator) else "conv"


def _example_names(net: Generator | Discriminator) -> dict[str, str]:
    """Key of the example -> key of ours (for a "conv" projection). The example counts the modules of one flat
    `nn.Sequential`: convolution, BatchNorm where there is one, activation."""
    names: dict[str, str] = {}
    index = 0
    for name, block in net.stages():
        names[f"main.{index}.weight"] = f"blocks.{name}.conv.weight"
        index += 1
        bn = getattr(block, "bn", None)
        if bn is not None:
            names |= {f"main.{index}.{key}": f"blocks.{name}.bn.{key}" for key in bn.state_dict()}
            index += 1
        index += 1
    return names
