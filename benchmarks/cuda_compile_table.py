"""What the CUDA C++ contractions compile to, without a GPU: `python -m fastdcgan.benchmarks.cuda_compile_table`.

Every instantiation in csrc/cuda/contraction_*.cu is compiled for sm_80, sm_90 and sm_100, those in warpgroup_*.cu for
sm_90a, and what ptxas says of it, and what cuobjdump (the one that Triton ships) shows of its code, goes to
`results/cuda_compile.json` and `.md`:

    registers, spills      of a thread; bytes that spill
    instructions           of machine code
    tensor core            matrix instructions (HMMA; of warpgroups HGMMA)
    loads of matrices      from shared memory for these (LDSM); floats take plain loads, and wgmma reads shared memory
                           itself but for a factor with a prologue
    asynchronous copies    from global to shared memory (LDGSTS; of boxes UTMALDG)
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
from typing import Any

import triton

from fastdcgan.backends.cuda_tiles import OF_WARPGROUPS, TILES, WarpgroupTile
from fastdcgan.benchmarks.results import RESULTS

CSRC = Path(__file__).resolve().parent.parent / "csrc"
ARCHITECTURES = (80, 90, 100)
TABLE = RESULTS / "cuda_compile.json"
OPS = ("conv", "conv_transpose", "weight_grad")
_NAME = re.compile(
    r"ContractionILNS0_2OpE(?P<op>\d)ENS0_10MultipliedI(?P<type>NS_3gpu4(?:bf16|fp16)E|f)Lb(?P<exact>\d)E"
    r"EENS0_9TileShapeI(?P<tile>(?:Li\d+E)+)E"
)
_WARPGROUP_NAME = re.compile(
    r"WarpgroupContractionILNS0_2OpE(?P<op>\d)E(?P<type>NS_3gpu4(?:bf16|fp16)E)"
    r"NS0_14WarpgroupShapeI(?P<tile>(?:Li\d+E)+)EELb(?P<prologue>\d)E"
)


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture."""

    arch: int
    op: str
    dtype: str  # "bf16", "fp16", "tf32" or "fp32"
    tile: int  # of `cuda_tiles.TILES`
    prologue: bool  # whether it has one; kernels but those of warpgroups have all
    registers: int
    spills: int
    instructions: int
    tensor_core: int
    matrix_loads: int
    async_copies: int

    @property
    def key(self) -> str:
        kernel = f"sm_{self.arch} {self.op} {self.dtype} tile {self.tile}"
        return kernel if self.prologue or self.tile not in OF_WARPGROUPS else f"{kernel} without prologue"


def nvcc() -> str | None:
    return shutil.which("nvcc")


def sources() -> list[Path]:
    """The files that have the instantiations."""
    return sorted((CSRC / "cuda").glob("contraction_*.cu"))


def jobs(architectures: Sequence[int] = ARCHITECTURES) -> list[tuple[Path, int]]:
    """What is compiled, and for what."""
    found = [(source, arch) for arch in architectures for source in sources()]
    return found + [(source, 90) for source in sorted((CSRC / "cuda").glob("warpgroup_*.cu")) if 90 in architectures]


def compile_source(source: Path, arch: int) -> list[Compiled]:
    """Every contraction in a file; those of warpgroups with the instructions of sm_90a."""
    feature = "a" if source.name.startswith("warpgroup_") else ""
    compiler = nvcc()
    assert compiler is not None, "nvcc compiles them, and it is not on PATH"
    with tempfile.TemporaryDirectory() as scratch:
        cubin = Path(scratch) / "kernels.cubin"
        target = f"-gencode=arch=compute_{arch}{feature},code=sm_{arch}{feature}"
        command = [compiler, "-std=c++20", "-O3", "-cubin", target, "-Xptxas=-v", f"-I{CSRC}"]
        done = subprocess.run(
            [*command, f"-I{CSRC / 'cuda'}", str(source), "-o", str(cubin)], capture_output=True, text=True
        )
        assert done.returncode == 0, f"{source.name} doesn't compile for sm_{arch}:\n{done.stderr}"
        code = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-sass", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
    said = done.stdout + done.stderr
    assert "instructions are serialized" not in said, f"products wait for each other in {source.name}:\n{said}"
    return list(_kernels(said, code, arch))


def _kernels(said: str, code: str, arch: int) -> Sequence[Compiled]:
    bodies = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", code, re.DOTALL))
    found = []
    for name, facts in re.findall(
        r"Compiling entry function '(\S+)'[^\n]*\n(.*?)(?=Compiling entry|\Z)", said, re.DOTALL
    ):
        kind, of_warpgroups = _NAME.search(name), _WARPGROUP_NAME.search(name)
        if kind is None and of_warpgroups is None:
            continue
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", facts)
        registers = re.search(r"Used (\d+) registers", facts)
        assert spills is not None and registers is not None, facts
        instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", bodies[name])
        op, dtype, tile, prologue = _of_warpgroups(of_warpgroups) if of_warpgroups else _of_warps(kind)
        found.append(
            Compiled(
                arch,
                op,
                dtype,
                tile,
                prologue,
                int(registers[1]),
                max(int(spills[1]), int(spills[2])),
                len(instructions),
                sum(name.startswith(("HMMA", "HGMMA")) for name in instructions),
                sum(name.startswith("LDSM") for name in instructions),
                sum(name.startswith(("LDGSTS", "UTMALDG")) for name in instructions),
            )
        )
    return found


def _of_warps(kind: Any) -> tuple[str, str, int, bool]:
    """Contraction, dtype, tile and whether it has prologues, from a kernel's name."""
    number = {"NS_3gpu4bf16E": "bf16", "NS_3gpu4fp16E": "fp16", "f": "fp32" if kind["exact"] == "1" else "tf32"}
    dtype = number[kind["type"]]
    m, n, k, warps_m, warps_n, stages, blocks = (int(x) for x in re.findall(r"Li(\d+)E", kind["tile"]))
    shape = (m, n, k, warps_m * warps_n, stages, blocks)
    own = [i for i, t in enumerate(TILES) if (t.m, t.n, t.k, t.warps, t.stages, t.blocks) == shape]
    (tile,) = [i for i in own if (i < 5) == (dtype in ("bf16", "fp16"))]
    return OPS[int(kind["op"])], dtype, tile, True


def _of_warpgroups(kind: Any) -> tuple[str, str, int, bool]:
    shape = tuple(int(x) for x in re.findall(r"Li(\d+)E", kind["tile"]))
    (tile,) = [i for i, t in enumerate(TILES) if isinstance(t, WarpgroupTile) and (t.n, t.blocks, t.ring) == shape]
    return OPS[int(kind["op"])], kind["type"][8:12], tile, kind["prologue"] == "1"


def compile_all(architectures: Sequence[int] = ARCHITECTURES, workers: int = 2) -> list[Compiled]:
    with ThreadPoolExecutor(workers) as pool:
        return [row for rows in pool.map(lambda job: compile_source(*job), jobs(architectures)) for row in rows]


def _loads_matrices(compiled: Compiled) -> bool:
    """Whether a factor passes through registers: of warpgroups, one with a prologue; weight_grad's don't."""
    return compiled.tile not in OF_WARPGROUPS or (compiled.prologue and compiled.op != "weight_grad")


def faults(compiled: Compiled) -> list[str]:
    """What no kernel may be, in words; empty if it is fine."""
    found = [f"{compiled.spills} bytes of spills"] if compiled.spills else []
    found += [] if compiled.tensor_core else ["no tensor core instruction"]
    found += [] if compiled.async_copies else ["no asynchronous copy"]
    if compiled.dtype in ("bf16", "fp16") and _loads_matrices(compiled) and not compiled.matrix_loads:
        found.append("no load of matrices")
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
    rows = sorted(rows, key=lambda row: (row.arch, row.dtype, row.op, row.tile, row.prologue))
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
                name = f"{tile.m}x{tile.n}x{tile.k}"
                if isinstance(tile, WarpgroupTile):
                    name += " wgmma" + (" with prologue" if row.prologue else "")
                cells = [row.op, row.dtype, name, *(str(getattr(row, c)) for c in counts)]
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
