"""What a chain does on a CPU, recorded as the operators that it called, and run again with no Python in between.

Between small layers Python takes as long as they do (benchmarks/NOTES-CPU.md, "Python between operators"). A tape
(`csrc/cpu/tape`) calls the same operators with the same arguments, so it gives the same bits. Whatever may change them
sets chains apart already (`Chain._key`), or is in the tape's key.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Tensors = list[Tensor | None]

# The kinds of values, as in csrc/cpu/tape/tape_ops.cpp.
_NONE, _SLOT, _INT, _FLOAT, _BOOL, _STRING, _INTS, _FLOATS, _BOOLS, _SLOTS, _INT_TENSOR, _FLOAT_TENSOR = range(12)
_LISTS = {"int": _INTS, "float": _FLOATS, "bool": _BOOLS, "Tensor": _SLOTS}
# Operators get these as the numbers of C++'s enumerations.
_NUMBERS: dict[Any, int] = {
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bfloat16: 15,
    torch.contiguous_format: 0,
    torch.preserve_format: 1,
    torch.channels_last: 2,
}
_NEW, _CALLED = object(), object()  # not yet called; called, and not recorded
_MOST = 64  # of a chain: a momentum, say, may be another at each call


class Tapes:
    """The tapes of a chain, by what sets its calls apart."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Any] = {}  # a tape; None where there can be none

    def run(
        self, key: Hashable, inputs: Sequence[Tensor | None], call: Callable[[], Tensors], is_fixed: Callable[[], bool],
        constants: Iterable[Tensor] = (),
    ) -> Tensors:  # fmt: skip
        """`call()`, which reads the `inputs`, and `constants` that stay what they are: from the second time on, once
        `is_fixed()` says that it will go on to call the same operators, by a tape."""
        ids = [id(t) for t in inputs if t is not None]
        if len(set(ids)) < len(ids):  # the recorder can't tell the places of a tensor apart
            key = (key, *map(ids.index, ids))
        tape = self._found.get(key, _NEW)
        if tape is _NEW and len(self._found) >= _MOST:
            self._found.clear()
        if tape is _NEW or tape is None or (tape is _CALLED and not is_fixed()):
            outputs = call()
            self._found.setdefault(key, _CALLED)  # not before: another thread would record how routes are chosen
            return outputs
        if tape is not _CALLED:
            return tape.run(inputs)
        recorder = _Recorder(inputs, constants)
        with recorder:
            outputs = call()
        self._found[key] = recorder.tape(outputs) if is_fixed() else _CALLED
        return outputs


class _Unknown(Exception):
    """What a tape has no place for."""


class _Recorder(TorchDispatchMode):
    def __init__(self, inputs: Sequence[Tensor | None], constants: Iterable[Tensor]) -> None:
        super().__init__()
        self._constants = list(constants)
        self._kept: list[Tensor | None] = [*inputs, *self._constants]  # by slot, so that no id comes twice
        self._slots = {id(t): slot for slot, t in enumerate(self._kept) if t is not None}
        self._operators: dict[tuple[str, str], int] = {}
        self._floats: list[float] = []
        self._strings: list[str] = []
        self._instructions: list[tuple[int, list[list[int]], list[list[int]]]] | None = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or the compiler is imported, to be told to leave this alone

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():  # nobody else looks at a `Reordered` here
            kwargs = kwargs or {}
            out = func(*args, **kwargs)
            if self._instructions is not None:
                try:
                    self._instructions.append(self._instruction(func, args, kwargs, out))
                except _Unknown:
                    self._instructions = None
        return out

    def _instruction(self, func: Any, args: Sequence, kwargs: dict, out: Any) -> tuple[int, list, list]:
        schema = func._schema
        if schema.name.removeprefix("aten::new_").removeprefix("aten::").startswith("empty") and out.numel():
            raise _Unknown  # who fills it doesn't call operators
        values = []
        for i, argument in enumerate(schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
            values.append(self._value(value, str(argument.type).removeprefix("Optional[").rstrip("]")))
        outs = out if len(schema.returns) > 1 else [out] if schema.returns else []
        results = [self._result(each) for each in outs]
        name = (schema.name, schema.overload_name)
        return self._operators.setdefault(name, len(self._operators)), values, results

    def _value(self, value: Any, kind: str) -> list[int]:
        if value is None:
            return [_NONE]
        if isinstance(value, Tensor):
            return [_SLOT, self._slot(value)]
        if kind.startswith("List["):
            of = _LISTS.get(kind.removeprefix("List["))
            if of is None:
                raise _Unknown
            numbers = [self._slot(v) if of == _SLOTS else self._float(v) if of == _FLOATS else int(v) for v in value]
            return [of, len(numbers), *numbers]
        if isinstance(value, bool):
            return [_BOOL, value]
        if isinstance(value, float) or kind == "float":
            return [_FLOAT_TENSOR if kind == "Tensor" else _FLOAT, self._float(value)]
        if isinstance(value, int):
            return [_INT_TENSOR if kind == "Tensor" else _INT, value]
        if isinstance(value, str):
            self._strings.append(value)
            return [_STRING, len(self._strings) - 1]
        number = _NUMBERS.get(value) if isinstance(value, (torch.dtype, torch.memory_format)) else None
        if number is None:
            raise _Unknown
        return [_INT, number]

    def _float(self, value: float) -> int:
        self._floats.append(value)
        return len(self._floats) - 1

    def _slot(self, t: Tensor) -> int:
        if id(t) not in self._slots:
            raise _Unknown
        return self._slots[id(t)]

    def _result(self, out: Any) -> list[int]:
        if out is None:
            return [_NONE]
        if not all(isinstance(t, Tensor) for t in _listed(out)):
            raise _Unknown
        slots = [self._slots[id(t)] if id(t) in self._slots else self._added(t) for t in _listed(out)]
        return [_SLOT, *slots] if isinstance(out, Tensor) else [_SLOTS, len(slots), *slots]

    def _added(self, t: Tensor) -> int:
        slot = self._slots[id(t)] = len(self._kept)
        self._kept.append(t)
        return slot

    def tape(self, outputs: Tensors) -> Any:
        """What was recorded, for these outputs; None where something has no place in a tape."""
        if self._instructions is None:
            return None
        try:
            with torch._C.DisableTorchFunctionSubclass():
                out = [-1 if t is None else self._slot(t) for t in outputs]
        except _Unknown:
            return None
        last: dict[int, int] = {}
        for i, (_, *values) in enumerate(self._instructions):
            last |= dict.fromkeys((slot for value in chain(*values) for slot in _slots(value)), i)
        code: list[int] = []
        for i, (op, arguments, results) in enumerate(self._instructions):
            dead = [slot for slot, at in last.items() if at == i and slot not in out]
            code += [op, len(arguments), *chain(*arguments), len(results), *chain(*results), len(dead), *dead]
        names = [name for pair in self._operators for name in pair]
        return torch.classes.fastdcgan_cpu.Tape(
            names, code, self._floats, self._strings, self._constants, len(self._kept), out
        )


def _listed(out: Any) -> Sequence[Any]:
    return out if isinstance(out, (list, tuple)) else [out]


def _slots(value: list[int]) -> list[int]:
    """Those that an argument reads, or a result writes."""
    return value[1:] if value[0] == _SLOT else value[2:] if value[0] == _SLOTS else []
