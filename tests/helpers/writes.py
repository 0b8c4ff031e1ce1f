"""Every way to change a network's parameters that its optimiser, its fused blocks and its caches are not told of."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from tests.machine import DEVICE

Write = Callable[[nn.Module], None]

# Signed bits as many bytes long, for what knows no 16-bit floats.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def wanted(t: Tensor) -> Tensor:
    """What becomes of a parameter, in memory of its own: numbers that a dtype holds exactly where it holds those."""
    return t.detach() * -2


def _wanted_state(net: nn.Module) -> dict[str, Tensor]:
    return {**net.state_dict(), **{name: wanted(p) for name, p in net.named_parameters()}}


def in_place(net: nn.Module) -> None:
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(-2)


def by_copy(net: nn.Module) -> None:
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(wanted(p))


def by_data(net: nn.Module) -> None:
    for p in net.parameters():
        p.data.copy_(wanted(p))


def by_data_of_other_memory(net: nn.Module) -> None:
    for p in net.parameters():
        p.data = wanted(p)


def by_set(net: nn.Module) -> None:
    with torch.no_grad():
        for p in net.parameters():
            p.set_(wanted(p))


def by_load_state_dict(net: nn.Module) -> None:
    net.load_state_dict(_wanted_state(net))


def by_load_state_dict_that_assigns(net: nn.Module) -> None:
    """The parameters are other objects: an optimiser keeps those that it was given."""
    net.load_state_dict(_wanted_state(net), assign=True)


def by_load_state_dict_that_swaps(net: nn.Module) -> None:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        net.load_state_dict(_wanted_state(net))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def by_swap_tensors(net: nn.Module) -> None:
    for p in net.parameters():
        other = nn.Parameter(wanted(p), p.requires_grad)
        other.grad = p.grad
        torch.utils.swap_tensors(p, other)


def by_a_vector(net: nn.Module) -> None:
    """Each parameter is a view of one tensor afterwards."""
    vector_to_parameters(torch.cat([wanted(p).reshape(-1) for p in net.parameters()]), net.parameters())


def in_inference_mode(net: nn.Module) -> None:
    with torch.inference_mode():
        for p in net.parameters():
            p.mul_(-2)


def by_another_dtype_and_back(net: nn.Module) -> None:
    """What moving to another device and back does."""
    dtype = next(net.parameters()).dtype
    net.double()
    in_place(net)
    net.to(dtype)


def by_another_memory_format(net: nn.Module) -> None:
    net.to(memory_format=torch.channels_last)
    in_place(net)
    net.to(memory_format=torch.contiguous_format)


def by_numpy(net: nn.Module) -> None:
    for p in net.parameters():
        bits = _BITS[p.element_size()]
        memory = p.detach().as_strided((p.numel(),), (1,))
        memory.view(bits).numpy()[:] = wanted(memory).view(bits).numpy()


def by_dlpack(net: nn.Module) -> None:
    for p in net.parameters():
        torch.from_dlpack(p.detach()).mul_(-2)


def by_an_average(net: nn.Module) -> None:
    """The average that torch.optim.swa_utils keeps, put back."""
    average = torch.optim.swa_utils.AveragedModel(copy.deepcopy(net))
    in_place(average.module)
    for p, mean in zip(net.parameters(), average.parameters(), strict=True):
        p.data.copy_(mean.detach())


WRITES: dict[str, Write] = {
    write.__name__: write
    for write in (
        in_place, by_copy, by_data, by_data_of_other_memory, by_set, by_load_state_dict,
        by_load_state_dict_that_assigns, by_load_state_dict_that_swaps, by_swap_tensors, by_a_vector,
        in_inference_mode, by_another_dtype_and_back, by_another_memory_format, by_dlpack, by_an_average,
        *([by_numpy] if DEVICE.type == "cpu" else []),
    )
}  # fmt: skip
# For what keeps the objects that it was given, as optimisers do.
KEEPS_OBJECTS = {name: write for name, write in WRITES.items() if write is not by_load_state_dict_that_assigns}
