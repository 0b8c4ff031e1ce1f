"""Two processes under torchrun, on one machine and on two, against one with the whole batch."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastdcgan.cli import main
from fastdcgan.dcgan import checkpoint
from fastdcgan.dcgan.metrics import read_metrics
from tests.dcgan.conftest import TINY_OPTIONS, save
from tests.machine import ROOT

STEPS = 6
OPTIONS = ["digits", *TINY_OPTIONS, "--batch-size", "16", "--max-steps", str(STEPS), "--checkpoint-every", "3"]
OPTIONS += ["--samples", "4", "--log-every", "1"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run_torchrun(out: Path, *options: str) -> subprocess.CompletedProcess:
    command = [*TORCHRUN, "-m", "fastdcgan", "train", *options, "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def torchrun(out: Path, *options: str) -> str:
    done = run_torchrun(out, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def flat(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.double().flatten() for value in state.values()])


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """The folders of one process's run and of two processes' run, and what the two said."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(["train", *OPTIONS, "--out", str(folder / "one")]) == 0
    said = torchrun(folder / "two", *OPTIONS, "--sync-bn")
    return folder / "one", folder / "two", said


def assert_same(one: Path, two: Path, some: int, last: int) -> None:
    """Same losses, same update of the weights, same running statistics, within float32 rounding of a few steps."""
    for a, b in zip(read_metrics(one / "metrics.csv"), read_metrics(two / "metrics.csv"), strict=True):
        for key in a.keys() - {"images_per_second"}:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6), (key, a["step"])
    states = [[checkpoint.load(checkpoint.path_at(run, step)) for run in (one, two)] for step in (some, last)]
    for name in ("generator", "discriminator"):
        before, after = [flat(c[0].part(name)) for c in states]
        before_two, after_two = [flat(c[1].part(name)) for c in states]
        assert distance(after_two, after) < 1e-4
        assert distance(after_two - before_two, after - before) < 1e-2  # what the steps between changed


def test_two_processes_are_one(runs: tuple[Path, Path, str]) -> None:
    one, two, _ = runs
    assert_same(one, two, 3, STEPS)


def test_random_states_and_data_agree(runs: tuple[Path, Path, str]) -> None:
    one, two, _ = runs
    a, b = (checkpoint.load(checkpoint.find(run)) for run in (one, two))
    for key, value in a.part("random").items():
        assert torch.equal(value, b.part("random")[key]), key
    assert a.state["data"] == b.state["data"]


def test_one_process_talks_and_writes(runs: tuple[Path, Path, str]) -> None:
    one, two, said = runs
    assert said.count("2 processes on cpu") == 1
    assert said.count(f"Done at step {STEPS}") == 1
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())


def test_statistics_stay_apart_unless_asked(runs: tuple[Path, Path, str]) -> None:
    """Two processes go on with the run of two, and without sync_bn their running statistics are of half a batch."""
    one, two, _ = runs
    more = ["--max-steps", str(STEPS + 2)]
    assert main(["train", "--resume", str(one), *more]) == 0
    said = torchrun(two, "--resume", str(two), "--no-sync-bn", *more)
    assert f"steps {STEPS} to {STEPS + 2}" in said
    a, b = (checkpoint.load(checkpoint.find(run)).part("discriminator") for run in (one, two))
    assert distance(b["blocks.down1.bn.running_mean"], a["blocks.down1.bn.running_mean"]) > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sync-bn", "--gradient-penalty", "1"], "sync_bn and gradient_penalty don't go together"),
        (["--accumulate", "16"], "batch_size is 16: expected a multiple of 32, for 2 processes and accumulate 16"),
    ],
)
def test_what_does_not_go_together_is_said_once(options: list[str], message: str, tmp_path: Path) -> None:
    done = run_torchrun(tmp_path / "run", *OPTIONS, *options)
    assert done.returncode != 0
    assert done.stderr.count(f"error: {message}") == 1, done.stderr
    assert "exitcode  : 2" in done.stderr
    assert [*tmp_path.iterdir()] == []


def test_settings_that_work_with_two_processes(tmp_path: Path) -> None:
    torchrun(tmp_path, *OPTIONS, "--gradient-penalty", "1", "--accumulate", "2", "--precision", "bf16", "--ema", "0.9")
    assert checkpoint.find(tmp_path) == checkpoint.path_at(tmp_path, STEPS)


def test_all_need_the_same_images(tmp_path: Path) -> None:
    """Each process with a folder of its own, as on machines whose disks differ."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank, count in enumerate((17, 18)):
        for i in range(count):
            save(tmp_path / str(rank) / "images" / f"{i}.png", i)
        names = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in names.items()}, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "fastdcgan", "train", "images", *OPTIONS[1:], "--cache", "cache"]
        pipes = {"stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(command, cwd=tmp_path / str(rank), env=environment, **pipes))
    for process, count in zip(running, (17, 18), strict=True):
        assert f"images has {count} images here: expected as many for all" in process.communicate(timeout=300)[1]
        assert process.returncode == 2


# --- two machines -----------------------------------------------------------------------------------------------------


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them, at 10.213.0.1 and 10.213.0.2: each sees of the other what a
    machine would."""
    names = [f"fastdcgan-{os.getpid()}-{i}" for i in range(2)]
    cable = [f"fd{i}-{os.getpid()}" for i in range(2)]
    # What this machine has to let us do; from then on a failure is one.
    if os.geteuid() != 0 or shutil.which("ip") is None or ip("netns", "add", names[0]).returncode:
        pytest.skip("two network namespaces need root, the command ip and a kernel that gives them")
    try:
        commands = [["netns", "add", names[1]], ["link", "add", cable[0], "type", "veth", "peer", "name", cable[1]]]
        for i, (name, end) in enumerate(zip(names, cable, strict=True)):
            commands += [["link", "set", end, "netns", name], ["-n", name, "link", "set", end, "name", "cable"]]
            commands += [["-n", name, "addr", "add", f"10.213.0.{i + 1}/24", "dev", "cable"]]
            commands += [["-n", name, "link", "set", device, "up"] for device in ("lo", "cable")]
        for command in commands:
            done = ip(*command)
            assert done.returncode == 0, (command, done.stderr)
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name)  # and the cable with them


def ip(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *command], capture_output=True, text=True, check=False)


def test_two_machines_are_one_process(machines: list[str], tmp_path: Path) -> None:
    """Of 20 steps, without a file that both can see."""
    options = [*OPTIONS, "--sync-bn", "--max-steps", "20", "--checkpoint-every", "10"]
    assert main(["train", *options, "--out", str(tmp_path / "one")]) == 0
    rendezvous = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "10.213.0.1", "--master-port", "29400"]
    running = []
    for i, name in enumerate(machines):
        home = tmp_path / f"machine-{i}"
        home.mkdir()
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", *rendezvous]
        command += ["--node-rank", str(i), "-m", "fastdcgan", "train", *options, "--out", "run", "--cache", "cache"]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "cable", "PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running.append(subprocess.Popen(command, cwd=home, env=environment, **pipes))
    try:
        said = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    assert "2 processes on cpu" in said[0]
    assert_same(tmp_path / "one", tmp_path / "machine-0" / "run", 10, 20)
    assert [path.name for path in (tmp_path / "machine-1").iterdir()] == ["cache"]
