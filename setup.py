"""Builds the C++ and CUDA extensions; everything else about the package is in pyproject.toml.

Each extension is a shared library that registers torch operators, built by a process of its own (`python setup.py
build_ext` with FASTDCGAN_EXTENSION set). One that can't be built does not fail the installation: what was built and
what was not, with the original error, is written to fastdcgan/_build.json, which `fastdcgan doctor` shows.

They are built against the torch of the environment that they are installed into. pyproject.toml does not ask for one:
a build environment of pip's own would get the newest torch, gigabytes, and the libraries would not load in another.

Environment:
    MAX_JOBS               compilations at a time (default: from cores and memory)
    TORCH_CUDA_ARCH_LIST   GPU architectures (default: those of the GPUs here, or DEFAULT_CUDA_ARCHITECTURES)
    FASTDCGAN_FORCE_CUDA   1: build the CUDA extension without looking for a CUDA torch; fail where that fails
    FASTDCGAN_SKIP_CUDA    1: no CUDA extension
    FASTDCGAN_BOUNDED_WAITS  1: kernels that wait for what never comes give up and say where (for gpu-check)
    FASTDCGAN_CPU_CAPABILITIES  of "default avx2 avx512" (the default on x86), the vector widths to build the C++ CPU
                           extension for; none: no such extension
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import types
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
CHILD = "FASTDCGAN_EXTENSION"  # names the one extension that this process builds
SITE = "FASTDCGAN_SITE"  # where such a process finds torch and what torch imports
DEFAULT_CUDA_ARCHITECTURES = "8.0 9.0a 10.0+PTX"
LEAST_CAPABILITY = (8, 0)
STABLE_ABI = (2, 11)  # of torch: one library for that version and later ones
ERROR_LINES = 40

# ATen's vectors are as wide as these macros say; the run-time choice is in fastdcgan/backends/cpu.py.
CAPABILITIES: dict[str, list[str]] = {
    "default": ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"],
    "avx2": ["-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2", "-mavx2", "-mfma", "-mf16c"],
}
CAPABILITIES["avx512"] = ["-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512", "-mavx2", "-mfma", "-mf16c"]
CAPABILITIES["avx512"] += ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
X86 = ("x86_64", "amd64", "i686")
# The folders of csrc/cpu that a processor without AVX2 runs (backends/cpu.py); the others are the contractions.
WITHOUT_AVX2 = ("elementwise", "machine", "memory", "train")


# --- the torch to build against ---------------------------------------------------------------------------------------


def caller() -> tuple[list[str], dict[str, str], Path]:
    """Arguments, environment and folder of the process that started this one; empty where the system doesn't tell."""
    process = Path("/proc") / str(os.getppid())
    try:
        arguments, variables = (os.fsdecode((process / x).read_bytes()).split("\0") for x in ("cmdline", "environ"))
        return arguments, dict(x.split("=", 1) for x in variables if "=" in x), (process / "cwd").resolve()
    except OSError:
        return [], {}, Path.cwd()


def pythons() -> list[str]:
    """Interpreters whose environment the build may be for, the likeliest first.

    This one, whose own packages pip hides from a build; and for tools that build in a bare environment (`python -m
    build`, uv) the one that runs the tool, and that of the virtual environment which the tool was started in.
    """
    found = [sys.executable]
    arguments, environment, folder = caller()
    if arguments and Path(arguments[0]).name.startswith("python"):
        named = arguments[0]
        found.append(str(folder / named) if "/" in named else shutil.which(named, path=environment.get("PATH")) or "")
    found.append(str(folder / environment.get("VIRTUAL_ENV", ".venv") / "bin" / "python"))
    return [python for python in dict.fromkeys(found) if Path(python).is_file()]


def paths_with_torch(python: str) -> list[str]:
    """Where `python` imports from, if that has torch and is the same version of Python as this one; else nothing."""
    code = (
        "import importlib.util, json, sys; found = importlib.util.find_spec('torch') is not None;"
        "print(json.dumps([sys.implementation.cache_tag, found, list(filter(None, sys.path))]))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True, cwd=os.sep)
    if done.returncode != 0:
        return []
    tag, found, paths = json.loads(done.stdout)
    return paths if found and tag == sys.implementation.cache_tag else []


def find_torch() -> None:
    """Make torch importable, behind the build's own packages. Exits with one line where there is none that will do."""
    if importlib.util.find_spec("torch") is None:
        if SITE not in os.environ:
            found = next(filter(None, map(paths_with_torch, pythons())), [])
            os.environ[SITE] = os.pathsep.join(found)  # of use to the processes of the extensions
        sys.path.extend(path for path in os.environ[SITE].split(os.pathsep) if path not in sys.path)
    wanted = ".".join(map(str, STABLE_ABI))
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        sys.exit(
            f'error: no PyTorch here to build fastdcgan against: first `pip install "torch>={wanted}"` in this '
            "environment, then this again (or with --no-build-isolation, after `pip install setuptools ninja`)"
        )
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < STABLE_ABI:
        sys.exit(f"error: fastdcgan needs PyTorch {wanted} or later, and this environment has {torch.__version__}")


# --- what to build ---------------------------------------------------------------------------------------------------


def enabled(environment: Mapping[str, str], name: str) -> bool:
    """Whether a switch is on: "1", "true", "yes", "on" in any case. Raises ValueError for anything but those, "0",
    "false", "no", "off" and ""."""
    value = environment.get(name, "").strip().lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("", "0", "false", "no", "off"):
        return False
    raise ValueError(f"{name}={environment[name]!r}: expected 1 or 0")


def memory_gib() -> float:
    """Memory that is free to use, in GiB."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (AttributeError, OSError, ValueError):
        return 4.0


def max_jobs(environment: Mapping[str, str], cores: int, gib: float) -> int:
    """MAX_JOBS, else one compilation per core and per GiB of memory (the largest takes about 0.7 GiB)."""
    if environment.get("MAX_JOBS"):
        jobs = int(environment["MAX_JOBS"])
        if jobs < 1:
            raise ValueError(f"MAX_JOBS={jobs}: expected at least 1")
        return jobs
    return max(1, min(cores, int(gib)))


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sources(folder: str, *suffixes: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for s in suffixes for p in (ROOT / "csrc" / folder).rglob(f"*{s}"))


def headers() -> list[str]:
    found = [p for suffix in ("h", "cuh") for p in (ROOT / "csrc").rglob(f"*.{suffix}")]
    return sorted(str(p.relative_to(ROOT)) for p in found)


def cpu_extensions(environment: Mapping[str, str], machine: str) -> list[str]:
    """One library for each vector width that is asked for, by default all that the processor family may have."""
    able = [name for name in CAPABILITIES if name == "default" or machine.lower() in X86]
    wanted = environment.get("FASTDCGAN_CPU_CAPABILITIES", "").split() or able
    if wanted != ["none"] and not set(wanted) <= set(able):
        raise ValueError(f"FASTDCGAN_CPU_CAPABILITIES={' '.join(wanted)!r}: expected of {' '.join(able)!r}, or 'none'")
    return [f"_cpu_{name}" for name in able if name in wanted]


def planned(environment: Mapping[str, str], machine: str, cuda_sources: list[str]) -> list[str]:
    """The extensions of this build, before looking for a compiler."""
    names = cpu_extensions(environment, machine)
    force, skip = enabled(environment, "FASTDCGAN_FORCE_CUDA"), enabled(environment, "FASTDCGAN_SKIP_CUDA")
    if force and skip:
        raise ValueError("FASTDCGAN_FORCE_CUDA=1 and FASTDCGAN_SKIP_CUDA=1: expected one of them")
    if force and not cuda_sources:
        raise ValueError("FASTDCGAN_FORCE_CUDA=1: this version has no CUDA sources in csrc/cuda")
    return names if skip or not cuda_sources else [*names, "_cuda"]


def cuda_home(environment: Mapping[str, str]) -> str | None:
    """The folder of the CUDA toolkit: CUDA_HOME or CUDA_PATH, else where nvcc says that it is at home."""
    named = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=environment.get("PATH"))
    if named or nvcc is None:
        return named or ("/usr/local/cuda" if Path("/usr/local/cuda/bin/nvcc").exists() else None)
    # It may be a link or a script elsewhere that calls the real one.
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    return str(Path(top[1]).resolve() if top else Path(nvcc).resolve().parent.parent)


def nvcc_version(home: str) -> tuple[int, int] | None:
    """Of the toolkit in `home`; None if there is no nvcc that says."""
    nvcc = Path(home) / "bin" / "nvcc"
    try:
        done = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True)
    except OSError:
        return None
    found = re.search(r"release (\d+)\.(\d+)", done.stdout)
    return (int(found[1]), int(found[2])) if found else None


def why_no_cuda(environment: Mapping[str, str], torch_cuda: str | None) -> str | None:
    """Why the CUDA extension can't be built here and what to set, in one line; or None."""
    force = enabled(environment, "FASTDCGAN_FORCE_CUDA")
    if torch_cuda is None and not force:
        return "the installed torch is a build without CUDA (FASTDCGAN_FORCE_CUDA=1 builds the extension all the same)"
    wanted = f"the CUDA toolkit {torch_cuda or ''}".rstrip()
    home = cuda_home(environment)
    if home is None:
        looked = "looked at CUDA_HOME, CUDA_PATH and PATH"
        return f"nvcc was not found ({looked}): install {wanted} and set CUDA_HOME to its folder"
    version = nvcc_version(home)
    if version is None:
        return f"{home} has no bin/nvcc that runs: set CUDA_HOME to the folder of {wanted}"
    if torch_cuda is not None and version[0] != int(torch_cuda.split(".")[0]):
        relation = "older" if version[0] < int(torch_cuda.split(".")[0]) else "newer"
        found = f"nvcc {version[0]}.{version[1]} in {home} is {relation} than torch's CUDA {torch_cuda}"
        return f"{found}: install {wanted} and set CUDA_HOME to its folder, or install a torch for CUDA {version[0]}"
    return None


# What a compiler says when the machine is at fault, and what to do about it.
HINTS = {
    r"unsupported (?:GNU|clang) version": (
        "nvcc doesn't take this host compiler: set CC and CXX to an older one, such as CC=gcc-13 CXX=g++-13"
    ),
    r"[Kk]illed|out of memory|Cannot allocate memory|virtual memory exhausted|signal 9": (
        "a compiler ran out of memory: set MAX_JOBS=1 (it was {jobs}), or give the machine more"
    ),
    r"[Uu]nsupported gpu architecture '(\w+)'": (
        "this nvcc doesn't know {0}: leave it out of TORCH_CUDA_ARCH_LIST (it was {architectures!r}), "
        "or install a newer one"
    ),
}


def hint(output: str, jobs: int, architectures: str) -> str | None:
    """One line on what to set, where a failed build's output has a known cause."""
    for pattern, text in HINTS.items():
        found = re.search(pattern, output)
        if found:
            return text.format(*found.groups(), jobs=jobs, architectures=architectures)
    return None


def architectures_for(capabilities: Iterable[tuple[int, int]]) -> str:
    """TORCH_CUDA_ARCH_LIST for GPUs of these compute capabilities; the default where the kernels run on none."""
    found = [f"{major}.{minor}" for major, minor in sorted(set(capabilities)) if (major, minor) >= LEAST_CAPABILITY]
    named = [f"{name}a" if name == "9.0" else name for name in found]  # wgmma and its copies are in sm_90a alone
    return " ".join(named) or DEFAULT_CUDA_ARCHITECTURES


def set_architectures() -> None:
    """Set TORCH_CUDA_ARCH_LIST where it isn't: code for other GPUs than those here takes minutes to compile."""
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        import torch

        here = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures_for(map(torch.cuda.get_device_capability, here))


def architectures_of(flags: list[str]) -> list[str]:
    """nvcc's -gencode flags as TORCH_CUDA_ARCH_LIST has them: "9.0a", "10.0+PTX"."""
    found: dict[str, str] = {}
    for flag in flags:
        kind, digits, suffix = re.search(r"code=(sm|compute)_(\d+)([af]?)", flag).groups()  # type: ignore[union-attr]
        number = f"{digits[:-1]}.{digits[-1]}{suffix}"
        found[number] = "+PTX" if kind == "compute" else found.get(number, "")
    return [number + found[number] for number in sorted(found, key=lambda number: float(number.rstrip("af")))]


# --- one extension, in a process of its own --------------------------------------------------------------------------


def openmp_flags() -> list[str]:
    # Without it at::parallel_for compiles to a plain loop.
    return ["-fopenmp"] if sys.platform.startswith("linux") else []


def cpu_extension(name: str) -> Extension:
    from torch.utils.cpp_extension import CppExtension

    # The uninitialised values are those of GCC's own AVX-512 headers.
    quiet = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    width = CAPABILITIES[name.removeprefix("_cpu_")]
    folders = [f"cpu/{folder}" for folder in WITHOUT_AVX2] if name == "_cpu_default" else ["cpu"]
    return CppExtension(
        f"fastdcgan.{name}",
        [file for folder in folders for file in sources(folder, ".cpp")],
        include_dirs=[str(ROOT / "csrc")],
        depends=headers(),
        extra_compile_args=[
            "-O2",
            "-g0",  # Python's own flags have -g, which takes g++ 1.4 times as long for what is stripped again
            "-fno-math-errno",
            *openmp_flags(),
            *quiet,
            *width,
        ],
        extra_link_args=[*openmp_flags(), *(["-Wl,-s"] if sys.platform.startswith("linux") else [])],
    )


def cuda_extension() -> Extension:
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import CUDAExtension

    cpp_extension.CUDA_HOME = os.environ.get("CUDA_HOME")  # a torch without CUDA has looked for none
    major, minor = STABLE_ABI
    stable = [f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000", "-DUSE_CUDA"]
    bounded = ["-DFASTDCGAN_BOUNDED_WAITS"] if enabled(os.environ, "FASTDCGAN_BOUNDED_WAITS") else []
    extension = CUDAExtension(
        "fastdcgan._cuda",
        sources("cuda", ".cu", ".cpp"),
        include_dirs=[str(ROOT / "csrc")],
        depends=headers(),
        extra_compile_args={"cxx": ["-O2", *stable], "nvcc": ["-O3", *stable, *bounded]},
    )
    if torch.version.cuda is None:  # FASTDCGAN_FORCE_CUDA: such a torch has neither of these, a CUDA torch brings them
        extension.libraries = [x for x in extension.libraries if x not in ("c10_cuda", "torch_cuda")]
        extension.extra_link_args = ["-Wl,--no-as-needed", empty_library("libtorch_cuda.so")]
    return extension


def empty_library(name: str) -> str:
    """An empty shared library; what is linked with it asks for the real one of this name when it is loaded."""
    path = ROOT / "build" / "empty" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-shared", "-o", path, f"-Wl,-soname,{name}", "-x", "c", os.devnull], check=True)
    return str(path)


def build_one(name: str) -> None:
    """`python setup.py build_ext`, with torch's compilation by ninja, of a single extension."""
    home = cuda_home(os.environ)
    if home is not None:
        os.environ["CUDA_HOME"] = home
    if name == "_cuda":
        set_architectures()
    from torch.utils.cpp_extension import BuildExtension

    setup(
        ext_modules=[cuda_extension() if name == "_cuda" else cpu_extension(name)],
        cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=True, use_ninja=True)},
    )


# --- all of them -----------------------------------------------------------------------------------------------------


def first_line(*command: str) -> str | None:
    """The first line that a program prints, or None if there is no such program."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.splitlines()[0] if done.stdout else None


def summary(output: str) -> str:
    """The end of what a failed build printed: of the compiler's lines, not of the Python calls that led there."""
    lines = output.rstrip().splitlines()
    calls = next((i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")), None)
    if calls:
        lines = [*lines[:calls], lines[-1]]
    return "\n".join(line if len(line) <= 300 else f"{line[:300]}..." for line in lines[-ERROR_LINES:])


def cuda_record() -> dict[str, object]:
    """What the CUDA extension was built by and for."""
    from torch.utils import cpp_extension

    set_architectures()
    version = nvcc_version(cuda_home(os.environ) or "")
    return {
        "nvcc": ".".join(map(str, version or ())),
        "architectures": architectures_of(cpp_extension._get_cuda_arch_flags()),
        "oldest_torch": ".".join(map(str, STABLE_ABI)),
    }


def build_info() -> types.ModuleType:
    """fastdcgan/build_info.py, without the package, which imports torch."""
    spec = importlib.util.spec_from_file_location("build_info", ROOT / "fastdcgan" / "build_info.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


class Metadata(dist_info):
    """Looks for torch before anything else: pip would load gigabytes for an installation that then fails."""

    def run(self) -> None:
        find_torch()
        super().run()


class BuildExtensions(build_ext):
    """Builds every planned extension in a process of its own and records the outcome."""

    def run(self) -> None:
        find_torch()
        import torch

        names = [extension.name.split(".")[-1] for extension in self.extensions]
        record: dict[str, dict[str, object]] = {}
        if "_cuda" in names:
            reason = why_no_cuda(os.environ, torch.version.cuda)
            if reason is not None:
                names.remove("_cuda")
                record["_cuda"] = {"built": False, "error": reason}
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-torch{torch.__version__}"
        work = ROOT / "build" / tag  # stays the same from one installation to the next: only changes are compiled
        jobs = max_jobs(os.environ, usable_cores(), memory_gib())
        together = max(1, min(jobs, len(names)))
        with ThreadPoolExecutor(together) as pool:
            errors = pool.map(lambda name: self.build_in_process(name, work, max(1, jobs // together)), names)
            for name, error in zip(names, errors, strict=True):
                record[name] = {"built": error is None, "error": error}
        package = ROOT / "fastdcgan" if self.inplace else Path(self.build_lib) / "fastdcgan"
        package.mkdir(parents=True, exist_ok=True)
        for stale in package.glob("_c[pu]*.so"):
            stale.unlink()
        for name in record:
            if record[name]["built"]:
                shutil.copy2(work / "lib" / "fastdcgan" / f"{name}.so", package)
        for name in record:
            record[name]["sources"] = build_info().sources_digest(ROOT / "csrc", name)
        information = {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "compiler": first_line(os.environ.get("CXX", "c++"), "--version"),
            "extensions": record,
            "cuda": cuda_record() if record.get("_cuda", {}).get("built") else None,
        }
        (package / "_build.json").write_text(json.dumps(information, indent=2) + "\n")
        if enabled(os.environ, "FASTDCGAN_FORCE_CUDA") and not record["_cuda"]["built"]:
            raise RuntimeError(f"FASTDCGAN_FORCE_CUDA=1, but the CUDA extension failed: {record['_cuda']['error']}")

    def build_in_process(self, name: str, work: Path, jobs: int) -> str | None:
        """None, or the last lines of what a failed build printed."""
        command = [sys.executable, str(ROOT / "setup.py"), "build_ext"]
        command += ["--build-temp", str(work / name), "--build-lib", str(work / "lib")]
        if self.force:
            command.append("--force")
        # ninja may be a package of this Python, which need not be on the PATH.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        environment = {**os.environ, CHILD: name, "MAX_JOBS": str(jobs), "PATH": path}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        print(f"--- fastdcgan.{name}\n{done.stdout}", flush=True)
        if done.returncode == 0:
            return None
        if name == "_cuda":
            set_architectures()
        advice = hint(done.stdout, jobs, os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
        return "\n".join([*([advice] if advice else []), summary(done.stdout)])

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def main() -> None:
    if os.environ.get(CHILD):
        find_torch()
        build_one(os.environ[CHILD])
        return
    names = planned(os.environ, platform.machine(), sources("cuda", ".cu", ".cpp"))
    setup(
        ext_modules=[Extension(f"fastdcgan.{name}", []) for name in names],
        cmdclass={"build_ext": BuildExtensions, "dist_info": Metadata} if names else {},
    )


if __name__ == "__main__":
    main()
