"""What is shown while something runs."""

from __future__ import annotations

import pytest

from fastdcgan.dcgan import console


def show() -> None:
    with console.Bar("training", 3) as bar:
        for done in (1, 2, 3):
            bar.text = f"loss {done}"
            bar.update(done)
            if done == 2:
                console.say("a [message]")


def test_plain_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "_SECONDS_BETWEEN_LINES", 0.0)
    show()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "training 1/3  eta 0:00  loss 1",
        "training 2/3  eta 0:00  loss 2",
        "a [message]",
        "training 3/3  eta 0:00  loss 3",
    ]


def test_live_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich's way to be told that this is a terminal
    monkeypatch.setenv("COLUMNS", "150")
    show()
    out = capsys.readouterr().out
    assert "a [message]\n" in out
    assert "3/3" in out
    assert "loss 3" in out
    assert "\x1b[" in out


def test_a_title_is_no_markup(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "150")
    with console.Bar("[/red]\x1b[2J\x07", 1) as bar:
        bar.update(1)
    out = capsys.readouterr().out
    assert r"[/red]\x1b[2J\x07" in out
    assert "\x1b[2J" not in out


def test_muted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "_muted", True)
    monkeypatch.setattr(console, "_SECONDS_BETWEEN_LINES", 0.0)
    show()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")])
def test_clock(seconds: float, text: str) -> None:
    assert console._clock(seconds) == text
