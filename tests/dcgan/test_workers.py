"""Decoding in several processes: in order, few results at a time, and what becomes of errors and of interrupts."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdcgan.dcgan import decoding
from fastdcgan.dcgan.decoding import open_image
from fastdcgan.dcgan.sources import IndexedSource
from fastdcgan.dcgan.workers import AT_A_TIME, in_workers
from tests.dcgan.conftest import save


class Numbered(IndexedSource):
    """Images of one pixel, which is their number; every seventh can't be decoded. Counts those that are begun."""

    def __init__(self, count: int) -> None:
        self.count, self.begun = count, multiprocessing.get_context("fork").Value("q", 0)

    def __len__(self) -> int:
        return self.count

    def name_of(self, index: int) -> str:
        return str(index)

    def decode(self, index: int, image_size: int, channels: int) -> np.ndarray:
        with self.begun:
            self.begun.value += 1
        if index % 7 == 6:
            raise OSError(f"number {index}")
        return np.full((1, 1, 1), index, dtype=np.int64)

    def classes(self) -> tuple[list[str], np.ndarray]:
        raise NotImplementedError


@pytest.mark.parametrize("count", [1, AT_A_TIME, 5 * AT_A_TIME + 3])
def test_all_come_in_order(count: int) -> None:
    before = torch.get_rng_state()
    found = list(Numbered(count).decoded(1, 1, 2))
    assert [number for number, _ in found] == list(range(count))
    for number, result in found:
        assert result == (f"OSError: number {number}" if number % 7 == 6 else number)
    assert torch.equal(torch.get_rng_state(), before)


def test_few_decoded_images_wait() -> None:
    """However many there are, and however slowly they are taken."""
    source = Numbered(40 * AT_A_TIME)
    for taken, _ in enumerate(source.decoded(1, 1, 2)):
        if taken % (10 * AT_A_TIME) == 0:
            time.sleep(0.1)
            assert source.begun.value <= taken + 6 * AT_A_TIME
    assert source.begun.value == len(source)


def test_workers_are_other_processes_and_share_the_pixels_in_flight(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 1)
    before = decoding._in_flight.left
    with open_image(tmp_path / "a.png"):

        class Looks(torch.utils.data.Dataset):
            def __len__(self) -> int:
                return 2

            def __getitem__(self, part: int) -> list:
                with open_image(tmp_path / "a.png") as image:
                    assert isinstance(image, Image.Image)
                    return [(os.getpid(), str(decoding._in_flight.left))]

        found = list(in_workers(Looks(), 1))
    assert os.getpid() not in dict(found)
    assert [int(left) for _, left in found] == [before - 2 * 20 * 20] * 2
    assert decoding._in_flight.left == before


def test_ctrl_c_ends_the_workers_without_a_word_of_theirs(tmp_path: Path) -> None:
    for i in range(3 * AT_A_TIME):
        save(tmp_path / "images" / f"{i}.png", 1)
    program = (
        "import signal, sys, time; signal.signal(signal.SIGINT, signal.default_int_handler);"  # a shell may ignore it
        "from fastdcgan.dcgan.sources import FolderSource; from fastdcgan.cli import main;"
        "FolderSource.decode = lambda *_: (print('decoding', flush=True), time.sleep(60));"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "train", str(tmp_path / "images"), "--device", "cpu", "--workers", "2"]
    command += ["--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
    assert process.stdout is not None and process.stdout.readline() == "decoding\n"
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 130
    assert not [*(tmp_path / "cache").iterdir()]
