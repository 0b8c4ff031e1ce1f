"""Everything that needs a GPU, in one command: build, test suite, sanitizer, timings, plot; in under 8 minutes.

    python benchmarks/gpu_check.py [--out DIR] [--dry]        or with OUT=DIR, DRY=1 in the environment

It needs no network and installs nothing but this package, into the Python that runs it. Every part runs in a process of
its own with a limit; one that fails or runs out of time is reported and doesn't stop the others. Results are written
after every part. Exits with 1 if a part that has to work did not. A dry run does every part on a CPU with tiny shapes,
and writes to a temporary folder unless told otherwise.

Only the standard library is imported here, since nothing is installed yet when it starts.
"""

from __future__ import annotations

import argparse
import contextlib
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGET_S = 480.0
REPORT_S = 20.0  # kept for the last part
BATCHES = (128, 32, 1024)
DRY_BATCHES = (4,)

# The tree itself, installed or not: a build that fails should not take the timings with it.
WORKER = """
import sys
root = sys.argv.pop(1)
sys.path.insert(0, root)
import fastdcgan
if root not in fastdcgan.__path__:
    fastdcgan.__path__.append(root)
from fastdcgan.benchmarks.gpu_worker import main
sys.exit(main())
"""

EAGER = (
    ("fp32", "eager", "eager-nhwc", "fused", "train"),
    ("bf16", "eager-nhwc", "graph", "fused", "fused-graph", "train"),
)
COMPILED = (
    ("bf16", "graph", "compile", "train"),
    ("bf16", "compile-max", "compile-graph", "train"),
)
BLOCKS = (("bf16", "graph", "fused-graph"),)
DRY_EAGER = (
    ("fp32", "eager", "eager-nhwc", "fused", "train"),
    ("bf16", "eager-nhwc", "graph", "fused", "fused-graph", "train"),
)
DRY_COMPILED = (("fp32", "compile", "compile-max", "train"),)
DRY_BLOCKS = (("fp32", "eager-nhwc", "graph", "fused"),)


@dataclass
class Part:
    """A step of the check: a command, or why there is none.

    Args:
        name: of the part, and of its results file if it writes one.
        limit_s: seconds it may take.
        command: asked when it is the part's turn; gives what to run, or as text why there is nothing to.
        required: whether the check fails with it.
        environment: more environment variables.
    """

    name: str
    limit_s: float
    command: Callable[[], Sequence[str] | str]
    required: bool = True
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    name: str
    status: str  # "ok" | "failed" | "out of time" | "skipped"
    seconds: float
    required: bool
    detail: str

    @property
    def bad(self) -> bool:
        return self.required and self.status in ("failed", "out of time")


class Check:
    """One run of all parts.

    Args:
        out: the folder for what stays: gpu-check-DEVICE.json, .png and gpu-check.log.
        dry: on a CPU, with tiny shapes.
        budget_s: seconds for everything.
    """

    def __init__(self, out: Path, dry: bool, budget_s: float = BUDGET_S) -> None:
        self.out, self.dry, self.budget_s = out, dry, budget_s
        self.began = time.monotonic()
        self.outcomes: list[Outcome] = []
        self.device = "cpu" if dry else "cuda"
        self.work = Path(tempfile.mkdtemp(prefix="gpu-check-"))
        self.measured = self.work / "measured"  # what "auto" measures in this run, from nothing
        out.mkdir(parents=True, exist_ok=True)
        self.log = (out / "gpu-check.log").open("w")

    def say(self, text: str) -> None:
        print(text, flush=True)
        print(text, file=self.log, flush=True)

    # --- the parts ---

    def parts(self) -> list[Part]:
        """What is run, in this order: the most telling timings first, PyTorch's long compilations last."""
        batches = DRY_BATCHES if self.dry else BATCHES
        eager, compiled, blocks = (DRY_EAGER, DRY_COMPILED, DRY_BLOCKS) if self.dry else (EAGER, COMPILED, BLOCKS)
        seconds = 1 if self.dry else 6
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # an allocator's pool would hide accesses out of bounds
        return [
            Part("build", 180, self._build),
            Part("environment", 60, lambda: self._worker("environment", self._file("environment"))),
            Part("ceilings", 40, lambda: self._worker("ceilings", self._file("ceilings"))),
            Part("bandwidth", 40, lambda: self._worker("bandwidth", self._file("bandwidth")), required=False),
            *(self._timings("step", f"step-{batch}", 75, batch, seconds, eager) for batch in batches),
            Part("tests", 150, self._tests, environment={"FASTDCGAN_TEST_DEVICE": self.device}),
            Part("memcheck", 60, lambda: self._sanitizer("memcheck"), environment=uncached),
            Part("racecheck", 60, lambda: self._sanitizer("racecheck"), environment=uncached),
            self._timings("blocks", "blocks", 60, batches[0], seconds / 6, blocks),
            *(self._contractions(batch, seconds / 12) for batch in (batches[0], batches[-1])[: 1 + (not self.dry)]),
            *(
                self._timings(
                    "step", f"compiled-{batch}", 45 if self.dry else 100, batch, seconds, compiled, required=False
                )
                for batch in batches
            ),
        ]

    def _file(self, name: str) -> str:
        return str(self.work / f"{name}.json")

    def _worker(self, *arguments: str) -> list[str]:
        dry = ["--dry"] if self.dry else []
        return [sys.executable, "-u", "-c", WORKER, str(ROOT), "--device", self.device, *dry, *arguments]

    def _timings(
        self,
        command: str,
        name: str,
        limit_s: float,
        batch: int,
        seconds: float,
        cases: Sequence[Sequence[str]],
        required: bool = True,
    ) -> Part:
        selected = [word for case in cases for word in ("--case", *case)]
        arguments = (command, self._file(name), "--batch", str(batch), "--seconds", str(seconds), *selected)
        return Part(name, limit_s, lambda: self._worker(*arguments), required)

    def _contractions(self, batch: int, seconds: float) -> Part:
        arguments = (self._file(f"contractions-{batch}"), "--batch", str(batch), "--seconds", str(seconds))
        return Part(f"contractions-{batch}", 90, lambda: self._worker("contractions", *arguments), required=False)

    def _build(self) -> Sequence[str]:
        # A dry run prepares the build and installs nothing.
        dry = ["--dry-run"] if self.dry else []
        flags = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
        return [sys.executable, "-m", "pip", "install", *dry, *flags, "-e", str(ROOT)]

    def _tests(self) -> Sequence[str]:
        """The tests that ask which device to test; the others run on a CPU, and `make test` has them."""
        # What fails is named as it does (-v, over the project's -q): the end may not be reached.
        options = ["-vv", "-rf", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        # A dry run shows that they are found on this device; `make test` is what runs them there.
        how = ["--collect-only", "-q"] if self.dry else self._parallel()
        return [sys.executable, "-m", "pytest", *options, *how, "-m", "device", str(ROOT / "tests")]

    def _parallel(self) -> list[str]:
        """Arguments that spread tests over processes, where pytest-xdist is there and the machine has cores for it."""
        workers = min(12, (os.cpu_count() or 1) * 3 // 4)
        found = subprocess.run([sys.executable, "-c", "import xdist"], capture_output=True, check=False).returncode == 0
        return ["-n", str(workers), "--dist", "worksteal"] if found and workers > 1 else []

    def _sanitizer(self, tool: str) -> Sequence[str] | str:
        command = self._worker("smallest", self._file(tool))
        if self.dry:  # the program itself, without the tool, so once is enough
            return command if tool == "memcheck" else "a dry run uses no sanitizer; memcheck ran the same program"
        backends = self._environment().get("backends", {})
        own = [name for name in ("triton", "cuda") if backends.get(name) == "available"]
        if not own:
            return f"no backend with GPU kernels of its own is available: {backends}"
        path = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        if path is None:
            return "compute-sanitizer is neither on the PATH nor in /usr/local/cuda/bin"
        return [path, "--tool", tool, "--error-exitcode", "1", "--target-processes", "all", *command]

    # --- running them ---

    def run(self) -> int:
        """All parts, then the report. Returns the exit code."""
        with contextlib.closing(self.log):
            path = None
            for part in self.parts():
                self._run_part(part, REPORT_S)
                path = self._write()
            self._run_part(Part("report", 60, lambda: self._report(path), required=False), 0.0)
            self._summary(path)
        shutil.rmtree(self.work)
        return int(any(outcome.bad for outcome in self.outcomes))

    def _run_part(self, part: Part, reserve_s: float) -> None:
        began = time.monotonic()
        left = self.budget_s - (began - self.began) - reserve_s
        command = part.command()
        if isinstance(command, str):
            status, detail = "skipped", command
        elif left < 5:
            status, detail = "out of time", f"not started: the budget of {self.budget_s:.0f} s is used up"
        else:
            self.say(f"\n== {part.name} (at most {min(part.limit_s, left):.0f} s)")
            status, detail = self._execute(command, min(part.limit_s, left), part.environment)
        outcome = Outcome(part.name, status, round(time.monotonic() - began, 1), part.required, detail)
        self.outcomes.append(outcome)
        self.say(f"== {part.name}: {outcome.status} after {outcome.seconds:.0f} s. {detail}")

    def _execute(self, command: Sequence[str], limit_s: float, more: dict[str, str]) -> tuple[str, str]:
        """Run it with its output shown line by line; (status, its last line or why it didn't end well)."""
        environment = os.environ | {
            "PYTHONUNBUFFERED": "1",
            "MPLBACKEND": "Agg",
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"),
            "TRITON_CACHE_DIR": str(self.work / "triton"),
            "FASTDCGAN_AUTOTUNE_CACHE": str(self.measured),
        }
        if self.dry:
            # Tiny shapes gain nothing from more threads and processes, and lose on a busy machine.
            environment |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment | more,
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
                self.say(line.rstrip("\n"))
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

    def _environment(self) -> dict:
        path = Path(self._file("environment"))
        return json.loads(path.read_text())["environment"] if path.exists() else {}

    def _report(self, path: Path | None) -> Sequence[str] | str:
        if path is None:
            return "no part left results"
        return self._worker("report", str(path), str(path.with_suffix(".png")))

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
        path = self.out / f"gpu-check-{slug}.json"
        path.write_text(json.dumps(merged, indent=1) + "\n")
        return path

    def _summary(self, path: Path | None) -> None:
        self.say(f"\n== summary, after {time.monotonic() - self.began:.0f} s")
        for outcome in self.outcomes:
            needed = "" if outcome.required else " (not required)"
            self.say(f"{outcome.status:12} {outcome.seconds:6.1f} s  {outcome.name}{needed}: {outcome.detail}")
        failed = [outcome.name for outcome in self.outcomes if outcome.bad]
        self.say(f"failed: {', '.join(failed)}" if failed else "all required parts passed")
        self.say(f"results: {path or 'none'}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dry", action="store_true", default=os.environ.get("DRY", "") not in ("", "0"))
    where = os.environ.get("OUT") or None
    parser.add_argument("--out", type=Path, default=where, help="folder (default: benchmarks/results)")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for everything (default: %(default)s)")
    args = parser.parse_args(arguments)
    out: Path | None = args.out
    if out is None:
        out = Path(tempfile.mkdtemp(prefix="gpu-check-dry-")) if args.dry else ROOT / "benchmarks" / "results"
    return Check(out, args.dry, args.budget).run()


if __name__ == "__main__":
    sys.exit(main())
