"""Full disks, leftovers of killed processes, and folders that belong to one process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdcgan.dcgan import files
from tests.machine import ROOT

FULL = """
import resource, sys, zipfile
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from fastdcgan.dcgan import classify, files, images, plots, sampling
from fastdcgan.dcgan.models import Generator

def checkpoint(path):
    with files.replacing(path) as temporary:
        save_file({"a": torch.zeros(9000)}, temporary)

def folder(path):
    with files.new_folder(path) as temporary:
        images.save_numbered([np.random.randint(0, 255, (2, 99, 99, 3), np.uint8)], 2, temporary)

def archive(path):  # whose last bytes would fail at a seek, if they were still in a buffer then
    with files.writing(path) as file:
        zipfile.ZipFile(file, "w").writestr("a", b"a" * 8970)

figure, axes = plots.two_rows()
for one in axes:
    one.plot([0, 1], [0, 1], label="a")
generator = Generator(28, 1, nz=8, ngf=4).eval()
for parameter in generator.parameters():
    torch.nn.init.normal_(parameter)
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
for name, write in {
    "a.safetensors": checkpoint,
    "folder": folder,
    "a.png": lambda path: images.save_image(Image.effect_noise((200, 200), 99), path),
    "plot.png": lambda path: plots.save(figure, path),
    "a.npz": lambda path: classify.save_npz(path, a=np.random.rand(9000), b=np.random.rand(9000)),
    "a.zip": archive,
    "images.npz": lambda path: sampling.write_array(generator, 64, path),
    "images.npy": lambda path: sampling.write_array(generator, 64, path),
    "a.csv": lambda path: files.append(path, "x" * 4000),
}.items():
    try:
        write(Path(name))
    except OSError as error:
        print(error)
"""
NAMES = ["a.safetensors", "folder", "a.png", "plot.png", "a.npz", "a.zip", "images.npz", "images.npy", "a.csv"]


def test_full_disk(tmp_path: Path) -> None:
    """One line that names the file and why; nothing half-written, and what was there is as it was."""
    before = {tmp_path / name: b"y" * 6000 for name in NAMES if name != "folder"}
    for path, content in before.items():
        path.write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", FULL],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    lines = done.stdout.splitlines()
    for name, line in zip(NAMES, lines, strict=True):
        assert f"{name} can't be written: " in line
        assert os.strerror(errno.EFBIG) in line
    assert done.stderr == ""
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("write", [lambda path: files.write(path, ""), lambda path: files.new_folder(path).__enter__()])
def test_places_that_can_not_be_written_to(write, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=rf"^{tmp_path}/file/new can't be written: (Not a directory|File exists)$"):
        write(tmp_path / "file" / "new")


def test_errors_of_other_files_keep_their_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"), files.replacing(tmp_path / "a"):
        (tmp_path / "nowhere").read_bytes()
    assert [*tmp_path.iterdir()] == []


def test_leftovers_of_killed_processes_go(tmp_path: Path) -> None:
    kill = f"""if True:
        import os
        from pathlib import Path
        from fastdcgan.dcgan import files
        with files.writing(Path({str(tmp_path)!r}) / "a") as file, files.new_folder(Path({str(tmp_path)!r}) / "b") as b:
            (b / "c").mkdir()
            os._exit(9)"""
    assert subprocess.run([sys.executable, "-c", kill], check=False).returncode == 9
    assert len([*tmp_path.iterdir()]) == 2
    (tmp_path / ".mine.tmp").write_text("of another program")
    os.mkfifo(tmp_path / f".pipe{files._SUFFIX}")
    with files.writing(tmp_path / "slow") as slow:
        slow.write(b"slow")
        files.write(tmp_path / "quick", "quick")  # leaves alone what is being written
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()} == {
        ".mine.tmp": "of another program",
        "slow": "slow",
        "quick": "quick",
    }
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_folder_belongs_to_one_process(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / files.LOCK).write_text("process 1 on another machine that is long gone, and more than the next one writes")
    with files.locked(run):
        assert (run / files.LOCK).read_text().split()[:2] == ["process", str(os.getpid())]
        with (
            pytest.raises(BlockingIOError, match=rf"^{run} is in use by process {os.getpid()} on \S+: wait for it"),
            files.locked(run),
        ):
            pass
    with files.locked(run):
        pass


def test_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*args: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / f".a{files._SUFFIX}").write_text("perhaps still being written")
    with pytest.warns(RuntimeWarning, match="can't be locked: Function not implemented"), files.locked(tmp_path):
        files.write(tmp_path / "b", "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".a{files._SUFFIX}", files.LOCK, "b"]


def test_long_names(tmp_path: Path) -> None:
    for name in ("x" * 250, "é" * 120):
        files.write(tmp_path / name, name)
        assert (tmp_path / name).read_text() == name


def test_a_line_is_appended(tmp_path: Path) -> None:
    files.append(tmp_path / "a", "one\n")
    files.append(tmp_path / "a", "zwölf\n")
    assert (tmp_path / "a").read_bytes() == "one\nzwölf\n".encode()
