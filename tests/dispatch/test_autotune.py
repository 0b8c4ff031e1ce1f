"""The autotune cache, and when anything is measured."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from fastdcgan.build_info import BuildInfo, CUDABuild
from fastdcgan.dispatch import autotune

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = tmp_path / "folder" / "autotune.json"
    monkeypatch.setenv("FASTDCGAN_AUTOTUNE_CACHE", str(found))
    monkeypatch.setattr(autotune, "_files", {})
    return found


def test_entries_survive_and_are_of_one_machine_and_kind(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    autotune.remember("tiles", "a GPU", "problem", {"block_m": 64})
    autotune.remember("tiles", "a GPU", "other", [1, 2])
    autotune.remember("routes", "another", "problem", 3)
    monkeypatch.setattr(autotune, "_files", {})  # a new process
    assert autotune.lookup("tiles", "a GPU", "problem") == {"block_m": 64}
    assert autotune.lookup("tiles", "a GPU", "other") == [1, 2]
    assert autotune.lookup("routes", "another", "problem") == 3
    assert autotune.lookup("routes", "a GPU", "problem") is None
    assert autotune.lookup("tiles", "another", "problem") is None
    assert json.loads(file.read_text())["version"] == autotune.VERSION
    assert [found.name for found in file.parent.iterdir()] == ["autotune.json"]


def test_two_processes_keep_what_both_measured(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert autotune.lookup("tiles", "a GPU", "first") is None  # and remembers that the file is empty
    content = {"format": autotune.FORMAT, "version": autotune.VERSION, "machines": {"a GPU": {"tiles": {"first": 1}}}}
    file.parent.mkdir()
    file.write_text(json.dumps(content))
    autotune.remember("tiles", "a GPU", "second", 2)
    assert json.loads(file.read_text())["machines"] == {"a GPU": {"tiles": {"first": 1, "second": 2}}}


def test_the_key_names_the_processor_and_what_generates_the_code() -> None:
    key = autotune.machine(torch.device("cpu"))
    assert f"{torch.get_num_threads()} threads" in key and f"torch {torch.__version__}" in key and "fastdcgan " in key


def test_processors_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hypervisor calls all of them "AMD EPYC"; what was measured on one holds for no other."""
    core = "processor\t: {}\ncpu family\t: 25\nmodel\t\t: {}\nmodel name\t: AMD EPYC\ncpu MHz\t: 2445\n\n"
    keys = set()
    for model in (1, 17):
        cpuinfo = core.format(0, model) + core.format(1, model)
        monkeypatch.setattr(Path, "read_text", lambda self, cpuinfo=cpuinfo: cpuinfo)
        autotune.processor.cache_clear()
        assert autotune.processor() == f"AMD EPYC (family 25, model {model})"
        keys.add(autotune.machine(torch.device("cpu")))
    assert len(keys) == 2
    monkeypatch.setattr(Path, "read_text", lambda self: "Processor\t: ARMv8\n")
    autotune.processor.cache_clear()
    assert autotune.processor() == (platform.processor() or platform.machine())
    monkeypatch.undo()
    autotune.processor.cache_clear()


def test_a_cache_that_can_not_be_written_is_known_to_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTDCGAN_AUTOTUNE_CACHE", str(tmp_path / "file" / "autotune.json"))
    monkeypatch.setattr(autotune, "_files", {})
    for key, value in (("problem", 1), ("other", 2)):
        with pytest.warns(UserWarning, match=r"autotune\.json is ignored: FileExistsError"):
            autotune.remember("algorithms", "here", key, value)
    assert autotune.lookup("algorithms", "here", "problem") == 1
    assert autotune.lookup("algorithms", "here", "other") == 2


def test_what_a_library_was_built_for_belongs_to_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of one architecture are no candidates of another's."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    names = set()
    for architectures in ((), ("9.0",), ("9.0a",), ("8.0", "9.0a")):
        built = BuildInfo(cuda=CUDABuild("13.0", architectures))
        monkeypatch.setattr(autotune, "build_info", lambda built=built: built)
        names.add(autotune.machine(CUDA))
    assert len(names) == 4


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"format": "something-else", "version": 1}',
        '{"format": "fastdcgan-autotune", "version": 0, "machines": {}}',
        '{"format": "fastdcgan-autotune", "version": 1, "machines": {"gpu": {"tiles": 3}}}',
        '{"format": "fastdcgan-autotune", "version": 1, "machines": {"gpu": 3}}',
        '{"format": "fastdcgan-autotune", "version": 1}',
    ],
)
def test_a_foreign_file_is_ignored_with_one_warning_and_kept(file: Path, content: str) -> None:
    file.parent.mkdir()
    file.write_text(content)
    with pytest.warns(UserWarning, match=r"autotune\.json is ignored"):
        assert autotune.lookup("tiles", "gpu", "key") is None
    assert file.read_text() == content
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert autotune.lookup("tiles", "gpu", "key") is None


def test_when_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    flags = torch.backends.cudnn.flags
    with flags(benchmark=False):
        assert not autotune.may_compare(CUDA) and not autotune.may_search(CUDA)
        with autotune.tuning():
            assert autotune.may_compare(CUDA) and autotune.may_search(CUDA)
            assert not autotune.may_compare(CPU) and not autotune.may_search(CPU)
            capturing = True
            assert not autotune.may_compare(CUDA) and not autotune.may_search(CUDA)
            capturing = False
        assert not autotune.may_search(CUDA)
    with flags(benchmark=True):
        assert autotune.may_compare(CUDA) and not autotune.may_search(CUDA)
    with flags(benchmark=True, deterministic=True):
        assert not autotune.may_compare(CUDA)


def test_when_a_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "_by_rule", False)
    monkeypatch.setattr(autotune, "_spent", 0.0)
    assert [autotune.may_begin(calls) for calls in (1, 2, 3)] == [False, False, True]
    monkeypatch.setattr(autotune, "_spent", 1e6)
    assert not autotune.may_begin(3)
    with autotune.at_once():
        assert autotune.may_begin(1)
    assert not autotune.may_compare(CPU)
    with autotune.comparing():
        assert autotune.may_compare(CPU)
    assert autotune._spent > 1e6
    assert autotune.consulted(CPU) and autotune.consulted(CUDA)
    monkeypatch.setattr(autotune, "_by_rule", True)
    assert not autotune.consulted(CPU) and autotune.consulted(CUDA)
    monkeypatch.setattr(autotune, "_by_rule", False)
    torch.use_deterministic_algorithms(True)
    try:
        assert not autotune.consulted(CPU) and autotune.consulted(CUDA)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("setting", ["off", "on"])
def test_what_the_environment_says(setting: str) -> None:
    code = "from fastdcgan.dispatch import autotune; import torch; print(autotune.consulted(torch.device('cpu')))"
    environment = os.environ | {"FASTDCGAN_AUTOTUNE": setting}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [str(setting != "off")], done.stderr


def test_a_cpu_is_timed_without_touching_random_numbers_or_grad_mode() -> None:
    small, large = torch.zeros(2**10), torch.zeros(2**22)
    before, runs = torch.get_rng_state(), {"small": 0, "large": 0}

    def run(name: str, x: torch.Tensor) -> None:
        runs[name] += 1
        assert not torch.is_grad_enabled()
        x.add_(1)

    with torch.no_grad():
        times = autotune.milliseconds({"large": lambda: run("large", large), "small": lambda: run("small", small)}, CPU)
    assert 0 < times["small"] < times["large"]
    # A first round and two others, after other work and after itself: what is clearly slower leaves then.
    assert runs == {"large": 6, "small": 6}
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_slow_once_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of less than a millisecond; a longer one leaves at once."""
    for ms in (0.1, 1.5):
        firsts = {"slow once": [9.0, 3 * ms], "steady": [9.0]}
        usual = {"slow once": ms, "steady": 1.1 * ms}
        times = {name: itertools.chain(firsts[name], itertools.repeat(usual[name])) for name in usual}
        calls = {name: functools.partial(next, found) for name, found in times.items()}
        monkeypatch.setattr(autotune, "cpu_milliseconds", lambda call: call())
        found = autotune._cpu_milliseconds(calls)
        assert (found["slow once"] < found["steady"]) == (ms < 1)


def test_what_a_first_call_makes_for_later_ones_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """As oneDNN's code of a convolution, which is made at the first call."""
    now, seconds = 0.0, {"first": itertools.chain([0.1], itertools.repeat(0.001)), "each": itertools.repeat(0.002)}

    def take(name: str) -> None:
        nonlocal now
        now += next(seconds[name])

    monkeypatch.setattr(autotune, "_something_else", lambda: None)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    times = autotune.milliseconds({name: functools.partial(take, name) for name in seconds}, CPU)
    assert times == pytest.approx({"first": 1.0, "each": 2.0})


def test_what_a_call_costs_is_measured_once_on_a_machine(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "_by_rule", False)
    consulted = []

    def call() -> None:
        consulted.append(autotune.consulted(CPU))
        torch.zeros(2**20).exp()

    cost = autotune.extra_milliseconds("it", call, lambda: None)
    assert cost > 0 and consulted and not any(consulted)  # what it runs is not measured meanwhile
    assert autotune.consulted(CPU)
    autotune._files.clear()  # as another process
    assert autotune.extra_milliseconds("it", pytest.fail, pytest.fail) == cost


def test_what_a_chain_finds_is_written_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(autotune, "_write", lambda path, write=autotune._write: (written.append(path), write(path)))
    with autotune.comparing():
        for key in "abc":
            autotune.remember("tiles", "cpu", key, key)
        assert not written and autotune.lookup("tiles", "cpu", "b") == "b"
    assert written == [file]
    autotune._files.clear()
    assert [autotune.lookup("tiles", "cpu", key) for key in "abc"] == ["a", "b", "c"]


def test_a_short_call_is_timed_after_other_work_and_after_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's small convolutions take a third of the time after themselves, ours two thirds; a net has of both."""
    now, cold = 0.0, True

    def something_else() -> None:
        nonlocal cold
        cold = True

    def take(when_cold: float, when_warm: float) -> None:
        nonlocal now, cold
        now, cold = now + (when_cold if cold else when_warm), False

    monkeypatch.setattr(autotune, "_something_else", something_else)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    assert autotune.cpu_milliseconds(lambda: take(0.003, 0.001)) == pytest.approx(2.0)
    assert autotune.cpu_milliseconds(lambda: take(0.03, 0.01)) == pytest.approx(30.0)  # too long to be repeated


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_milliseconds_tell_a_large_copy_from_a_small_one() -> None:
    small, large = (torch.empty(n, dtype=torch.uint8, device="cuda") for n in (2**20, 2**28))
    times = autotune.milliseconds({"small": small.clone, "large": large.clone}, CUDA)
    assert 0 < times["small"] < times["large"]


def test_measuring_where_images_are_only_generated() -> None:
    """In inference mode, and afterwards in training again."""
    autotune._other_tensors.cache_clear()
    for mode in (torch.inference_mode(), torch.no_grad(), contextlib.nullcontext()):
        with mode:
            assert autotune._cpu_milliseconds({"a": lambda: torch.ones(3).sum()})["a"] > 0


def test_what_was_alone_from_the_beginning_is_measured_once() -> None:
    calls: list[str] = []
    assert autotune._cpu_milliseconds({"a": lambda: calls.append("a")})["a"] > 0
    assert set(calls) == {"a"} and len(calls) <= 2  # after other work, and after itself
    assert autotune._cpu_milliseconds({"a": pytest.fail}, {"a": 5.0}) == {"a": 5.0}
