"""What this machine is, what was built for it, which backends run here and why the others don't.

Devices are queried when a report is made, never at import.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fastdcgan import backends
from fastdcgan.backends import cpu
from fastdcgan.build_info import HOW_TO_BUILD, BuildInfo, build_info
from fastdcgan.dispatch import autotune

PACKAGES = ("torch", "triton", "numpy")
AVAILABLE = "available"
INSTRUCTIONS: dict[str, Callable[[], bool]] = {
    "AVX2": torch.cpu._is_avx2_supported,
    "AVX-512": torch.cpu._is_avx512_supported,
    "AVX512_BF16": torch.cpu._is_avx512_bf16_supported,
    "AMX": torch.cpu._is_amx_tile_supported,
}
KERNELS = ("gemm", "image_side", "winograd", "avx512_bf16", "amx", "split_bf16")  # kinds of them


@dataclass(frozen=True)
class Report:
    """What `fastdcgan doctor` shows. `healthy` if a fast backend (any but the reference) runs blocks on this machine's
    device, which is its GPU where it has one."""

    versions: dict[str, str]
    cpu: str
    gpus: list[str]
    build: BuildInfo
    backends: dict[str, str]
    device_type: str
    fast: list[str]
    rates: str = "not measured"
    kernels: dict[str, str] = field(default_factory=dict)  # of the C++ CPU backend, and why there are none of a kind

    @property
    def healthy(self) -> bool:
        return bool(self.fast)

    def verdict(self) -> str:
        where = "GPU" if self.device_type == "cuda" else "CPU"
        if self.fast:
            return f"OK: blocks on the {where} run on {', '.join(self.fast)}."
        failed = [name for name, error in self.build.errors.items() if error is not None]
        todo = f"see the errors of {', '.join(failed)} above, then " if failed else ""
        return f"SLOW: blocks on the {where} run no faster than PyTorch's own. To change that, {todo}{HOW_TO_BUILD}."

    def __str__(self) -> str:
        lines = ["versions", *(f"  {name:<10} {version}" for name, version in self.versions.items())]
        lines += ["machine", f"  {'CPU':<10} {self.cpu}", f"  {'1 thread':<10} {self.rates}"]
        lines += [f"  {'GPU':<10} {gpu}" for gpu in self.gpus or ["none"]]
        lines += ["built", f"  {'with':<10} {self.build.compiler or 'nothing recorded'}"]
        lines += [f"  {'for':<10} Python {self.build.python}, torch {self.build.torch}"] if self.build.torch else []
        lines += [_entry(name, error or self._built(name)) for name, error in self.build.errors.items()]
        # A build's error, which the list above has, begins on the second line.
        lines += ["backends", *(_entry(name, status.partition("\n")[0]) for name, status in self.backends.items())]
        lines += ["kernels of cpu", *(_entry(name, status) for name, status in self.kernels.items())]
        return "\n".join([*lines, "", self.verdict()])

    def _built(self, extension: str) -> str:
        cuda = self.build.cuda
        if extension != "_cuda" or not cuda.architectures:
            return "built"
        abi = f"the stable ABI of torch {cuda.oldest_torch} and later"
        return f"built by nvcc {cuda.nvcc} for {' '.join(cuda.architectures)}, on {abi}"


def report() -> Report:
    """Look at the machine and at what was built. Loads the backends; takes a second or two."""
    has_gpu = torch.cuda.is_available()
    device_type = "cuda" if has_gpu else "cpu"
    reasons = backends.reasons(device_type, torch.float32)
    status = backends.status()
    here = backends.get("cpu") if status["cpu"] == AVAILABLE else None
    rates = here.rates if isinstance(here, cpu.CPUBackend) else None
    return Report(
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        cpu=_cpu(),
        gpus=[_gpu(i) for i in range(torch.cuda.device_count())] if has_gpu else [],
        build=build_info(),
        backends=status,
        device_type=device_type,
        fast=[name for name, reason in reasons.items() if reason is None and name != "reference"],
        rates="not measured, since the backend 'cpu' isn't available" if rates is None else _rates(rates),
        kernels={kind: why or AVAILABLE for kind, why in _kernels(status["cpu"], rates).items()},
    )


def _entry(name: str, text: str) -> str:
    first, *rest = text.splitlines() or [""]
    return "\n".join([f"  {name:<12} {first}", *(f"  {'':<12} | {line}" for line in rest)])


def _version(package: str) -> str:
    if package == "torch":  # the build at hand, with its CUDA or CPU tag
        return f"{torch.__version__} (CUDA {torch.version.cuda})" if torch.version.cuda else str(torch.__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    threads = torch.get_num_threads()
    sets = ", ".join(name for name, has in INSTRUCTIONS.items() if has()) or "none of " + ", ".join(INSTRUCTIONS)
    text = (
        f"{autotune.processor()}, {platform.machine()} with {sets}, used as {torch.backends.cpu.get_cpu_capability()}"
    )
    text += f", {threads} threads"
    if backends.status()["cpu"] == AVAILABLE:
        seen = torch.ops.fastdcgan_cpu.threads()
        if seen != threads:
            text += f" (but {seen} in the C++ kernels: built without OpenMP, or with another one than torch)"
    return text


def _rates(found: cpu.Rates) -> str:
    dot = f"vdpbf16ps {found.vdpbf16ps:.0f} GFLOP/s" if found.vdpbf16ps else "no vdpbf16ps"
    return f"FMA {found.fma:.0f} GFLOP/s, {dot}, copy {found.copy:.0f} GB/s"


def _kernels(status: str, rates: cpu.Rates | None) -> dict[str, str | None]:
    """The kinds of kernels for contractions, and why there are none of a kind here, or None."""
    if rates is None:
        return dict.fromkeys(KERNELS, status.partition("\n")[0])
    cap = os.environ.get("ATEN_CPU_CAPABILITY")

    def lacks(instructions: str) -> str:
        if not INSTRUCTIONS[instructions]():
            return f"this processor has no {instructions}"
        return f"ATEN_CPU_CAPABILITY={cap} leaves out {instructions}" if cap else "the system doesn't let it be used"

    found: dict[str, str | None] = dict.fromkeys(KERNELS)
    if cpu.extension_name() == "_cpu_default":
        return dict.fromkeys(KERNELS, lacks("AVX2"))
    if not rates.vdpbf16ps:
        found["avx512_bf16"] = lacks("AVX512_BF16")
    if not torch.ops.fastdcgan_cpu.amx_usable():
        found["amx"] = found["split_bf16"] = lacks("AMX")
    return found


def _gpu(index: int) -> str:
    found = torch.cuda.get_device_properties(index)
    return f"{found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB"
