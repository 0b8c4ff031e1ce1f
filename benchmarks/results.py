"""Results: what a run leaves behind, as JSON, and where it was measured."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastdcgan import backends
from fastdcgan.benchmarks import harness
from fastdcgan.benchmarks.harness import Summary
from fastdcgan.dcgan.files import write
from fastdcgan.dispatch import autotune

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"
STATUSES = ("ok", "wrong", "failed", "unavailable")


@dataclass
class Row:
    """One peer in a case.

    Args:
        peer, label: name and label of its `peers.Peer`.
        dtype: "fp32" or "bf16".
        status: "ok"; "wrong" (its result is further from the truth than `tolerance`: it was not timed); "failed" (the
            error is in `detail`); "unavailable" (this machine can't run it, why is in `detail`).
        samples_ms: one a round. `ms` has their median and quartiles.
        ratio: its time over the reference peer's, round by round: above 1, the reference is faster.
        error, tolerance: distance from float64, and how much was allowed.
        saved_bytes: what autograd keeps for the backward. peak_bytes: of GPU memory, weights and optimisers included.
        prepare_s: compilation, warm-up and capture.
        kernels: how many a step runs on a GPU, with copies and fills. host_ms: how long a step keeps the host there.
    """

    peer: str
    label: str
    dtype: str
    status: str = "ok"
    detail: str = ""
    samples_ms: list[float] = field(default_factory=list)
    ms: Summary | None = None
    ratio: Summary | None = None
    error: float | None = None
    tolerance: float | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    prepare_s: float | None = None
    kernels: int | None = None
    host_ms: float | None = None

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"unknown status {self.status!r}: expected one of {', '.join(STATUSES)}")

    def enter(self, seconds: Sequence[float], reference: Sequence[float]) -> None:
        """Enter the seconds of every round, of this peer and of the reference."""
        self.samples_ms = [1e3 * value for value in seconds]
        self.ms = harness.summarise(self.samples_ms)
        self.ratio = harness.ratio(seconds, reference)


@dataclass
class Case:
    """Peers side by side on one thing.

    Args:
        suite: "step", "generate", "blocks", "contractions", "host" or "census".
        name: the block, or the net.
        part: "step"; "eval"; "forward" or "backward"; one of `contractions.PARTS`; one of `host.PARTS`; or, in
            the census, memory format and mode.
        batch: images.
        dtype: the dtype of its rows.
        reference: the peer that ratios are relative to.
    """

    suite: str
    name: str
    part: str
    batch: int
    dtype: str
    reference: str
    rows: list[Row]


@dataclass
class Results:
    """A run. `extra` has what belongs to one kind alone, for example the ceilings of gpu-check."""

    kind: str
    environment: dict
    cases: list[Case]
    dry: bool = False
    extra: dict = field(default_factory=dict)
    schema: int = SCHEMA
    plot: Path | None = None  # a picture beside the file that it was loaded from

    @property
    def bad(self) -> list[tuple[Case, Row]]:
        """What must not be: a peer with a wrong result, or ours failing. Other peers may fail."""
        return [
            (case, row)
            for case in self.cases
            for row in case.rows
            if row.status == "wrong"
            or (row.status == "failed" and (row.peer.startswith("fused") or row.peer == "train"))
        ]

    def write(self, path: Path) -> None:
        """Write it as JSON; the file appears whole or not at all. A NaN, as a wrong result's error may be, is null: the
        run isn't lost for it, and the row's `detail` says it."""
        data = {name: value for name, value in asdict(self).items() if name != "plot"}
        write(path, json.dumps(_finite(data), indent=1, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> Results:
        """Raises ValueError if the file isn't a results file of this schema."""
        try:
            data = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise ValueError(f"{path} has schema {schema!r}: expected {SCHEMA}")
        try:
            cases = [Case(**{**case, "rows": [_row(row) for row in case["rows"]]}) for case in data.pop("cases")]
            return cls(cases=cases, **data)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a results file: {error}") from error


def load(folder: Path = RESULTS) -> list[Results]:
    """All results files of a folder that are no dry runs, newest last."""
    # What compilers made of the kernels lies in the same folder.
    paths = [path for path in sorted(folder.glob("*.json")) if not path.stem.endswith("_compile")]
    found = []
    for path in paths:
        found.append(Results.read(path))
        picture = path.with_suffix(".png")
        found[-1].plot = picture if picture.exists() else None
    return sorted((r for r in found if not r.dry), key=lambda r: str(r.environment["created"]))


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _row(data: dict) -> Row:
    summaries = {key: Summary(**data[key]) for key in ("ms", "ratio") if data[key] is not None}
    return Row(**{**data, **summaries})


# --- where it was measured -------------------------------------------------------------------------------------------


def _output(*command: str) -> str | None:
    """What a command prints, or None where it isn't there or fails: facts about a machine are optional."""
    try:
        folder = Path(__file__).parent
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=folder, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    """The processor, whether it has AMX, which hypervisors leave out of its name, and what is left out by order."""
    name = f"{autotune.processor()} with AMX" if torch.cpu._is_amx_tile_supported() else autotune.processor()
    caps = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
    return ", ".join([name, *(f"{cap}={os.environ[cap]}" for cap in caps if os.environ.get(cap))])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment(device: torch.device) -> dict:
    """Device, driver, versions, commit, threads and the settings that times depend on."""
    facts: dict[str, object] = {
        "device_type": device.type,
        "device": _cpu_name(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "rev-parse", "HEAD"),
        "uncommitted_changes": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "fastdcgan": _version("fastdcgan"),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "backends": backends.status(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        facts |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": _output(*query, f"--id={device.index or 0}"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        }
    return facts
