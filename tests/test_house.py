"""What each room of the package may import, how long a file and how full a folder may be, and words that are gone."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.machine import ROOT

# From the top to the bottom: a room imports from itself, from its own line and from the lines below.
ROOMS = (
    ("__init__", "__main__"),
    ("cli",),
    ("benchmarks",),
    ("dcgan",),
    ("gan_step",),
    ("capture",),
    ("train_step",),
    ("doctor",),
    ("explain",),
    ("fuse", "folding", "compiler"),
    ("layers", "functional"),
    ("optim", "losses", "images"),
    ("engine",),
    ("dispatch",),
    ("backends",),
    ("build_info",),
    ("checks",),
    ("kernels",),
    ("spec",),
    ("activations", "geometry", "version"),
)
FOLDERS = {"fastdcgan": "fastdcgan", "fastdcgan.kernels": "kernels", "fastdcgan.benchmarks": "benchmarks"}
MOST_LINES, MOST_SOURCES = 500, 15
# Old words of the kernels and of what runs them; docs/glossary.md has the ones that took their place.
OLD_WORDS = r"seams?|turned|Sink|Loaded|box(es)?|walks?|sweeps?|streaming|scattered"
HOMES_OF_OLD_WORDS = {"csrc", "kernels", "cuda_on_cpu", "backends", "dispatch", "engine"}


def sources() -> dict[str, str]:
    """The text of every module by its name, packages as `name.__init__`."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            if not path.is_relative_to(ROOT / folder / "results"):
                name = ".".join((package, *path.relative_to(ROOT / folder).with_suffix("").parts))
                found[name] = path.read_text()
    return found


def imported(source: str, modules: Mapping[str, str]) -> Iterator[str]:
    """The modules that a text imports anywhere in it: in functions, under TYPE_CHECKING, and by `import_module`."""

    def module_of(name: str) -> Iterator[str]:
        yield from (found for found in (name, f"{name}.__init__") if found in modules)

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from module_of(alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            for alias in node.names:
                yield from list(module_of(f"{node.module}.{alias.name}")) or module_of(node.module or "")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            # The start of a name that is put together stands for all modules that start so.
            given = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            if isinstance(given, ast.Constant):
                whole = given is node.args[0]
                yield from (
                    module_of(given.value)
                    if whole
                    else (m for m in modules if m.startswith(given.value) and m != f"{given.value}__init__")
                )


def room_of(module: str) -> str:
    return module.split(".")[1]


def faults(modules: Mapping[str, str], rooms: tuple[tuple[str, ...], ...]) -> list[str]:
    """Imports that go up, rooms that have no place, and a circle of files or of rooms, if there is one."""
    level = {room: i for i, line in enumerate(rooms) for room in line}
    found = [f"{module} is in no room" for module in modules if room_of(module) not in level]
    if found:
        return found
    files = {module: set(imported(source, modules)) for module, source in modules.items()}
    for module, others in files.items():
        above = (other for other in others if level[room_of(other)] < level[room_of(module)])
        found += [f"{module} imports {other}, which is above it" for other in above]
    between: dict[str, set[str]] = {}
    for module, others in files.items():
        between.setdefault(room_of(module), set()).update({room_of(o) for o in others} - {room_of(module)})
    for graph in (files, between):
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            found.append(f"a circle: {' -> '.join(reversed(error.args[1]))}")
    return found


def test_nothing_is_imported_from_a_room_above_nor_in_a_circle() -> None:
    found = faults(sources(), ROOMS)
    assert not found, "\n".join(found)


SMALL = {
    "house.__init__": "from house.attic import a\nfrom house import loft",
    "house.attic.__init__": "import house.attic.a",
    "house.attic.a": "from house.cellar import wine",
    "house.loft": "import torch",
    "house.cellar": "def f():\n    import os",
    "house.garage": "from typing import TYPE_CHECKING",
}
SMALL_ROOMS = (("__init__",), ("attic", "loft"), ("cellar", "garage"))


@pytest.mark.parametrize(
    ("module", "line", "fault"),
    [
        ("house.cellar", "from house import loft", "house.cellar imports house.loft, which is above it"),
        ("house.cellar", "import house", "house.cellar imports house.__init__, which is above it"),
        ("house.cellar", "import house.attic as x", "house.cellar imports house.attic.__init__, which is above it"),
        ("house.garage", "if TYPE_CHECKING:\n    from house.attic.a import A", "house.garage imports house.attic.a,"),
        (
            "house.garage",
            "def f():\n    from house.attic import a",
            "house.garage imports house.attic.a, which is above",
        ),
        ("house.garage", "import_module(f'house.att{name}')", "house.garage imports house.attic.a, which is above it"),
        ("house.garage", "importlib.import_module('house.loft')", "house.garage imports house.loft, which is above it"),
        ("house.attic.a", "def f():\n    from house.attic import b", "a circle: house.attic."),
        ("house.loft", "import house.attic.a\nimport house.barn", "house.barn is in no room"),
    ],
)
def test_planted_faults_are_found(module: str, line: str, fault: str) -> None:
    assert not faults(SMALL, SMALL_ROOMS)
    planted = {**SMALL, module: f"{SMALL[module]}\n{line}"}
    if "barn" in line:
        planted["house.barn"] = ""
    assert any(found.startswith(fault) for found in faults(planted, SMALL_ROOMS)), faults(planted, SMALL_ROOMS)


def test_a_circle_within_a_line_is_found() -> None:
    planted = {**SMALL, "house.cellar": "import house.garage", "house.garage": "def f():\n    import house.cellar"}
    assert any(found.startswith("a circle: house.") for found in faults(planted, SMALL_ROOMS))
    # Of rooms, though no file comes back to itself
    planted = {**SMALL, "house.attic.b": "import house.loft", "house.loft": "import house.attic.a"}
    assert any(re.match(r"a circle: (attic|loft)", found) for found in faults(planted, SMALL_ROOMS))


# --- the files -------------------------------------------------------------------------------------------------------


def files() -> list[Path]:
    """What git knows of and is there, written by hand."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("no git here that knows the files")
    paths = [Path(name) for name in listed.stdout.splitlines()]
    return [path for path in paths if "results" not in path.parts and (ROOT / path).is_file()]


def test_files_are_short_and_folders_have_room() -> None:
    code = [path for path in files() if path.suffix in (".py", ".h", ".cuh", ".cpp", ".cu")]
    assert code
    lines = {str(path): len((ROOT / path).read_text().splitlines()) for path in code}
    assert not {name: count for name, count in lines.items() if count > MOST_LINES}
    folders = [path.parent for path in code if path.parts[0] == "csrc"]
    assert not {str(folder): folders.count(folder) for folder in folders if folders.count(folder) > MOST_SOURCES}


def test_old_words_are_gone() -> None:
    old = re.compile(rf"\b({OLD_WORDS})\b")
    found = []
    for path in files():
        if path.suffix in (".py", ".h", ".cuh", ".cpp", ".cu") and set(path.parts) & HOMES_OF_OLD_WORDS:
            text = (ROOT / path).read_text()
            found += [f"{path}:{text.count(chr(10), 0, m.start()) + 1}: {m[0]}" for m in old.finditer(text)]
    assert not found, "\n".join(found)
