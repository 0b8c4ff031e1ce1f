"""What the CUDA C++ contractions compile to, without a GPU: `python -m fastdcgan.benchmarks.cuda_compile_table`.

Every instantiation in csrc/cuda/contraction_*.cu is compiled for sm_80, sm_90 and sm_100, and what ptxas says of it,
and what cuobjdump (the one that Triton ships) shows of its code, goes to `results/cuda_compile.json` and `.md`:

    registers, spills      of a thread; bytes that spill
    instructions           of machine code
    tensor core            matrix instructions (HMMA)
    loads of matrices      from shared memory for these (LDSM); floats take plain loads
    asynchronous copies    from global to shared memory (LDGSTS)
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import triton

from fastdcgan.backends.cuda_tiles import TILES
from fastdcgan.benchmarks.results import RESULTS

CSRC = Path(__file__).resolve().parent.parent / "csrc"
ARCHITECTURES = (80, 90, 100)
TABLE = RESULTS / "cuda_compile.json"
OPS = ("conv", "conv_transpose", "weight_grad")
# How much worse than the committed table a kernel may become: at most so many more, or so much of it, if that is more.
MARGINS = {"registers": (16, 0.1), "instructions": (100, 0.2)}
_NAME = re.compile(
    r"ContractionILNS0_2OpE(?P<op>\d)ENS0_10MultipliedI(?P<type>NS_3gpu4(?:bf16|fp16)E|f)Lb(?P<exact>\d)E"
    r"EENS0_9TileShapeI(?P<tile>(?:Li\d+E)+)E"
)


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture."""

    arch: int
    op: str
    dtype: str  # "bf16", "fp16", "tf32" or "fp32"
    tile: int  # of `cuda_tiles.TILES`
    registers: int
    spills: int
    instructions: int
    tensor_core: int
    matrix_loads: int
    async_copies: int

    @property
    def key(self) -> str:
        return f"sm_{self.arch} {self.op} {self.dtype} tile {self.tile}"


def nvcc() -> str | None:
    return shutil.which("nvcc")


def sources() -> list[Path]:
    """The files that have the instantiations."""
    return sorted((CSRC / "cuda").glob("contraction_*.cu"))


def compile_source(source: Path, arch: int) -> list[Compiled]:
    """Every contraction in a file."""
    compiler = nvcc()
    assert compiler is not None, "nvcc compiles them, and it is not on PATH"
    with tempfile.TemporaryDirectory() as scratch:
        cubin = Path(scratch) / "kernels.cubin"
        command = [compiler, "-std=c++20", "-O3", "-cubin", f"-arch=sm_{arch}", "-Xptxas=-v", f"-I{CSRC}"]
        done = subprocess.run(
            [*command, f"-I{CSRC / 'cuda'}", str(source), "-o", str(cubin)], capture_output=True, text=True
        )
        assert done.returncode == 0, f"{source.name} doesn't compile for sm_{arch}:\n{done.stderr}"
        code = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-sass", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
    return list(_kernels(done.stdout + done.stderr, code, arch))


def _kernels(said: str, code: str, arch: int) -> Sequence[Compiled]:
    bodies = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", code, re.DOTALL))
    found = []
    for name, facts in re.findall(
        r"Compiling entry function '(\S+)'[^\n]*\n(.*?)(?=Compiling entry|\Z)", said, re.DOTALL
    ):
        if (kind := _NAME.search(name)) is None:
            continue
        number = {"NS_3gpu4bf16E": "bf16", "NS_3gpu4fp16E": "fp16", "f": "fp32" if kind["exact"] == "1" else "tf32"}
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", facts)
        registers = re.search(r"Used (\d+) registers", facts)
        assert spills is not None and registers is not None, facts
        instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", bodies[name])
        m, n, k, warps_m, warps_n, stages, blocks = (int(x) for x in re.findall(r"Li(\d+)E", kind["tile"]))
        shape = (m, n, k, warps_m * warps_n, stages, blocks)
        dtype = number[kind["type"]]
        own = [i for i, t in enumerate(TILES) if (t.m, t.n, t.k, t.warps, t.stages, t.blocks) == shape]
        (tile,) = [i for i in own if (i < 5) == (dtype in ("bf16", "fp16"))]
        found.append(
            Compiled(
                arch,
                OPS[int(kind["op"])],
                dtype,
                tile,
                int(registers[1]),
                max(int(spills[1]), int(spills[2])),
                len(instructions),
                sum(name.startswith("HMMA") for name in instructions),
                sum(name.startswith("LDSM") for name in instructions),
                sum(name.startswith("LDGSTS") for name in instructions),
            )
        )
    return found


def compile_all(architectures: Sequence[int] = ARCHITECTURES, workers: int = 2) -> list[Compiled]:
    jobs = [(source, arch) for arch in architectures for source in sources()]
    with ThreadPoolExecutor(workers) as pool:
        return [row for rows in pool.map(lambda job: compile_source(*job), jobs) for row in rows]


def faults(compiled: Compiled) -> list[str]:
    """What no kernel may be, in words; empty if it is fine."""
    found = [f"{compiled.spills} bytes of spills"] if compiled.spills else []
    found += [] if compiled.tensor_core else ["no tensor core instruction"]
    found += [] if compiled.async_copies else ["no asynchronous copy"]
    if compiled.dtype in ("bf16", "fp16") and not compiled.matrix_loads:
        found.append("no load of matrices")
    return found


def worse(compiled: Compiled, before: Compiled) -> list[str]:
    """In what `compiled` is worse than the table's `before`, by more than `MARGINS`."""
    found = []
    for name, (absolute, relative) in MARGINS.items():
        old, new = getattr(before, name), getattr(compiled, name)
        if new > old + max(absolute, relative * old):
            found.append(f"{name} {old} -> {new}")
    return found


def version() -> str:
    """nvcc's release, such as 13.0."""
    said = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", said)
    assert found is not None, said
    return found[1]


def read(path: Path = TABLE) -> tuple[str, dict[str, Compiled]]:
    """(nvcc's version, key -> row) of a table."""
    content = json.loads(path.read_text())
    rows = [Compiled(**row) for row in content["kernels"]]
    return content["nvcc"], {row.key: row for row in rows}


def write(rows: Sequence[Compiled], path: Path = TABLE) -> None:
    """The table as JSON, and next to it as Markdown."""
    rows = sorted(rows, key=lambda row: (row.arch, row.dtype, row.op, row.tile))
    kernels = ",\n".join(json.dumps(asdict(row)) for row in rows)
    path.write_text(f'{{"nvcc": "{version()}", "kernels": [\n{kernels}\n]}}\n')
    counts = ("registers", "spills", "instructions", "tensor_core", "matrix_loads", "async_copies")
    lines = [f"# What the CUDA C++ contractions compile to (nvcc {version()})", ""]
    lines += ["Written by `python -m fastdcgan.benchmarks.cuda_compile_table`, which says what the columns mean.", ""]
    for arch in sorted({row.arch for row in rows}):
        lines += [f"## sm_{arch}", "", f"| op | dtype | tile | {' | '.join(counts).replace('_', ' ')} |"]
        lines.append("|---|---|---|" + "---:|" * len(counts))
        for row in rows:
            if row.arch == arch:
                tile = TILES[row.tile]
                cells = [row.op, row.dtype, f"{tile.m}x{tile.n}x{tile.k}", *(str(getattr(row, c)) for c in counts)]
                lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    path.with_suffix(".md").write_text("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TABLE, help="the JSON file (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="compilations at a time (default: %(default)s)")
    arguments = parser.parse_args()
    rows = compile_all(workers=arguments.workers)
    write(rows, arguments.out)
    bad = {row.key: faults(row) for row in rows if faults(row)}
    for key, reasons in bad.items():
        print(f"{key}: {'; '.join(reasons)}")
    print(f"{len(rows)} kernels: {arguments.out}")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
