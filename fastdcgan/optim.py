"""Adam over all parameters in one pass over memory.

A step reads the gradient and reads and writes the weight and both moments: 28 bytes a float32 parameter, and nothing
else counts. `FusedAdam` does that in one launch for all tensors of a param group, and in the same pass keeps a bfloat16
or float16 copy of the weights up to date for whoever computes with it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import ParamsT

from fastdcgan.dispatch import training_ops

_LOW = (torch.bfloat16, torch.float16)
_GRADS = (torch.float32, *_LOW)


class _Counter(NamedTuple):
    """A parameter's step on a GPU: one counter for each chunk, so that no two blocks share one."""

    chunks: Tensor
    step: Tensor  # what `state["step"]` is: a view of the first
    version: int  # the version of `step`: another one means that somebody wrote to it


class FusedAdam(torch.optim.Adam):
    """`torch.optim.Adam` (and, with `decoupled_weight_decay`, `torch.optim.AdamW`): the same arguments, arithmetic and
    state_dict, which either loads from the other's.

        opt = fastdcgan.optim.FusedAdam(model.parameters(), lr=2e-4, betas=(0.5, 0.999))

    Kingma and Ba, "Adam: A Method for Stochastic Optimization" (2015), algorithm 1; Loshchilov and Hutter, "Decoupled
    Weight Decay Regularization" (2019), algorithm 2.

    Parameters in bfloat16 or float16 get float32 moments and a float32 master copy, `state[p]["master"]`, which is what
    is updated; the parameter is that, rounded. Where it isn't, somebody else has written to it (loaded weights, clamped
    them, put an average back), and a step goes on from what it finds there, element by element, however it was written.
    (Such a state_dict loads into `torch.optim.Adam`, which rounds the moments and ignores the master.) On a GPU, set
    `state[p]["step"]` in place or load it: what is written through its `.data` is not seen.

    Args:
        params: an iterable of parameters or of param groups, real and dense, on any device.
        lr: a float or a tensor of one element; where a CUDA graph is to see new values, a tensor on the GPU.
        betas, eps, weight_decay, maximize, capturable: as in `torch.optim.Adam`.
        amsgrad: as there; such groups are updated by PyTorch's own fused Adam.
        decoupled_weight_decay: shrink the weights themselves (AdamW) instead of adding to the gradients.
        copies: float32 parameter -> bfloat16 or float16 tensor of its shape, which is given the parameter's new value
            in the pass that computes it. `write_copies` does that between steps, say after loading weights.

    What is not covered (float64, amsgrad, tensors with gaps, devices and machines without the extension) is updated by
    PyTorch's own fused Adam; `explain()` says what runs where. It takes part in `torch.amp.GradScaler` as PyTorch's
    fused Adam does: it unscales the gradients itself, and skips the step if one was not finite.

    Raises ValueError or TypeError for arguments that don't fit, among them complex parameters; `step` raises TypeError
    for sparse gradients, and RuntimeError in a CUDA graph's capture without `capturable=True`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        decoupled_weight_decay: bool = False,
        copies: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        self._counters: dict[Tensor, _Counter] = {}
        self._copies: dict[Tensor, Tensor] = {}
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            capturable=capturable,
            fused=True,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        if copies is not None and not isinstance(copies, Mapping):
            raise TypeError(f"copies is {copies!r}: expected a dict from float32 parameters to 16-bit tensors")
        self._copies = dict(copies or {})
        known = set(chain.from_iterable(group["params"] for group in self.param_groups))
        for p, copy in self._copies.items():
            _check_copy(p, copy, p in known)
        self.write_copies()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if not p.is_floating_point():
                del self.param_groups[-1]
                raise TypeError(f"FusedAdam takes real floating-point parameters, got one of {p.dtype}")

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure`, if given, computes the loss again and its result is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            ready = [p for p in group["params"] if p.grad is not None]
            _check_capture(group, ready)
            batches: dict[tuple[torch.device, bool, bool], list[Tensor]] = defaultdict(list)
            for p in ready:
                if p.grad.layout != torch.strided:
                    raise TypeError(f"FusedAdam takes dense gradients, got one of layout {p.grad.layout}")
                self._prepare(p, group)
                batches[p.device, p.dtype in _LOW, self._why_torch(p, group) is None].append(p)
            for (device, _, covered), params in batches.items():
                scaler = (self._scalar("grad_scale", device), self._scalar("found_inf", device))
                (self._by_kernel if covered else self._by_torch)(params, group, *scaler)
                for p in params:
                    if p in self._copies and not (covered and _takes(self._copies[p], p)):
                        self._copies[p].copy_(p)
            # Both write behind autograd's back, which may have saved the parameters for a backward.
            torch.autograd.graph.increment_version([*ready, *(self._copies[p] for p in ready if p in self._copies)])
        return loss

    def write_copies(self) -> None:
        """Give every tensor of `copies` its parameter's value as it is now."""
        for p, copy in self._copies.items():
            copy.copy_(p.detach())

    def prepare(self) -> None:
        """Make the state of all parameters now: a CUDA graph's capture can make none that lasts."""
        for group in self.param_groups:
            for p in group["params"]:
                self._prepare(p, group)
                if p.device.type in training_ops.ADAM_CHUNK and self._why_torch(p, group) is None:
                    self._counter(p)

    def ready(self) -> bool:
        """Whether `prepare` would change nothing: a captured step still reads and writes this optimiser's state."""
        return all(
            bool(self.state[p])
            and (
                p.device.type not in training_ops.ADAM_CHUNK
                or self._why_torch(p, group) is not None
                or self._current(p) is not None
            )
            for group in self.param_groups
            for p in group["params"]
        )

    def explain(self) -> str:
        """What updates the parameters: one line for each param group, device, dtype and reason."""
        found: dict[tuple, list[Tensor]] = defaultdict(list)
        for i, group in enumerate(self.param_groups):
            for p in group["params"]:
                found[i, p.device, p.dtype, self._why_torch(p, group)].append(p)
        lines = []
        for (i, device, dtype, why), params in found.items():
            what = f"{len(params)} tensors, {sum(p.numel() for p in params)} values, {dtype} on {device}"
            lines.append(f"group {i}: {what}: {'one fused pass' if why is None else f'by torch ({why})'}")
        return "\n".join(lines)

    # --- state ---

    def _prepare(self, p: Tensor, group: dict[str, Any]) -> None:
        """Make the state of a parameter that has none, and have it lie in memory as the parameter does."""
        state = self.state[p]
        dtype = torch.float32 if p.dtype in _LOW else p.dtype
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        if state["step"].device != p.device:  # p was moved; and torch.optim.Adam without `fused` keeps it on the CPU
            state.update({name: value.to(p.device) for name, value in state.items()})
            state["step"] = state["step"].float()
        names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(p, dtype=dtype)
        if p.dtype in _LOW:
            names = (*names, "master")
            if "master" not in state:
                state["master"] = p.detach().to(dtype, copy=True)
        else:
            state.pop("master", None)  # of when it was bfloat16 or float16
        for name in names:
            if state[name].dtype != dtype or not _fits(state[name], p):
                state[name] = _laid_as(state[name], p, (dtype,))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class, or of `torch.optim.Adam` or `AdamW` with any of their settings."""
        groups = [{**group, "fused": True, "foreach": None} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})
        # It has rounded everything to the parameter's dtype.
        ids = chain.from_iterable(group["params"] for group in groups)
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, p in zip(ids, params, strict=True):
            saved = state_dict["state"].get(index, {})
            for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master"):
                if p.dtype in _LOW and name in saved:
                    self.state[p][name] = saved[name].to(p.device, torch.float32, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_copies": self._copies}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._counters = {}
        self._step_supports_amp_scaling = True

    def _scalar(self, name: str, device: torch.device) -> Tensor | None:
        """`grad_scale` or `found_inf`, where a GradScaler has set it."""
        value = getattr(self, name, None)
        return None if value is None else value.to(device, non_blocking=True)

    # --- the update ---

    def _why_torch(self, p: Tensor, group: dict[str, Any]) -> str | None:
        """None if the kernel updates a parameter, else why PyTorch does."""
        if p.dtype not in _GRADS:
            return f"the kernel takes float32, bfloat16 and float16, not {p.dtype}"
        if group["amsgrad"]:
            return "the kernel has no amsgrad"
        if not _dense(p):
            return f"the kernel takes tensors without gaps, not strides {p.stride()}"
        return training_ops.why_not(p.device.type)

    def _by_kernel(
        self, params: list[Tensor], group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        device = params[0].device
        grads = [_laid_as(cast(Tensor, p.grad), p, _GRADS) for p in params]
        states = [self.state[p] for p in params]
        nothing = torch.empty(0, device=device)
        low = params[0].dtype in _LOW
        copies = params if low else [c if _takes(c := self._copies.get(p, nothing), p) else nothing for p in params]
        lr, by_chunk = group["lr"], device.type in training_ops.ADAM_CHUNK
        steps = [self._counter(p) if by_chunk else state["step"] for p, state in zip(params, states, strict=True)]
        training_ops.operators(device.type).adam_(
            [state["master"] for state in states] if low else params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            copies,
            steps,
            0.0 if isinstance(lr, Tensor) else float(lr),
            lr.to(device, torch.float32).reshape(()) if isinstance(lr, Tensor) else None,
            *map(float, group["betas"]),
            float(group["eps"]),
            float(group["weight_decay"]),
            group["decoupled_weight_decay"],
            group["maximize"],
            low,
            grad_scale,
            found_inf,
        )
        if grad_scale is not None:  # the kernel has unscaled them where they lie
            for p, grad in zip(params, grads, strict=True):
                if grad is not p.grad:
                    cast(Tensor, p.grad).copy_(grad)

    def _current(self, p: Tensor) -> _Counter | None:
        """A parameter's counters, unless `state["step"]` is no longer what they began with."""
        counter, step = self._counters.get(p), self.state[p]["step"]
        stale = counter is None or counter.step is not step or counter.version != step._version
        return None if stale else counter

    def _counter(self, p: Tensor) -> Tensor:
        """The step counters of a parameter's chunks, made anew where they are stale."""
        counter = self._current(p)
        if counter is None:
            if p.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "FusedAdam: state was made or changed since the last step: prepare() before capturing"
                )
            chunk = training_ops.ADAM_CHUNK[p.device.type]
            chunks = self.state[p]["step"].detach().reshape(1).repeat(max(1, -(-p.numel() // chunk)))
            self.state[p]["step"] = step = chunks[0]
            counter = self._counters[p] = _Counter(chunks, step, step._version)
        return counter.chunks

    def _by_torch(
        self, params: list[Tensor], group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        # It takes tensors without gaps that all lie as the parameter does, without looking.
        states = [self.state[p] for p in params]
        weights = [_laid_as(state.get("master", p), p) for p, state in zip(params, states, strict=True)]
        for p, weight in zip(params, weights, strict=True):
            if p.dtype in _LOW:  # a master follows what somebody else has written since, as the kernels have it do
                weight.copy_(torch.where(weight.to(p.dtype) == p, weight, p))
        grads = [_laid_as(cast(Tensor, p.grad), p, (w.dtype,)) for p, w in zip(params, weights, strict=True)]
        adam(
            weights,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
            [state["step"] for state in states],
            fused=True,
            grad_scale=grad_scale,
            found_inf=found_inf,
            amsgrad=group["amsgrad"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            capturable=group["capturable"],
            decoupled_weight_decay=group["decoupled_weight_decay"],
        )
        for p, weight, grad in zip(params, weights, grads, strict=True):
            if weight is not p:
                p.copy_(weight)
            if grad_scale is not None and grad is not p.grad:  # it has unscaled them where they lie
                cast(Tensor, p.grad).copy_(grad)


def _dense(t: Tensor) -> bool:
    return t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))


def _lie_alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have the same order in memory."""
    if a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous()):
        return True
    both = a.dim() == b.dim() == 4
    return both and all(t.is_contiguous(memory_format=torch.channels_last) for t in (a, b))


def _fits(t: Tensor, p: Tensor) -> bool:
    """Whether `t`, of a parameter's shape, lies as it does, or is contiguous where the parameter has gaps."""
    if t.shape != p.shape:
        raise ValueError(
            f"a gradient or state of shape {list(t.shape)} for a parameter of shape {list(p.shape)}: make a new "
            f"FusedAdam where the shape of a parameter was changed"
        )
    return _lie_alike(t, p) if _dense(p) else t.is_contiguous()


def _takes(copy: Tensor, p: Tensor) -> bool:
    """Whether a kernel that runs over a float32 parameter can write its copy along."""
    if copy.dtype not in _LOW or p.dtype != torch.float32:
        return False
    return copy.shape == p.shape and copy.device == p.device and _lie_alike(copy, p)


def _laid_as(t: Tensor, p: Tensor, dtypes: Sequence[torch.dtype] | None = None) -> Tensor:
    """`t` without gaps, in the parameter's order where that has none, and in the first of `dtypes` if it is in none of
    them; itself where it is so already."""
    dtype = t.dtype if dtypes is None or t.dtype in dtypes else dtypes[0]
    if t.dtype == dtype and _fits(t, p):
        return t
    order = torch.preserve_format if _dense(p) else torch.contiguous_format
    return torch.empty_like(p, dtype=dtype, memory_format=order).copy_(t)


def _check_copy(p: Tensor, copy: Tensor, known: bool) -> None:
    if not isinstance(p, Tensor) or not isinstance(copy, Tensor):
        raise TypeError(f"copies are tensors of parameters, got {type(copy).__name__} of {type(p).__name__}")
    if not known:
        raise ValueError(f"copies has a tensor {list(p.shape)} that is none of the parameters")
    if p.dtype != torch.float32 or copy.dtype not in _LOW:
        raise TypeError(f"copies are bfloat16 or float16 of float32 parameters, got {copy.dtype} of {p.dtype}")
    if not _takes(copy, p):
        raise ValueError(
            f"a copy has shape {list(copy.shape)} and strides {copy.stride()} on {copy.device}: expected "
            f"{list(p.shape)} and {p.stride()} on {p.device}"
        )


def _check_capture(group: dict[str, Any], params: list[Tensor]) -> None:
    on_gpu = any(p.is_cuda for p in params)
    if on_gpu and not group["capturable"] and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("FusedAdam.step() in a CUDA graph's capture needs capturable=True")
