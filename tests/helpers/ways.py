"""Ways to call convolutions, norms and activations in a forward of a module's own, each with what it may do wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tests.helpers.twins import prepared

SHAPE = (3, 4, 6, 6)


class Net(nn.Module):
    """Layers that keep the size and the channels, called by `way(self, x)`."""

    def __init__(self, way: Callable[[Any, Tensor], Any], **changes: nn.Module) -> None:
        super().__init__()
        self.way = way
        self.conv, self.conv2, self.bn, self.bn2 = conv(), conv(), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.up, self.act, self.drop = nn.ConvTranspose2d(4, 4, 3, 1, 1), nn.Tanh(), nn.Dropout2d(0.5)
        for name, module in changes.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Any:
        return self.way(self, x)


def conv(**geometry: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 4, **{"kernel_size": 3, "padding": 1} | geometry)


def net(way: Callable[[Any, Tensor], Any], **changes: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return prepared(Net(way, **changes))


@dataclass
class Pair:
    """No container that PyTorch knows."""

    first: Tensor
    second: Tensor


class Reversed(torch.autograd.Function):
    """A gradient reversal, which asks no `__torch_function__`."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return -grad


class Convolved(torch.autograd.Function):
    """Calls convolutions itself."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return F.conv_transpose2d(grad, weight, padding=1), torch.nn.grad.conv2d_weight(
            x, weight.shape, grad, padding=1
        )


# --- ways to call ----------------------------------------------------------------------------------------------------


def block(m: Any, x: Tensor) -> Tensor:
    return m.act(m.bn(m.conv(x)))


def named(m: Any, x: Tensor) -> Tensor:
    c = m.conv(x)
    n = m.bn(c)
    a = m.act(n)
    c2 = m.conv2(a)
    n2 = m.bn2(c2)
    return F.avg_pool2d(n2, 2)


def named_and_skipped(m: Any, x: Tensor) -> Tensor:
    c = m.conv(x)
    n = m.bn(c)
    a = m.act(n)
    c2 = m.conv2(a)
    n2 = m.bn2(c2)
    pooled = F.avg_pool2d(m.act(n2), 3, 1, 1)
    return torch.cat([pooled, c, a], 1)


def add_in_place(m: Any, x: Tensor) -> Tensor:
    out = block(m, x)
    out = m.bn2(m.conv2(out))
    out += x
    return torch.tanh_(out)


def add_out(m: Any, x: Tensor) -> Tensor:
    h, room = m.conv(x), torch.zeros(SHAPE, dtype=x.dtype)
    with torch.no_grad():
        torch.add(h, 1, out=room)
    return block(m, room) + h


def used_raw_and_normalised(m: Any, x: Tensor) -> tuple:
    h = m.conv(x)
    n = m.bn(h)
    return n, h, m.act(n)


def asked_again(m: Any, x: Tensor) -> list:
    h = m.conv(x)
    n = m.bn(h)
    r = m.act(n)
    total = r.sum()  # r is computed first, then what it came from
    return [h.mean(), n.mean(), total, n, h]


def dense(m: Any, x: Tensor) -> Tensor:
    h = block(m, x)
    return torch.cat([x, h, m.act(m.bn2(m.conv2(h))), m.up(h)], 1)


def branches(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)
    a, b = m.act(m.bn(h)), torch.sigmoid(h)
    del h
    return a * b


def changed_after(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)
    a = torch.tanh(h)
    h += 1
    return a + h


def clamped_after(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)
    a, b = torch.tanh(h), torch.sigmoid(m.act(h))
    F.relu(h, inplace=True)
    return a + h + b


def tanh_in_place(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)
    a = F.relu(h)
    h.tanh_()
    return a + h


def view_changed(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)
    v, a = h.flatten(2, 3), torch.sigmoid(h)
    v.mul_(2)
    return a + h


def input_changed(m: Any, x: Tensor) -> tuple:
    with torch.no_grad():
        h = m.conv(x)
        F.leaky_relu_(x, 0.2)
        k = m.conv2(x)
        x[:, 0] = 0
        g = m.up(x)
        torch._foreach_mul_([x], 2.0)
    return h, k, g


def weight_changed(m: Any, x: Tensor) -> tuple:
    found = []
    with torch.no_grad():
        for change in (
            lambda w: w.mul_(2),
            lambda w: w.data.add_(1),
            lambda w: w.copy_(w.flip(0)),
            lambda w: torch.mul(w, 0.1, out=w),
            lambda w: nn.init.constant_(tensor=w, val=0.1),
            lambda w: setattr(w, "data", w + 0.01),
            lambda w: w.numpy().fill(0.2),
        ):
            found.append(torch.tanh(m.conv(x)))
            change(m.conv.weight)
    return tuple(found)


def statistics_reset(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = m.bn(m.conv(x))
        m.bn.reset_running_stats()
        return h


def statistics_read(m: Any, x: Tensor) -> Tensor:
    h = m.bn(m.conv(x))
    seen = m.bn.running_mean.clone()
    return m.act(h) + seen[:, None, None]


def statistics_of_nothing(m: Any, x: Tensor) -> Tensor:
    m.bn(m.conv(x))
    return m.conv2(x)


def shared_norm(m: Any, x: Tensor) -> Tensor:
    a, b = m.bn(m.conv(x)), m.bn(m.conv2(x))
    return b - a


def recursion(m: Any, x: Tensor, depth: int = 3) -> Tensor:
    return x if depth == 0 else recursion(m, block(m, x), depth - 1)


def train_and_eval(m: Any, x: Tensor) -> Tensor:
    training = m.bn.training
    a = m.bn(m.bn(m.conv(x)))
    b = m.bn.eval()(m.conv2(x))
    m.bn.train(training)
    return a + b


def dropouts(m: Any, x: Tensor) -> Tensor:
    h = m.drop(block(m, x))
    return F.dropout(m.conv2(h) + torch.randn_like(h), 0.3, m.training) * F.dropout2d(h * 1, 0.2, inplace=True)


def own_weights(m: Any, x: Tensor) -> Tensor:
    h = F.conv2d(x, m.conv.weight * 0.5, padding=(1,))
    h = torch.conv2d(input=h, weight=m.conv2.weight.flip(2), bias=m.conv2.bias, stride=[1, 1], padding=1)
    return F.conv_transpose2d(F.silu(h), m.up.weight.abs(), padding=1, output_padding=(0, 0))


def hyper(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, m.conv(x)[:, :, :3, :3].mean(0, keepdim=True).expand(4, 4, 3, 3), padding=1)


def control_flow(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)
    if h is not None and isinstance(h, Tensor) and torch.is_tensor(h) and h.dtype == x.dtype and h.size(1) == 4:
        h = m.bn(h)
    assert h.shape == x.shape and h.dim() == h.ndim == len(h.shape) == 4 and h.size(dim=-1) == 6 and len(h) == 3
    assert (
        h.device == x.device and not h.is_cuda and h.numel() == x.numel() and h.requires_grad == torch.is_grad_enabled()
    )
    return m.act(h) if h.mean() > 0 else m.conv2(h)


def operators(m: Any, x: Tensor) -> list:
    def h() -> Tensor:
        return m.conv(x)

    i = torch.tensor([0, 2])
    out = [1 - h(), 2 / h(), -h(), abs(h()), h() ** 2, h() @ h(), h() > 0, h() == x, x * h(), h()[0], h()[..., 1:, ::2]]
    out += [h()[i], h()[h() > 0].sum(), h()[None], *h(), next(iter(h())), torch.stack([h(), x]), h().T, h().reshape(-1)]
    out += [
        torch.where(h() > 0, h(), x),
        torch.einsum("nchw,nchw->c", h(), h()),
        torch.add(input=x, other=h(), alpha=2),
    ]
    assert (x in h()) == (x in h() + 0) and len({h(), h()}) == 2 and bool(h().sum() == 0) is False
    value = h().sum()
    assert float(value) == value.item() and f"{value:.3f}" and repr(h()).startswith("tensor([[[[")
    assert h().detach().numpy().shape == SHAPE and copy.copy(h()).shape == SHAPE
    other = h()
    other.mark = other
    other.data = other.data * 2
    assert other.mark is other
    return [*out, other]


def through_functions(m: Any, x: Tensor) -> Tensor:
    return Reversed.apply(m.bn(m.conv(x))) + m.act(Convolved.apply(m.conv2(x), m.up.weight))


def through_sequentials(m: Any, x: Tensor) -> Tensor:
    return m.tail(m.bn(m.conv(x)))


def containers(m: Any, x: Tensor) -> dict:
    h = m.conv(x)
    m.kept = [m.up(x), m.act(h)]
    return {"pair": Pair(m.bn(h), m.conv2(h)), "list": [h, (x, None)]}


def closures(m: Any, x: Tensor) -> Tensor:
    return sum(f(x) for f in [lambda t, c=c: torch.tanh(c(t)) for c in (m.conv, m.conv2, m.up)])  # type: ignore[return-value]


def inner_gradient(m: Any, x: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone()
        feature = m.act(m.conv(x))
        (slope,) = torch.autograd.grad(m.conv2(feature).square().sum(), feature, create_graph=True)
        return m.up(slope)


def tensor_hooks(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)
    r = m.act(h)
    if h.requires_grad:
        h.retain_grad()
        r.register_hook(lambda g: g * 2)
        x.register_hook(lambda g: g + 1)
    return m.conv2(r) + r


def frozen_half_way(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)
    m.conv.requires_grad_(False)
    out = m.act(m.bn(h)) + m.conv(x)
    m.conv.requires_grad_(True)
    return out


def modes_half_way(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)
    with torch.no_grad():
        k = m.conv2(h)
        a = m.act(h)
    with torch.autocast("cpu", torch.bfloat16, enabled=False), torch.device("cpu"):
        return m.act(k) + a + m.bn(h) + torch.zeros(1)


def upsampled(m: Any, x: Tensor) -> Tensor:
    h = m.act(m.bn2(m.conv2(F.interpolate(block(m, x), scale_factor=2))))
    return torch.sigmoid(m.conv(F.interpolate(h, size=[24, 24], mode="nearest-exact")))


def upsampled_and_used(m: Any, x: Tensor) -> list:
    h = m.conv(x)
    u = F.interpolate(h, scale_factor=(2.0, 2.0), recompute_scale_factor=True)
    y = m.act(m.conv2(u))
    v = F.interpolate(m.act(m.conv(y)), scale_factor=2)
    return [y, u.mean(), m.act(m.conv(u)), m.conv2(v), m.conv(v)]


def upsampled_for_others(m: Any, x: Tensor) -> list:
    def u(mode: str = "nearest") -> Tensor:
        return F.interpolate(m.conv(x), scale_factor=2, mode=mode)

    one = F.conv2d(u(), m.conv.weight[:, :, 1:2, 1:2])
    return [m.act(u()), m.bn(u()), m.up(u()), m.act(m.bn(one)), m.conv2(u("bicubic")), m.conv2(u()[:, :, 1:]), u()]


def upsampled_and_changed(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        before = F.interpolate(x, scale_factor=2)
        x.mul_(2)
        u = F.interpolate(m.conv(x), scale_factor=2)
        y = m.conv2(before)
        u += 1
        return m.conv2(u) + y


def checkpointed(reentrant: bool) -> Callable:
    def way(m: Any, x: Tensor) -> Tensor:
        h = m.conv(x)
        if torch.is_grad_enabled():
            h = checkpoint(lambda t: block_2(m, t) + t, h, use_reentrant=reentrant)
        else:
            h = block_2(m, h) + h
        return m.act(m.bn(h))

    return way


def block_2(m: Any, x: Tensor) -> Tensor:
    return m.up(m.act(m.conv2(m.act(x))))


def saved_by_hooks(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        return m.act(m.conv2(m.act(h)))


def transformed(m: Any, x: Tensor) -> Tensor:
    h, c = m.conv(x), x.detach()
    y = torch.func.vmap(lambda t: torch.tanh(m.conv2(t[None]))[0])(c)
    g = torch.func.grad(lambda t: (m.up(t) * h.detach()).sum())(c)
    _, d = torch.func.jvp(lambda t: m.act(m.up(t)), (c,), (c,))
    return m.act(h) + y + g + d


def slopes(m: Any, x: Tensor) -> Tensor:
    """Of one PReLU, by its module, by functions and by a method; some are computed."""
    h = m.slopes(m.bn(m.conv(x)))
    k = F.prelu(m.conv2(h), m.slopes.weight[:1])
    return torch.prelu(m.up(k), weight=m.slopes.weight).add(m.bn2(m.conv(k)).prelu(m.conv.bias.abs())) + h


def preactivated(m: Any, x: Tensor) -> Tensor:
    return m.conv2(F.silu(m.bn2(m.conv(m.act(m.bn(x)))), inplace=True)) + x


def preactivated_twice_used(m: Any, x: Tensor) -> Tensor:
    out = m.act(m.bn(x))
    shortcut = m.up(out)
    return torch.cat([shortcut, m.conv2(m.act(m.bn2(m.conv(out)))), x], 1)


def activated_before_norms(m: Any, x: Tensor) -> Tensor:
    return m.bn2(m.act(m.conv2(m.drop(m.bn(m.act(m.conv(x)))))))


def norms_in_vain(m: Any, x: Tensor) -> tuple:
    a = m.bn(x)
    b = m.act(a)
    c = m.bn2(b)
    return a.mean(), b, m.conv(c), F.instance_norm(x)


def norms_input_changed(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = m.bn(x)
        x.mul_(2)
        g = m.act(m.bn2(x))
        x.add_(1)
    h = F.elu_(m.bn2(x)) + m.act(h)
    return m.conv(h) + m.conv2(g)


def norms_half_way(m: Any, x: Tensor) -> Tensor:
    training = m.bn.training
    h = m.bn.eval()(x)
    m.bn.train(training)
    with torch.no_grad():
        k = m.act(m.bn2(x))
        k = m.conv(k)
    return m.conv2(m.act(h)) + k


def norms_of_a_checkpoint(m: Any, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return preactivated(m, x)
    return m.act(m.up(checkpoint(lambda t: preactivated(m, t), m.bn(x), use_reentrant=False)))


WAYS: dict[str, tuple[Callable, dict[str, nn.Module]]] = {
    way.__name__: (way, {})
    for way in (
        block, named, named_and_skipped,
        add_in_place, add_out, used_raw_and_normalised, asked_again, dense, branches, changed_after,
        clamped_after, tanh_in_place, view_changed, input_changed, weight_changed, statistics_reset, statistics_read,
        statistics_of_nothing, shared_norm, recursion, train_and_eval, dropouts, own_weights, hyper, control_flow,
        operators, through_functions, containers, closures, inner_gradient, tensor_hooks, frozen_half_way,
        modes_half_way, saved_by_hooks, transformed, upsampled,
        upsampled_and_used, upsampled_for_others, upsampled_and_changed,
        preactivated, preactivated_twice_used, activated_before_norms,
        norms_in_vain, norms_input_changed, norms_half_way, norms_of_a_checkpoint,
    )
}  # fmt: skip
WAYS |= {
    "checkpoint": (checkpointed(False), {}),
    "reentrant checkpoint": (checkpointed(True), {}),
    "Sequential inside": (through_sequentials, {"tail": nn.Sequential(nn.Tanh(), conv(), nn.BatchNorm2d(4))}),
    "module inside": (lambda m, x: m.tail(block(m, x)), {"tail": Net(dense)}),
    "padding same": (block, {"conv": conv(padding="same", dilation=2)}),
    "padding valid": (block, {"conv": conv(padding="valid")}),
    "padding reflect": (block, {"conv": conv(padding_mode="reflect")}),
    "groups, stride": (block, {"conv": conv(groups=2, stride=(2, 1), padding=(1, 2), dilation=(1, 2))}),
    "depthwise": (block, {"conv": conv(groups=4)}),
    "transposed": (block, {"conv": nn.ConvTranspose2d(4, 4, 3, 2, 1, 1)}),
    "output size": (lambda m, x: m.act(m.bn(m.conv(x, [12, 11]))), {"conv": nn.ConvTranspose2d(4, 4, 3, 2, 1)}),
    "momentum None": (block, {"bn": nn.BatchNorm2d(4, momentum=None)}),
    "not tracked": (block, {"bn": nn.BatchNorm2d(4, track_running_stats=False)}),
    "not affine": (block, {"bn": nn.BatchNorm2d(4, affine=False)}),
    "instance norm": (block, {"bn": nn.InstanceNorm2d(4, affine=True, track_running_stats=True)}),
    "pre-activated, momentum None": (preactivated, {"bn": nn.BatchNorm2d(4, momentum=None)}),
    "pre-activated, not affine": (preactivated, {"bn": nn.BatchNorm2d(4, affine=False)}),
    "pre-activated, instance norm": (preactivated, {"bn": nn.InstanceNorm2d(4, affine=True)}),
    "pre-activated, padding reflect": (preactivated, {"conv": conv(padding_mode="reflect")}),
    "sync norm": (block, {"bn": nn.SyncBatchNorm(4)}),
    "PReLU": (block, {"act": nn.PReLU(4)}),
    "PReLU of one": (block_2, {"act": nn.PReLU()}),
    "slopes": (slopes, {"slopes": nn.PReLU(4)}),
    "act in place": (block, {"act": nn.ELU(inplace=True)}),
    "spectral norm": (block, {"conv": parametrizations.spectral_norm(conv())}),
    "spectral norm, old": (block, {"conv": nn.utils.spectral_norm(conv())}),
    "upsampled, spectral norm": (upsampled, {"conv2": parametrizations.spectral_norm(conv())}),
    "weight norm": (block, {"conv": parametrizations.weight_norm(conv())}),
}  # fmt: skip
