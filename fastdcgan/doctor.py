"""What this machine is, what was built for it, which backends run here and why the others don't.

Devices are queried when a report is made, never at import.
"""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass

import torch

from fastdcgan import backends
from fastdcgan.build_info import HOW_TO_BUILD, BuildInfo, build_info

PACKAGES = ("torch", "triton", "numpy")
AVAILABLE = "available"


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
        lines += ["machine", f"  {'CPU':<10} {self.cpu}"]
        lines += [f"  {'GPU':<10} {gpu}" for gpu in self.gpus or ["none"]]
        lines += ["built", f"  {'with':<10} {self.build.compiler or 'nothing recorded'}"]
        lines += [f"  {'for':<10} Python {self.build.python}, torch {self.build.torch}"] if self.build.torch else []
        lines += [_entry(name, error or self._built(name)) for name, error in self.build.errors.items()]
        # A build's error, which the list above has, begins on the second line.
        lines += ["backends", *(_entry(name, status.partition("\n")[0]) for name, status in self.backends.items())]
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
    return Report(
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        cpu=_cpu(),
        gpus=[_gpu(i) for i in range(torch.cuda.device_count())] if has_gpu else [],
        build=build_info(),
        backends=backends.status(),
        device_type=device_type,
        fast=[name for name, reason in reasons.items() if reason is None and name != "reference"],
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
    has_kernels = backends.status()["cpu"] == AVAILABLE
    instructions = torch.backends.cpu.get_cpu_capability()
    if has_kernels and instructions == "AVX512" and torch.ops.fastdcgan_cpu.amx_usable():
        instructions += " with AMX tiles"
    text = f"{platform.machine()}, {instructions}, {threads} threads"
    if has_kernels:
        seen = torch.ops.fastdcgan_cpu.threads()
        if seen != threads:
            text += f" (but {seen} in the C++ kernels: built without OpenMP, or with another one than torch)"
    return text


def _gpu(index: int) -> str:
    found = torch.cuda.get_device_properties(index)
    return f"{found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB"
