"""The committed plan of the Triton kernels is the one that its command writes."""

from __future__ import annotations

from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled", allow_module_level=True)

from fastdcgan.benchmarks import tile_plan  # noqa: E402


def test_the_plan_is_current(tmp_path: Path) -> None:
    tile_plan.write(tmp_path / "plan.md")
    assert (tmp_path / "plan.md").read_text() == tile_plan.PLAN.read_text(), (
        "tiles, boundaries or shapes changed: python -m fastdcgan.benchmarks.tile_plan"
    )
