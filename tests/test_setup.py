"""The build's decisions, what an installation without extensions does, and what importing costs."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import fastdcgan
from fastdcgan import build_info, doctor
from fastdcgan.backends import cpu
from fastdcgan.cli import packages
from tests.machine import setup_script

ROOT = Path(__file__).parent.parent
CUDA_SOURCES = ["csrc/cuda/elementwise/norm_act.cu"]


@pytest.fixture(scope="module")
def build() -> ModuleType:
    return setup_script()


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints; it fails the test if the interpreter fails."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, cwd=ROOT.parent
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def write_record(folder: Path, torch_version: str, errors: dict[str, str | None]) -> None:
    extensions = {name: {"built": error is None, "error": error} for name, error in errors.items()}
    record = {"python": "3.11.7", "torch": torch_version, "compiler": None, "extensions": extensions}
    (folder / "_build.json").write_text(json.dumps(record))


# --- decisions of setup.py -------------------------------------------------------------------------------------------


def test_switches(build: ModuleType) -> None:
    assert all(build.enabled({"X": text}, "X") for text in ("1", "true", "ON", "yes"))
    assert not any(build.enabled({"X": text}, "X") for text in ("0", "false", "Off", ""))
    assert not build.enabled({}, "X")
    with pytest.raises(ValueError, match="FASTDCGAN_SKIP_CUDA='maybe': expected 1 or 0"):
        build.planned({"FASTDCGAN_SKIP_CUDA": "maybe"}, "x86_64", [])


def test_planned_extensions(build: ModuleType) -> None:
    widths = ["_cpu_default", "_cpu_avx2", "_cpu_avx512"]
    assert build.planned({}, "x86_64", []) == widths
    assert build.planned({}, "AMD64", CUDA_SOURCES) == [*widths, "_cuda"]
    assert build.planned({}, "aarch64", CUDA_SOURCES) == ["_cpu_default", "_cuda"]
    assert build.planned({"FASTDCGAN_SKIP_CUDA": "1"}, "x86_64", CUDA_SOURCES) == widths
    assert build.planned({"FASTDCGAN_CPU_CAPABILITIES": "avx512 default"}, "x86_64", []) == [widths[0], widths[2]]
    assert build.planned({"FASTDCGAN_CPU_CAPABILITIES": "none"}, "x86_64", CUDA_SOURCES) == ["_cuda"]
    for machine, text in [("x86_64", "avx"), ("aarch64", "avx2"), ("x86_64", "none avx2")]:
        with pytest.raises(ValueError, match=f"FASTDCGAN_CPU_CAPABILITIES='{text}': expected of 'default"):
            build.planned({"FASTDCGAN_CPU_CAPABILITIES": text}, machine, [])


def test_forcing_what_can_not_be(build: ModuleType) -> None:
    with pytest.raises(ValueError, match="expected one of them"):
        build.planned({"FASTDCGAN_FORCE_CUDA": "1", "FASTDCGAN_SKIP_CUDA": "1"}, "x86_64", CUDA_SOURCES)
    with pytest.raises(ValueError, match="no CUDA sources"):
        build.planned({"FASTDCGAN_FORCE_CUDA": "1"}, "x86_64", [])


def test_jobs(build: ModuleType) -> None:
    assert build.max_jobs({}, cores=16, gib=128.0) == 16
    assert build.max_jobs({}, cores=16, gib=3.7) == 3
    assert build.max_jobs({}, cores=2, gib=0.4) == 1
    assert build.max_jobs({"MAX_JOBS": "5"}, cores=2, gib=1.0) == 5
    with pytest.raises(ValueError, match="MAX_JOBS=0"):
        build.max_jobs({"MAX_JOBS": "0"}, cores=2, gib=1.0)


def toolkit(folder: Path, release: str | None) -> Path:
    """A CUDA toolkit of that version, as far as the build asks; None: one whose nvcc says nothing."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    says = f"echo 'Cuda compilation tools, release {release}, V{release}.88'" if release else "exit 1"
    nvcc.write_text(f"#!/bin/sh\n{says}\n")
    nvcc.chmod(0o755)
    return folder


def test_where_cuda_is(build: ModuleType, tmp_path: Path) -> None:
    home = toolkit(tmp_path / "toolkit", "13.0")
    nvcc = home / "bin" / "nvcc"
    linked = tmp_path / "elsewhere"
    linked.mkdir()
    (linked / "nvcc").symlink_to(nvcc)
    assert build.cuda_home({"PATH": str(linked)}) == str(home)  # the toolkit, not the folder of the link
    assert build.cuda_home({"PATH": str(linked), "CUDA_HOME": "/named"}) == "/named"
    found = {"PATH": str(linked)}
    assert build.why_no_cuda(found, "13.0") is None
    assert "without CUDA" in build.why_no_cuda(found, None)
    assert build.why_no_cuda({**found, "FASTDCGAN_FORCE_CUDA": "1"}, None) is None
    nvcc.write_text("#!/bin/sh\necho '#$ TOP=/real/bin/..' >&2\n")  # a script in front of the real one
    assert build.cuda_home({"PATH": str(linked)}) == "/real"


def test_cuda_that_can_not_be_built_says_what_to_set(build: ModuleType, tmp_path: Path) -> None:
    old, new = toolkit(tmp_path / "old", "12.4"), toolkit(tmp_path / "new", "14.1")
    mute = toolkit(tmp_path / "mute", None)
    assert build.nvcc_version(str(old)) == (12, 4)
    reasons = {
        str(old): ["nvcc 12.4 in", "is older than torch's CUDA 13.0", "set CUDA_HOME"],
        str(new): ["nvcc 14.1 in", "is newer than torch's CUDA 13.0", "torch for CUDA 14"],
        str(mute): ["has no bin/nvcc that runs", "set CUDA_HOME to the folder of the CUDA toolkit 13.0"],
        str(tmp_path / "none"): ["has no bin/nvcc that runs"],
    }
    for home, parts in reasons.items():
        reason = build.why_no_cuda({"CUDA_HOME": home, "FASTDCGAN_FORCE_CUDA": "1"}, "13.0")
        assert all(part in reason for part in parts) and "\n" not in reason, reason
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        reason = build.why_no_cuda({"PATH": str(tmp_path)}, "13.0")
        assert "nvcc was not found" in reason and "install the CUDA toolkit 13.0 and set CUDA_HOME" in reason


@pytest.mark.parametrize(
    ("output", "advice"),
    [
        (
            "host_config.h: error: #error -- unsupported GNU version! gcc versions later than 15 are not supported!",
            "nvcc doesn't take this host compiler: set CC and CXX to an older one",
        ),
        ("fatal error: Killed signal terminated cc1plus", "a compiler ran out of memory: set MAX_JOBS=1 (it was 7)"),
        ("nvcc error   : 'cicc' died due to signal 9 (Kill signal)", "a compiler ran out of memory: set MAX_JOBS=1"),
        (
            "nvcc fatal   : Unsupported gpu architecture 'compute_100'",
            "this nvcc doesn't know compute_100: leave it out of TORCH_CUDA_ARCH_LIST (it was '8.0 10.0')",
        ),
        ("ops.cpp:1: error: expected ';'", None),
    ],
)  # fmt: skip
def test_a_known_failure_says_what_to_set(build: ModuleType, output: str, advice: str | None) -> None:
    found = build.hint(f"[1/2] c++\n{output}\nninja: build stopped", 7, "8.0 10.0")
    assert found == advice if advice is None else found.startswith(advice) and "\n" not in found


def test_architectures(build: ModuleType) -> None:
    flags = [
        "-gencode=arch=compute_100,code=compute_100", "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a",
    ]  # fmt: skip
    assert build.architectures_of(flags) == ["8.0", "9.0a", "10.0+PTX"]


@pytest.mark.parametrize(
    ("capabilities", "architectures"),
    [
        ([(9, 0), (9, 0)], "9.0a"),
        ([(8, 9), (8, 0)], "8.0 8.9"),
        ([(12, 0)], "12.0"),
        ([(7, 5), (9, 0)], "9.0a"),
        ([(7, 5)], "8.0 9.0a 10.0+PTX"),
        ([], "8.0 9.0a 10.0+PTX"),
    ],
)
def test_architectures_of_the_gpus_here(
    build: ModuleType, capabilities: list[tuple[int, int]], architectures: str
) -> None:
    assert build.architectures_for(capabilities) == architectures


@pytest.mark.parametrize("bounded", [False, True])
def test_waits_are_bounded_where_that_is_asked_for(
    build: ModuleType, bounded: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FASTDCGAN_BOUNDED_WAITS", str(int(bounded)))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(build, "ROOT", tmp_path)
    flags = build.cuda_extension().extra_compile_args["nvcc"]
    assert ("-DFASTDCGAN_BOUNDED_WAITS" in flags) == bounded


def test_capabilities_have_their_macros(build: ModuleType) -> None:
    for name, flags in build.CAPABILITIES.items():
        assert f"-DCPU_CAPABILITY={name.upper()}" in flags and f"-DCPU_CAPABILITY_{name.upper()}" in flags
        assert "-march=native" not in flags


def test_summary_of_a_failed_build(build: ModuleType) -> None:
    calls = ["Traceback (most recent call last):", '  File "setup.py", line 1', "RuntimeError: Error compiling objects"]
    output = "\n".join([*(f"noise {i}" for i in range(99)), "ops.cpp:1: error: expected ';'", *calls])
    lines = build.summary(output).splitlines()
    assert lines[-2:] == ["ops.cpp:1: error: expected ';'", "RuntimeError: Error compiling objects"]
    assert len(lines) == build.ERROR_LINES
    assert build.summary("\n".join(calls)).splitlines() == calls  # nothing but the calls


# --- the torch to build against --------------------------------------------------------------------------------------

# As pip isolates a build: this Python, with the packages of the build alone.
ISOLATED = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("setup_script", "{ROOT / "setup.py"}")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
sys.path[:] = [path for path in sys.path if not path.endswith("-packages")]
"""


def test_an_isolated_build_finds_torch() -> None:
    code = """
before = sys.path[:]
script.find_torch()
import torch
print(torch.__version__, sys.path[: len(before)] == before)
"""
    assert python(ISOLATED + code) == f"{torch.__version__} True"


def test_one_line_where_there_is_no_torch() -> None:
    code = """
script.pythons = lambda: []
try:
    script.find_torch()
except SystemExit as error:
    print(error)
"""
    error = python(ISOLATED + code)
    assert error.startswith('error: no PyTorch here to build fastdcgan against: first `pip install "torch>=2.11"`')
    assert "\n" not in error


def test_an_old_torch_is_refused(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    with pytest.raises(SystemExit, match=r"needs PyTorch 2\.11 or later, and this environment has 2\.10\.1\+cpu"):
        build.find_torch()
    monkeypatch.setattr(torch, "__version__", "2.11.0a0+git1234")
    build.find_torch()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc here tells of the calling process")
def test_whose_environment_a_bare_one_is_for(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = "arguments, environment, folder = script.caller(); print([arguments[0], environment['HERE'], folder])"
    started = f"import os, subprocess, sys; os.chdir('/'); subprocess.run([sys.executable, '-c', {ISOLATED + code!r}])"
    assert python(started, HERE="there") == f"['{sys.executable}', 'there', PosixPath('/')]"

    for name in ("tools/python3", ".venv/bin/python", "active/bin/python"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).symlink_to(sys.executable)
    tools, own = {"PATH": str(tmp_path / "tools")}, str(tmp_path / ".venv/bin/python")
    active = {"VIRTUAL_ENV": str(tmp_path / "active")}
    for called, environment, found in (
        (["python3", "-m", "build"], tools, [str(tmp_path / "tools/python3"), own]),
        ([".venv/bin/python", "-m", "build"], {}, [own]),
        (["uv", "build"], active, [str(tmp_path / "active/bin/python")]),
        ([], {}, [own]),
    ):
        monkeypatch.setattr(build, "caller", lambda found=(called, environment, tmp_path): found)
        assert build.pythons() == [sys.executable, *found]


# --- what is installed -----------------------------------------------------------------------------------------------


def test_packages_are_mapped() -> None:
    found = python("from fastdcgan import kernels, benchmarks; print(kernels.__file__, benchmarks.__file__)")
    folders = [Path(path).parent.name for path in found.split()]
    assert folders == ["kernels", "benchmarks"]


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "fastdcgan").rglob("*.py")}
    found = {".".join(folder.parts) for folder in folders} | {"fastdcgan.kernels", "fastdcgan.benchmarks"}
    assert sorted(listed) == sorted(found)


@pytest.mark.compiles
def test_what_is_distributed_installs(tmp_path: Path) -> None:
    """From an sdist comes a wheel with the C++ kernels, which runs away from the source folder. It has those of one
    vector width, not optimised: the others take longer, and were built of the same sources to be tested."""
    script = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert names >= expected | {"LICENSE", "setup.py", "kernels/conv.py", "benchmarks/bench.py", "fastdcgan/py.typed"}

    site = tmp_path / "site"
    flags = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(site), "FASTDCGAN_SKIP_CUDA": "1", "CXX": str(compiler)}
    environment |= {"FASTDCGAN_CPU_CAPABILITIES": "default", "ATEN_CPU_CAPABILITY": "default"}
    install = [sys.executable, "-m", "pip", "install", *flags, "--target", str(site), str(archive)]
    subprocess.run(install, cwd=tmp_path, env=environment, check=True, stdout=subprocess.DEVNULL)

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout

    code = """
import torch, fastdcgan
net = fastdcgan.fuse(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4), torch.nn.ReLU()))
assert net(torch.zeros(1, 3, 8, 8)).shape == (1, 8, 5, 5)
print(fastdcgan.__file__, fastdcgan.backends()["cpu"])
"""
    assert run("-c", code).split() == [str(site / "fastdcgan" / "__init__.py"), "available"]
    assert "OK: blocks on the CPU run on cpu." in run("-m", "fastdcgan", "doctor")
    assert run("-m", "fastdcgan", "--version") == f"fastdcgan {fastdcgan.__version__}\n"


def test_import_is_quick() -> None:
    """At most 0.2 s of a processor more than torch alone: the median of three processes."""
    code = "import time, torch; t = time.process_time(); import fastdcgan; print(time.process_time() - t)"
    seconds = [float(python(code)) for _ in range(3)]
    assert statistics.median(seconds) <= 0.2, seconds


def test_import_loads_and_queries_nothing() -> None:
    code = """
import sys, torch
torch.cuda.is_available = torch.cuda.device_count = None  # a call would fail
before = set(sys.modules)
import fastdcgan
print(sorted({m.split(".")[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))
print(hasattr(torch.ops.fastdcgan_cpu, "norm_act"))
"""
    assert python(code).splitlines() == ["['fastdcgan']", "False"]


def extras() -> dict[str, list[str]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_packages_come_with_the_extras_that_commands_name() -> None:
    for package, extra in packages.PACKAGES.values():
        found = [name for name, texts in extras().items() if package in {re.split(r"[<>=;\[ ]", x)[0] for x in texts}]
        assert extra in found if extra else found in ([], ["test"])


def test_torch_and_numpy_are_enough(tmp_path: Path) -> None:
    """Where no other package can be imported, fused training runs, and a command says in one line what it needs."""
    code = f"""
import sys
from fastdcgan.cli.packages import PACKAGES

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *args):
        return None if name.partition(".")[0] in {{*PACKAGES, "triton"}} else self.finder.find_spec(name, *args)

sys.meta_path[:] = map(Without, sys.meta_path)
assert not sys.modules.keys() & {{*PACKAGES, "triton"}}
import torch, fastdcgan
from fastdcgan.cli import main
G, D = fastdcgan.Generator(32, ngf=8), fastdcgan.Discriminator(32, ndf=8)
fastdcgan.fuse(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4), torch.nn.ReLU()))(torch.zeros(1, 3, 8, 8))
step = fastdcgan.GANStep(G, D, fastdcgan.optim.FusedAdam(G.parameters()), fastdcgan.optim.FusedAdam(D.parameters()))
print(step(torch.zeros(4, 3, 32, 32), torch.randn(4, 100, 1, 1)).loss_d.isfinite().item())
print(main(["doctor"]), main(["train", r"{tmp_path}"]), main(["bench", "--quick"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "True" and lines[-1].endswith(" 2 2"), done
    line = 'error: fastdcgan {} needs the package pillow: pip install "fastdcgan[dcgan]"'
    assert done.stderr.splitlines() == [line.format("train"), line.format("bench")]


def test_without_extensions_and_triton() -> None:
    """`auto` runs the reference, the name raises with what to do, and nothing else changes."""
    code = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
from pathlib import Path
from fastdcgan import build_info
build_info.PACKAGE = Path("/nonexistent")
import torch, fastdcgan
from fastdcgan import backends, doctor
layer = fastdcgan.ConvBNLeakyReLU2d(3, 8, 4, stride=2, padding=1)
layer(torch.randn(2, 3, 8, 8)).sum().backward()
print(backends.select("auto", "cpu", torch.float32))
try:
    with fastdcgan.backend("cpu"):
        pass
except fastdcgan.Unavailable as error:
    print(error)
print(doctor.report().healthy)
"""
    name, error, healthy = python(code).splitlines()
    assert name == "reference"
    assert (
        error.startswith("backend 'cpu' needs the C++ extension _cpu_") and "build it with `pip install -e .`" in error
    )
    assert healthy == "False"


def test_the_original_error_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    error = "csrc/cpu/elementwise/pass.cpp:1:1: error: expected\nninja: build stopped"
    write_record(tmp_path, "2.13.0", {"_cpu_avx2": error, "_cpu_default": None})
    monkeypatch.setattr(build_info, "PACKAGE", tmp_path)
    assert error in build_info.why_missing("_cpu_avx2")
    assert "was not built" in build_info.why_missing("_cpu_avx512")
    found = doctor.Report({}, "", [], build_info.build_info(), {"cpu": "no"}, "cpu", [])
    assert "error: expected" in str(found) and "ninja: build stopped" in str(found)
    assert found.verdict().startswith("SLOW") and "_cpu_avx2" in found.verdict()


def test_what_cuda_was_built_for_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_record(tmp_path, "2.13.0", {"_cuda": None})
    record = json.loads((tmp_path / "_build.json").read_text())
    record["cuda"] = {"nvcc": "13.0", "architectures": ["8.0", "10.0+PTX"], "oldest_torch": "2.11"}
    (tmp_path / "_build.json").write_text(json.dumps(record))
    monkeypatch.setattr(build_info, "PACKAGE", tmp_path)
    found = doctor.Report({}, "", [], build_info.build_info(), {"cuda": "available"}, "cuda", ["cuda"])
    assert "_cuda        built by nvcc 13.0 for 8.0 10.0+PTX, on the stable ABI of torch 2.11 and later" in str(found)


def test_an_extension_of_other_sources_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package, csrc = tmp_path / "fastdcgan", tmp_path / "csrc"
    package.mkdir()
    for file in ("common/moments.h", "cpu/ops.cpp", "cuda/ops.cu"):
        (csrc / file).parent.mkdir(parents=True)
        (csrc / file).write_text("int x;")
    digests = {name: build_info.sources_digest(csrc, name) for name in ("_cpu_avx2", "_cuda")}
    extensions = {name: {"built": True, "error": None, "sources": digest} for name, digest in digests.items()}
    record = {"python": "3.11", "torch": "2.13", "compiler": None, "extensions": extensions}
    (package / "_build.json").write_text(json.dumps(record))
    monkeypatch.setattr(build_info, "PACKAGE", package)
    assert build_info.why_stale("_cpu_avx2") is None and build_info.why_stale("_cuda") is None

    (csrc / "cpu" / "ops.cpp").write_text("int y;")
    assert "_cpu_avx2 was built from other sources than csrc has now" in str(build_info.why_stale("_cpu_avx2"))
    assert build_info.why_stale("_cuda") is None
    (csrc / "common" / "moments.h").rename(csrc / "common" / "other.h")
    assert build_info.why_stale("_cuda") is not None
    shutil.rmtree(csrc)  # an installation without sources
    assert build_info.why_stale("_cpu_avx2") is None


def test_a_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = cpu.extension_name()
    (tmp_path / f"{name}.so").write_bytes(b"not a library")
    write_record(tmp_path, "1.0", {name: None})
    monkeypatch.setattr(build_info, "PACKAGE", tmp_path)
    reason = rf"can't load {name}.so: .*built with torch 1.0 and this is"
    with pytest.raises(fastdcgan.Unavailable, match=reason) as raised:
        cpu.CPUBackend().require()
    assert isinstance(raised.value.__cause__, OSError)


def test_doctor() -> None:
    found = doctor.report()
    text = str(found)
    assert str(torch.__version__) in text and torch.backends.cpu.get_cpu_capability() in text
    for name, status in fastdcgan.backends().items():
        assert name in text and status.splitlines()[0] in text
    assert text.splitlines()[-1] == found.verdict()
    assert found.verdict().startswith("OK" if found.healthy else "SLOW")
    assert "but" not in found.cpu  # the kernels get the threads that torch has
    assert set(found.kernels) == set(doctor.KERNELS) and f"1 thread   {found.rates}" in text
    for kind, why in found.kernels.items():
        assert re.search(rf"^  {kind} +{re.escape(why)}$", text, re.MULTILINE)


def test_doctor_says_why_there_are_no_such_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = cpu.Rates(100.0, 0.0, 10.0)
    assert doctor._rates(rates) == "FMA 100 GFLOP/s, no vdpbf16ps, copy 10 GB/s"
    assert set(doctor._kernels("no library\nof all", None).values()) == {"no library"}
    monkeypatch.setattr(cpu, "extension_name", lambda: "_cpu_avx2")
    monkeypatch.setattr(torch.ops, "fastdcgan_cpu", SimpleNamespace(amx_usable=lambda: False))
    for cap, has_it, why in [
        ("avx2", True, "ATEN_CPU_CAPABILITY=avx2 leaves out {}"),
        ("", True, "the system doesn't let it be used"),
        ("avx2", False, "this processor has no {}"),
    ]:
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", cap)
        monkeypatch.setattr(doctor, "INSTRUCTIONS", dict.fromkeys(doctor.INSTRUCTIONS, lambda has_it=has_it: has_it))
        found = doctor._kernels("available", rates)
        assert found["avx512_bf16"] == why.format("AVX512_BF16")
        assert found["amx"] == found["split_bf16"] == why.format("AMX")
        assert found["gemm"] is found["image_side"] is found["winograd"] is None
