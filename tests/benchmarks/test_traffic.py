"""What is counted of the second-level cache's traffic, against the counts of one contraction by hand."""

from __future__ import annotations

from fastdcgan.benchmarks.traffic import of_step


def test_a_contraction_by_hand() -> None:
    """256 -> 512 channels, 8x8 -> 4x4, of 256 images: a product [4096, 4096] x [4096, 512]."""
    (row,) = [row for row in of_step(128) if row.what == "D3 256->512 8->4 conv of 256"]
    assert row.flops == 2 * 4096 * 4096 * 512
    m, n = map(int, row.tile.split("x"))
    assert row.bytes == 2 * 4096 * (4096 // m) * (512 // n) * (m + n)
    assert row.bytes_in_pairs == 2 * 4096 * (4096 // m) * (512 // n) * min(m + n / 2, m / 2 + n)


def test_a_step_has_all_of_them() -> None:
    rows = list(of_step(128))
    assert len(rows) == 3 * 4 + 3 * 3 + 2 * 3  # without the image's layers and the logit's
    assert sum(row.flops for row in rows) < 291e9  # the floors' count has those too
