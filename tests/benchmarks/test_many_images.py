"""The costs of many images: each part is measured, and nothing is left behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastdcgan.benchmarks import many_images
from tests.machine import needs_webdataset


@pytest.mark.parametrize("kind", ["folder", pytest.param("shards", marks=needs_webdataset)])
def test_each_part_is_measured(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(many_images, "_DIFFERENT", 20)
    many_images.main(["--count", "70", "--workers", "2", *(["--shards"] if kind == "shards" else [])])
    said = capsys.readouterr().out
    assert re.findall(r"^([a-z0-9, ]+?) +[\d.]+ s of CPU", said, re.MULTILINE) == [
        *("list", "first load", "load from the cache", "begin to shuffle", "200 batches", "go on, as a resumed run")
    ]
    assert not [*tmp_path.iterdir()]


def test_memory_is_seen() -> None:
    before = many_images.memory()
    held = bytearray(b"x" * 2**26)
    assert 60 < many_images.memory() - before < 80
    assert len(held) == 2**26
