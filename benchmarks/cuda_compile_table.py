"""What the CUDA C++ contractions compile to, without a GPU: `python -m fastdcgan.benchmarks.cuda_compile_table`.

The extension is built as setup.py builds it by default, in `build/cuda-test` (as `tests/test_cuda_build.py` does; only
what has changed is compiled). What cuobjdump, the one that Triton ships, says of each contraction in it goes to
`results/cuda_compile.json` and `.md`:

    registers              of a thread
    stack                  bytes of a thread: what spilled, arrays that are not in registers
    instructions           of machine code
    tensor core            matrix instructions (HMMA; of warpgroups HGMMA)
    groups                 of warpgroups' products that are under way together; as many as there are products where each
                           waits for the one before
    loads of matrices      from shared memory for these (LDSM); floats take plain loads, and wgmma reads shared memory
                           itself but for a factor with a prologue
    asynchronous copies    from global to shared memory (LDGSTS; of boxes UTMALDG)
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton

from fastdcgan.backends.cuda_tiles import OF_WARPGROUPS, TILES, WarpgroupTile
from fastdcgan.benchmarks.results import RESULTS

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "cuda-test"
ARCHITECTURES = {80: "sm_80", 90: "sm_90a", 100: "sm_100"}  # that setup.py builds for by default
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
    stack: int
    instructions: int
    tensor_core: int
    groups: int
    matrix_loads: int
    async_copies: int

    @property
    def key(self) -> str:
        kernel = f"sm_{self.arch} {self.op} {self.dtype} tile {self.tile}"
        return kernel if self.prologue or self.tile not in OF_WARPGROUPS else f"{kernel} without prologue"


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def build() -> Path:
    """The extension as setup.py builds it for the default architectures; RuntimeError with what was printed."""
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
    environment |= {"FASTDCGAN_EXTENSION": "_cuda", "FASTDCGAN_FORCE_CUDA": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # it would be built for the GPUs here
    environment["MAX_JOBS"] = os.environ.get("MAX_JOBS") or str(max(1, (os.cpu_count() or 1) // 2))
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", str(WORK / "temp"), "--build-lib"]
    done = subprocess.run(
        [*command, str(WORK / "lib")], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800
    )
    if done.returncode != 0:
        raise RuntimeError(done.stdout[-4000:] + done.stderr[-4000:])
    return WORK / "lib" / "fastdcgan" / "_cuda.so"


def dump(library: Path, *options: str) -> Iterator[str]:
    """The lines that cuobjdump prints of a library."""
    command = [triton.knobs.nvidia.cuobjdump.path, *options, str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)


def machine_code(library: Path, arch: int) -> Iterator[tuple[str, list[str]]]:
    """(name, instructions with their operands) of each kernel for an architecture."""
    name, code = "", []
    for line in dump(library, "-sass", "-arch", ARCHITECTURES[arch]):
        if found := re.match(r"\s*Function : (\S+)", line):
            if name:
                yield name, code
            name, code = found[1], []
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][^;]*);", line):
            code.append(found[1])
    if name:
        yield name, code


def contractions(library: Path, arch: int, code: Iterable[tuple[str, list[str]]] | None = None) -> list[Compiled]:
    """Every contraction in a library for an architecture, which `code` may have the machine code of."""
    usage = "".join(dump(library, "--dump-resource-usage", "-arch", ARCHITECTURES[arch]))
    resources = {
        name: (int(registers), int(stack))
        for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)
    }
    found = []
    for name, instructions in machine_code(library, arch) if code is None else code:
        kind, of_warpgroups = _NAME.search(name), _WARPGROUP_NAME.search(name)
        if kind is None and (of_warpgroups is None or arch != 90):  # elsewhere these are empty
            continue
        names = [instruction.split()[0] for instruction in instructions]
        op, dtype, tile, prologue = _of_warpgroups(of_warpgroups) if of_warpgroups else _of_warps(kind)
        found.append(
            Compiled(
                arch,
                op,
                dtype,
                tile,
                prologue,
                *resources[name],
                len(names),
                sum(name.startswith(("HMMA", "HGMMA")) for name in names),
                sum(each.startswith("HGMMA") and "gsb0" in each for each in instructions),
                sum(name.startswith("LDSM") for name in names),
                sum(name.startswith(("LDGSTS", "UTMALDG")) for name in names),
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


def _loads_matrices(compiled: Compiled) -> bool:
    """Whether a factor passes through registers: of warpgroups, one with a prologue; weight_grad's don't."""
    return compiled.tile not in OF_WARPGROUPS or (compiled.prologue and compiled.op != "weight_grad")


def faults(compiled: Compiled) -> list[str]:
    """What no kernel may be, in words; empty if it is fine."""
    found = [f"{compiled.stack} bytes of stack"] if compiled.stack else []
    found += [] if compiled.tensor_core else ["no tensor core instruction"]
    found += [] if compiled.async_copies else ["no asynchronous copy"]
    if compiled.dtype in ("bf16", "fp16") and _loads_matrices(compiled) and not compiled.matrix_loads:
        found.append("no load of matrices")
    if compiled.tile in OF_WARPGROUPS and compiled.groups > compiled.tensor_core // 2:
        found.append("products that wait for each other")
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
    counts = ("registers", "stack", "instructions", "tensor_core", "groups", "matrix_loads", "async_copies")
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
    arguments = parser.parse_args()
    library = build()
    rows = [row for arch in ARCHITECTURES for row in contractions(library, arch)]
    write(rows, arguments.out)
    bad = {row.key: faults(row) for row in rows if faults(row)}
    for key, reasons in bad.items():
        print(f"{key}: {'; '.join(reasons)}")
    print(f"{len(rows)} kernels: {arguments.out}")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
