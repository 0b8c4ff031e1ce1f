"""The page of a run: what is in it, that it needs nothing else, and what a browser makes of it."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fastdcgan.cli import main
from fastdcgan.dcgan import CheckpointError, Images, Labelled, TrainConfig, Trainer, checkpoint
from fastdcgan.dcgan.images import Sheet
from fastdcgan.dcgan.metrics import HEADER
from fastdcgan.dcgan.report import write_report
from tests.dcgan.conftest import TINY, save
from tests.machine import CHROMIUM, needs_browser

add = Sheet.add


class Page(HTMLParser):
    """The elements of a page with their attributes, its text, and the text of its scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = self.scripts = ""
        self._open: list[str] = []
        self.feed(path.read_text())
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "input"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("script", "style"):
            self.scripts += data
        else:
            self.text += data

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [found for name, found in self.elements if name == tag and wanted.items() <= found.items()]

    @property
    def frames(self) -> list[dict]:
        return json.loads(self.scripts[self.scripts.index("[{") : self.scripts.index("}]") + 2])


def test_a_page_has_all_of_a_run(run: Path, finished_run: Path) -> None:
    log(run, *[(1.0, 2.0, 0.6, 0.4)] * 3, every=1)
    page = Page(write_report(run, data=str(finished_run.parent / "photos")))
    assert [name for name, _ in page.elements].count("svg") == 2
    assert len(page.all("polyline")) == 4
    assert [frame["text"].partition(":")[0] for frame in page.frames] == [f"Step {i}" for i in range(4)]
    assert page.all("input", id="slider", max="3", value="3")
    places = [frame["x"] for frame in page.frames]
    assert places == [42, 42, 212, 382]  # the log begins with step 1
    assert len(page.all("img")) == 3  # of the slider, walks, neighbours
    for said in ("of 18 training images", "images a second in the median of", "penalty_kind", "wgan-gp"):
        assert said in page.text
    assert "ngf4\n" in page.text and len(page.all("tr", class_="changed")) < len(page.all("tr"))
    # Nothing is loaded from anywhere.
    references = [found.get(name) for _, found in page.elements for name in ("src", "href", "data", "srcset")]
    assert all(value.startswith("data:image/webp;base64,") for value in references if value)
    assert all(frame["picture"].startswith("data:image/webp;base64,") for frame in page.frames)
    assert not re.search(r"https?:|@import|url\(|fetch\(", page.scripts + page.text)


def log(run: Path, *rows: tuple[float, float, float, float], every: int = 10) -> None:
    """A metrics.csv of these losses of D and G, D(x) and D(G(z)), so many steps a line."""
    lines = [f"{every * i},0,{d},{g},{real},{fake},{fake},0,100" for i, (d, g, real, fake) in enumerate(rows, start=1)]
    (run / "metrics.csv").write_text("\n".join([HEADER, *lines]) + "\n")


def test_divergence_is_marked(run: Path) -> None:
    fine, won, gone = (1.0, 1.0, 0.6, 0.4), (0.3, 6.0, 0.9, 0.001), (float("nan"), 1.0, 0.6, 0.4)
    log(run, *[fine] * 5)
    page = Page(write_report(run))
    assert not page.all("rect", class_="bad") and "No divergence" in page.text
    log(run, fine, won, won, fine, gone)
    page = Page(write_report(run))
    assert "the discriminator has won" in page.text and "a loss was no finite number" in page.text
    marks = page.all("rect", class_="bad")
    assert len(marks) == 4  # two stretches in two charts
    # Between 42 and 382 lie the steps 10 to 50: from 20 to 30, and 50, each with a unit on both sides.
    assert [(mark["x"], mark["width"]) for mark in marks[:2]] == [("126.0", "87.0"), ("381.0", "2.0")]
    assert len((page.all("polyline")[0]["points"] or "").split()) == 4  # what is no number is not drawn
    log(run, gone, fine)
    dot, *_ = Page(write_report(run)).all("polyline")
    assert len((dot["points"] or "").split()) == 2 and len({*(dot["points"] or "").split()}) == 1
    log(run, *[(0.0, 0.0, 0.5, 0.5)] * 2000)
    assert len((Page(write_report(run)).all("polyline")[0]["points"] or "").split()) == 400


def test_images_that_are_gone(run: Path) -> None:
    """Or grids that are broken: the rest is there."""
    (run / "samples" / "step-00000002.png").write_text("no picture")
    (run / "run.json").unlink()
    page = Page(write_report(run))
    assert "Not shown, for want of the images" in page.text
    assert len(page.frames) == 3
    with pytest.raises(ValueError, match="is no folder, and no built-in set"):
        write_report(run, data=str(run / "nowhere"))


def test_a_run_of_classes_with_a_name_of_markup(config: TrainConfig, images: Images, tmp_path: Path) -> None:
    config = dataclasses.replace(
        config, data="</script><b>", out=str(tmp_path / "<i>"), conditional=True, max_steps=1, ema=0.5
    )
    Trainer(config, Labelled(images, np.arange(45) % 2, ["<u>", "dog"])).run()
    page = Page(write_report(tmp_path / "<i>"))
    assert "<i>: script><b>" in page.text and "from one input of the class <u> to the next" in page.text
    assert "Not shown, for want of the images" in page.text
    assert not page.all("i") and not page.all("u")


def test_nearest_images_are_of_the_class_of_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three classes: dark ones, of which there are fewer than are shown, grey ones and bright ones."""
    counts = {"a": 3, "b": 10, "c": 10}
    for (name, count), level in zip(counts.items(), (20, 120, 220), strict=True):
        for i in range(count):
            save(tmp_path / "photos" / name / f"{i}.png", level + i)
    options = {**TINY, "conditional": True, "batch_size": 8, "max_steps": 1}
    Trainer(TrainConfig(data=str(tmp_path / "photos"), out=str(tmp_path / "run"), **options)).run()
    assert main(["report", str(tmp_path / "run"), "--device", "cpu", "--speed", "1"]) == 0
    assert "ms in plain PyTorch" in (tmp_path / "run" / "report.html").read_text()
    sheets = []
    monkeypatch.setattr(Sheet, "add", lambda sheet, pixels: (sheets.append(pixels), add(sheet, pixels)))
    page = Page(write_report(tmp_path / "run"))
    assert "of 23 training images those that are nearest among D's features, and of its class" in page.text
    levels = sheets[-1].reshape(8, 7, -1)[:, 1:, 0]  # without the samples
    for row, label in zip(levels, (0, 1, 2, 0, 1, 2, 0, 1), strict=True):
        low = (20, 120, 220)[label]
        there = row[row < 255]
        assert len(there) == (3 if label == 0 else 6) and len({*there.tolist()}) == len(there)
        assert (there >= low).all() and (there < low + 10).all()
    save(tmp_path / "photos" / "d" / "0.png", 1)
    with pytest.raises(ValueError, match="has other classes than the run"):
        write_report(tmp_path / "run", data=str(tmp_path / "photos"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nowhere", "there is no checkpoint and no run's folder nowhere"),
        ("run/metrics.csv", "is damaged, or no checkpoint"),
        ("alone.safetensors", "alone.safetensors is not in its run's folder: expected the folder of a run"),
        ("run nowhere", "nowhere is no folder, and no built-in set"),
        ("run --out page.png", "--out is page.png: expected the name of a file .html"),
        ("run --out run", "--out is run: expected the name of a file .html"),
        ("run --out run/metrics.csv/page.html", "metrics.csv is no folder"),
        ("run --speed 0", "--speed is 0.0: expected at least 1"),
        ("run --device tpu", "device is 'tpu'"),
        ("unlogged", "metrics.csv"),
        ("empty", "metrics.csv has no lines yet: expected a run of some steps"),
    ],
)
def test_bad_input(
    line: str, message: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parent)
    Path("alone.safetensors").write_bytes(checkpoint.find(run).read_bytes())
    for name in ("unlogged", "empty"):
        checkpoint.folder(name).mkdir(parents=True)
        checkpoint.path_at(name, 3).write_bytes(checkpoint.find(run).read_bytes())
    Path("empty/metrics.csv").write_text(f"{HEADER}\n")
    before = sorted(run.parent.rglob("*"))
    assert main(["report", *line.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert sorted(run.parent.rglob("*")) == before


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--device", "cpu", "--speed", "1"]) == 0
    found = re.search(
        r"([\d.]+) ms fused and ([\d.]+) ms in plain PyTorch: ([\d.]+) times", (run / "report.html").read_text()
    )
    assert found and all(float(number) > 0 for number in found.groups())
    assert capsys.readouterr().out.endswith(f"{run / 'report.html'}\n")
    assert main(["report", str(checkpoint.find(run)), "--out", str(tmp_path / "new" / "page.html")]) == 0
    assert Page(tmp_path / "new" / "page.html").frames == Page(run / "report.html").frames


def test_a_checkpoint_elsewhere(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    path.write_bytes(checkpoint.find(run).read_bytes())
    with pytest.raises(CheckpointError, match="expected the folder of a run"):
        write_report(path)


# What a browser finds when the slider has been moved, as the page's title
LOOK = """<script>
slider.value = 1;
slider.dispatchEvent(new Event("input"));
const image = document.getElementById("picture");
const cursors = [...document.querySelectorAll(".cursor")];
image.decode().then(() => { document.title = JSON.stringify({
  picture: image.src === frames[1].picture, side: image.naturalWidth,
  text: document.getElementById("shown").textContent,
  cursor: cursors.map((line) => [line.getAttribute("x1"), getComputedStyle(line).visibility]),
  broken: [...document.images].filter((found) => !found.naturalWidth).length,
  paper: getComputedStyle(document.body).backgroundColor, wide: document.documentElement.scrollWidth > innerWidth,
}); });
</script>"""


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(dark: bool, run: Path, finished_run: Path, tmp_path: Path) -> None:
    """From a file, on the width of a phone, in light and in dark."""
    path = write_report(run, data=str(finished_run.parent / "photos"))
    path.write_text(path.read_text().replace("</body>", f"{LOOK}</body>"))
    done = subprocess.run(
        [
            *(CHROMIUM or "", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--window-size=390,800"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000"),
            *(["--force-dark-mode"] if dark else []),
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr[-2000:]
    found = json.loads(title[1])
    assert found["picture"] and found["side"] > 28 and found["broken"] == 0 and not found["wide"]
    assert found["text"].startswith("Step 1: loss of D ")
    assert found["cursor"] == [["42", "visible"]] * 2
    assert found["paper"] == ("rgb(22, 24, 27)" if dark else "rgb(255, 255, 255)")
