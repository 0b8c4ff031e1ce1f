"""Everything that needs a GPU, in two visits of a few minutes: "first" says what is broken and gives a headline figure,
"second" the whole table.

    python benchmarks/gpu_check.py [--parts NAME,...] [--no-build] [--out DIR] [--dry]
    or with PARTS=NAME,... NO_BUILD=1 OUT=DIR DRY=1 in the environment

A name is that of a visit or of a part; without any, all parts run. It needs no network, and installs nothing: the tree
is used as it is, with a CUDA library that was built on another machine if need be (`--parts build` there). Every part
runs in a process of its own, or several, with a limit; one that fails, hangs or runs out of time is named and doesn't
stop the others, and what one leaves of its time the next may use. Results are written after every part. Exits with 1
if a part that has to work did not. A dry run does every part on a CPU with tiny shapes, and writes to a temporary
folder unless told otherwise.

Only the standard library is imported here, since this process has to outlive whatever the others do.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REPORT_S = 15.0  # for the last part
TILES = 10  # of the CUDA contractions, with and without early launch: a process each
PROCESS_S = 20.0  # for one of them
CAPTURES = ("tests/test_gan_step.py", "tests/test_capture.py")

# Seconds and parts of each visit, in this order: the most telling first, float32 last.
VISITS = {
    "first": (300, ("doctor", "capture", "tiles", "cuda-step", "cuda-tests", "memcheck")),
    "second": (
        480,
        (
            *("doctor", "compile", "smoke", "step-128", "step-1024", "step-32", "graphs", "contractions-128"),
            *("blocks", "bandwidth", "ceilings", "fp32-128"),
        ),
    ),
}

# Cases of the timings: a dtype, then peers.
HEADLINE = ("bf16", "graph", "train")
STEP = ("bf16", "eager-nhwc", "graph", "fused", "fused-graph", "train")
GRAPHS = ("bf16", "graph", "fused-graph", "train")
FP32 = ("fp32", "eager", "eager-nhwc", "fused", "train")
COMPILED = ("bf16", "compile", "compile-max", "compile-graph", "train")  # takes PyTorch minutes: in neither visit
BLOCKS = ("bf16", "graph", "fused-graph")
DRY_CASE = ("fp32", "eager-nhwc", "fused", "train")


@dataclass
class Part:
    """A step of the check.

    Args:
        name: of the part, and of its results file if it writes one.
        limit_s: seconds it may take.
        commands: name -> what to run; several run side by side.
        required: whether the check fails with it.
        environment: more environment variables.
        each_s: seconds that one of its processes may take, where that is less.
    """

    name: str
    limit_s: float
    commands: Mapping[str, Sequence[str]]
    required: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)
    each_s: float = float("inf")


@dataclass
class Outcome:
    name: str
    status: str  # "ok" | "failed" | "out of time"
    seconds: float
    required: bool
    detail: str

    @property
    def bad(self) -> bool:
        return self.required and self.status != "ok"


class Check:
    """One run of the parts that were asked for.

    Args:
        out: the folder for what stays: gpu-check-PARTS-DEVICE.json and .png, gpu-check-PARTS.log.
        dry: on a CPU, with tiny shapes.
        asked: names of visits and parts; none for all. Raises ValueError for one that there isn't.
    """

    def __init__(self, out: Path, dry: bool, asked: Sequence[str] = ()) -> None:
        self.out, self.dry = out, dry
        self.device = "cpu" if dry else "cuda"
        # The libraries of our own that the parts are about.
        self.own, self.compiled = ("cpu", "cpu") if dry else ("cuda", "triton")
        self.processes = 2 if dry else min(12, max(1, (os.cpu_count() or 1) * 3 // 4))
        self.folder = tempfile.TemporaryDirectory(prefix="gpu-check-")
        self.work = Path(self.folder.name)
        inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        self.path = [str(package_in(self.work / "tree")), str(ROOT), *inherited]
        self.without_triton = self.work / "without_triton"
        self.without_triton.mkdir()
        (self.without_triton / "triton.py").write_text("raise ModuleNotFoundError('this part does without Triton')\n")
        self.measured = self.work / "measured"  # what "auto" measures in this run, from nothing
        known = {part.name: part for part in self.parts()}
        visits = {name: parts for name, (_, parts) in VISITS.items()}
        for name in asked:
            if name not in known and name not in visits:
                raise ValueError(f"there is no part {name!r}: expected one of {', '.join([*visits, *known])}")
        names = [part for name in asked or known for part in visits.get(name, (name,))]
        self.chosen = [known[name] for name in dict.fromkeys(names)]
        self.stem = "-".join(["gpu-check", *asked])
        self.outcomes: list[Outcome] = []
        out.mkdir(parents=True, exist_ok=True)
        self.log = (out / f"{self.stem}.log").open("w")

    def say(self, text: str) -> None:
        for file in (sys.stdout, self.log):
            file.write(text + "\n")  # at once: several threads say something
            file.flush()

    # --- the parts ---

    def parts(self) -> list[Part]:
        """Every part, in the order in which all of them run."""
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # an allocator's pool would hide accesses out of bounds
        alone = {"PYTHONPATH": os.pathsep.join([str(self.without_triton), *self.path])}
        return [
            Part("build", 600, {"build": self._build()}, environment={"FASTDCGAN_BOUNDED_WAITS": "1"}),
            self._part("doctor", 20, "doctor"),
            Part("capture", 40, self._tests(*CAPTURES), environment=alone),
            Part("tiles", 65, self._tiles(), each_s=PROCESS_S),
            self._step("cuda-step", 50, 128, HEADLINE, environment=alone),
            Part("cuda-tests", 60, self._tests("tests", *(f"--ignore={path}" for path in CAPTURES)), environment=alone),
            Part("memcheck", 45, self._sanitized(), environment=uncached),
            Part("compile", 60, {"compile": self._worker("compile")}),
            Part("smoke", 45, self._shares(self._kernels(self.compiled))),
            self._step("step-128", 50, 128, STEP),
            self._step("step-1024", 55, 1024, STEP),
            self._step("step-32", 35, 32, STEP),
            self._step("graphs", 40, 128, GRAPHS, environment={"FASTDCGAN_BACKEND": self.compiled}),
            self._part("contractions-128", 45, "contractions", *self._timing(128, 0.5)),
            self._part("blocks", 40, "blocks", *self._timing(128, 1), "--case", *(DRY_CASE if self.dry else BLOCKS)),
            self._part("bandwidth", 30, "bandwidth"),
            self._part("ceilings", 15, "ceilings"),
            self._step("fp32-128", 25, 128, FP32),
            *(self._step(f"compiled-{batch}", 200, batch, COMPILED, required=False) for batch in (128, 1024, 32)),
        ]

    def _file(self, name: str) -> str:
        return str(self.work / f"{name}.json")

    def _worker(self, *arguments: str) -> list[str]:
        dry = ["--dry"] if self.dry else []
        module = "fastdcgan.benchmarks.gpu_worker"
        return [sys.executable, "-u", "-m", module, "--device", self.device, *dry, *arguments]

    def _part(self, name: str, limit_s: float, command: str, *arguments: str, **settings: Any) -> Part:
        """A part that writes a results file."""
        return Part(name, limit_s, {name: self._worker(command, self._file(name), *arguments)}, **settings)

    def _timing(self, batch: int, seconds: float) -> tuple[str, ...]:
        return "--batch", str(4 if self.dry else batch), "--seconds", str(seconds / 6 if self.dry else seconds)

    def _step(self, name: str, limit_s: float, batch: int, case: Sequence[str], **settings: Any) -> Part:
        timing = self._timing(batch, 6)
        return self._part(name, limit_s, "step", *timing, "--case", *(DRY_CASE if self.dry else case), **settings)

    def _shares(self, command: Sequence[str]) -> dict[str, list[str]]:
        """A command whose work is shared by processes, since what takes its time is a compiler."""
        n = self.processes
        return {f"{i + 1} of {n}": [*command, "--share", str(i), str(n)] for i in range(n)}

    def _tiles(self) -> dict[str, list[str]]:
        return {
            f"tile {number}, early launch {early}": self._kernels(self.own, "--early", early, tiles=[number])
            for number in range(1 if self.dry else TILES)
            for early in ("on", "off")
        }

    def _kernels(self, backend: str, *arguments: str, tiles: Sequence[int] = ()) -> list[str]:
        chosen = ["--tiles", *map(str, tiles)] if tiles and not self.dry else []  # there are none on a CPU
        return self._worker("kernels", "--backend", backend, *arguments, *chosen)

    def _build(self) -> list[str]:
        return [sys.executable, "setup.py", *(("--version",) if self.dry else ("build_ext", "--inplace"))]

    def _tests(self, *arguments: str) -> dict[str, list[str]]:
        """The tests that ask which device to test, but for those of Triton and of inductor, which uses it; `make test`
        has the others."""
        # What fails is named as it does (-v, over the project's -q): the end may not be reached.
        options = ["-vv", "-rf", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        options += ["--import-mode=importlib", "-W", "error:fastdcgan:RuntimeWarning"]
        options += ["-m", "device", "-k", "not inductor and not compiled_networks", "--ignore=tests/kernels"]
        # A dry run shows that they are found on this device; `make test` is what runs them there.
        how = ["--collect-only", "-q"] if self.dry else self._parallel()
        return {"tests": [sys.executable, "-m", "pytest", *options, *how, *arguments]}

    def _parallel(self) -> list[str]:
        """Arguments that spread tests over processes, where pytest-xdist is there and the machine has cores for it."""
        found = importlib.util.find_spec("xdist") is not None
        return ["-n", str(self.processes), "--dist", "worksteal"] if found and self.processes > 1 else []

    def _sanitized(self) -> dict[str, list[str]]:
        """Kernels of the CUDA library under memcheck (a dry run does without that), the large tiles among them."""
        found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        options = ["--tool", "memcheck", "--error-exitcode", "1", "--target-processes", "all"]
        sanitizer = [] if self.dry else [found or "compute-sanitizer", *options]
        return {
            "steps": [*sanitizer, *self._worker("smallest")],
            "tiles": [*sanitizer, *self._kernels(self.own, "--share", "0", "6", tiles=range(TILES))],
        }

    # --- running them ---

    def run(self) -> int:
        """The parts, then the report. Returns the exit code."""
        began = time.monotonic()
        left = 0.0  # what the parts before have left of their time
        path = None
        with contextlib.closing(self.log):
            for part in self.chosen:
                left += part.limit_s - self._run_part(part, left + part.limit_s)
                path = self._write()
            if path is not None:
                report = self._worker("report", str(path), str(path.with_suffix(".png")))
                self._run_part(Part("report", REPORT_S, {"report": report}, required=False), REPORT_S)
            self._summary(path, time.monotonic() - began)
        self.folder.cleanup()
        return int(any(outcome.bad for outcome in self.outcomes))

    def _run_part(self, part: Part, limit_s: float) -> float:
        """Run it; the seconds that it took."""
        began = time.monotonic()
        self.say(f"\n== {part.name} (at most {limit_s:.0f} s)")
        each_s = min(limit_s, part.each_s)

        def run(name: str) -> tuple[str, str]:
            now = min(each_s, limit_s - (time.monotonic() - began))
            prefix = f"[{name}] " if len(part.commands) > 1 else ""
            return self._execute(part.commands[name], now, part.environment, prefix)

        with ThreadPoolExecutor(self.processes) as pool:
            found = dict(zip(part.commands, pool.map(run, part.commands), strict=True))
        bad = {name: (status, detail) for name, (status, detail) in found.items() if status != "ok"}
        status = min(status for status, _ in (bad or found).values())  # "failed" before "out of time"
        detail = "; ".join(f"{name}: {status}, {detail}" for name, (status, detail) in bad.items())
        if len(found) == 1:
            (detail,) = (detail for _, detail in found.values())
        seconds = time.monotonic() - began
        self.outcomes.append(Outcome(part.name, status, round(seconds, 1), part.required, detail))
        self.say(f"== {part.name}: {status} after {seconds:.0f} s. {detail}")
        return seconds

    def _execute(self, command: Sequence[str], limit_s: float, more: Mapping[str, str], prefix: str) -> tuple[str, str]:
        """Run it with its output shown line by line; (status, its last line or why it didn't end well)."""
        if limit_s <= 0:
            return "out of time", "not started"
        environment = {
            "TRITON_CACHE_DIR": str(self.work / "triton"),
            **os.environ,
            "PYTHONPATH": os.pathsep.join(self.path),
            "PYTHONSAFEPATH": "1",  # the working folder, which has a part of the package, is not looked at
            "PYTHONUNBUFFERED": "1",
            "MPLBACKEND": "Agg",
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"),
            "FASTDCGAN_AUTOTUNE_CACHE": str(self.measured),
            "FASTDCGAN_TEST_DEVICE": self.device,
        }
        if self.dry:
            environment["OMP_NUM_THREADS"] = "1"  # tiny shapes gain nothing from more, and lose on a busy machine
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**environment, **more},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # so that the limit ends what it started, too
            )
        except OSError as error:
            return "failed", str(error)
        last = [""]

        def show() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                self.say(prefix + line.rstrip("\n"))
                last[0] = line.strip() or last[0]

        reader = threading.Thread(target=show, daemon=True)
        reader.start()
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            reader.join(5)
            return "out of time", f"ended after its {limit_s:.0f} s; last line: {last[0]}"
        reader.join(5)
        return ("ok", last[0]) if code == 0 else ("failed", f"exit code {code}; last line: {last[0]}")

    # --- results ---

    def _write(self) -> Path | None:
        """All parts' results in one file, and what became of the parts; None while there are no results."""
        merged: dict = {}
        for path in sorted(self.work.glob("*.json"), key=lambda p: p.stat().st_mtime):
            found = json.loads(path.read_text())
            if not merged:
                merged = found
            else:
                merged["cases"] += found["cases"]
                merged["extra"] |= found["extra"]
        if not merged:
            return None
        if self.measured.exists():
            merged["extra"]["measured"] = json.loads(self.measured.read_text())["machines"]
        merged["extra"]["parts"] = [asdict(outcome) for outcome in self.outcomes]
        device = merged["environment"]["device"].lower()
        slug = "dry" if self.dry else re.sub(r"[^a-z0-9]+", "-", device).strip("-")
        path = self.out / f"{self.stem}-{slug}.json"
        path.write_text(json.dumps(merged, indent=1) + "\n")
        return path

    def _summary(self, path: Path | None, seconds: float) -> None:
        self.say(f"\n== summary, after {seconds:.0f} s")
        for outcome in self.outcomes:
            needed = "" if outcome.required else " (not required)"
            self.say(f"{outcome.status:12} {outcome.seconds:6.1f} s  {outcome.name}{needed}: {outcome.detail}")
        failed = [outcome.name for outcome in self.outcomes if outcome.bad]
        self.say(f"failed: {', '.join(failed)}" if failed else "all required parts passed")
        self.say(f"results: {path or 'none'}")


def package_in(folder: Path) -> Path:
    """`folder` with the package laid out as an installation has it, by links into the tree."""
    package = folder / "fastdcgan"
    package.mkdir(parents=True)
    found = {path.name: path for path in (*(ROOT / "fastdcgan").iterdir(), ROOT / "kernels", ROOT / "benchmarks")}
    for name, path in found.items():
        (package / name).symlink_to(path)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    def asked(name: str) -> bool:
        return os.environ.get(name, "") not in ("", "0")

    parser = argparse.ArgumentParser(prog="gpu_check", description=(__doc__ or "").split("\n\n")[0])
    parts = os.environ.get("PARTS", "")
    parser.add_argument("--parts", default=parts, metavar="NAME,...", help="visits and parts (default: all)")
    parser.add_argument("--no-build", action="store_true", default=asked("NO_BUILD"), help="all but the part build")
    parser.add_argument("--dry", action="store_true", default=asked("DRY"), help="on a CPU, with tiny shapes")
    where = os.environ.get("OUT") or None
    parser.add_argument("--out", type=Path, default=where, help="folder (default: benchmarks/results)")
    args = parser.parse_args(arguments)
    out: Path | None = args.out
    if out is None:
        out = Path(tempfile.mkdtemp(prefix="gpu-check-dry-")) if args.dry else ROOT / "benchmarks" / "results"
    try:
        check = Check(out, args.dry, [name.strip() for name in args.parts.split(",") if name.strip()])
    except ValueError as error:
        parser.error(str(error))
    if args.no_build:
        check.chosen = [part for part in check.chosen if part.name != "build"]
    return check.run()


if __name__ == "__main__":
    sys.exit(main())
