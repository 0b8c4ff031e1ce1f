"""The networks of a trained run, out of its checkpoints."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdcgan.cli import main
from fastdcgan.dcgan import CheckpointError, Generator, checkpoint, load_generator, load_trained, sample, trained
from fastdcgan.dcgan.checkpoint import Checkpoint


def test_load_trained(trained_run: Path) -> None:
    trained = load_trained(trained_run)
    saved = checkpoint.load(checkpoint.path_at(trained_run, 8))
    assert (trained.step, trained.path) == (8, checkpoint.path_at(trained_run, 8))
    assert (trained.config.nz, trained.config.image_size, trained.config.channels) == (8, 28, 1)
    for net, part in ((trained.generator, "generator"), (trained.discriminator, "discriminator")):
        assert not net.training
        torch.testing.assert_close(net.state_dict(), saved.part(part), rtol=0, atol=0)
    earlier = load_trained(checkpoint.path_at(trained_run, 4))
    assert earlier.step == 4


def test_the_moving_average(trained_run: Path) -> None:
    average = checkpoint.load(checkpoint.find(trained_run)).part("ema")
    for net in (load_trained(trained_run, ema=True).generator, load_generator(trained_run, ema=True)):
        torch.testing.assert_close(net.state_dict(), average, rtol=0, atol=0)
    assert not torch.equal(
        load_generator(trained_run).blocks.image.conv.weight,
        load_generator(trained_run, ema=True).blocks.image.conv.weight,
    )


def test_a_run_without_a_moving_average(trained_run: Path, tmp_path: Path) -> None:
    saved = checkpoint.load(checkpoint.find(trained_run), "generator", "discriminator")
    checkpoint.save(tmp_path / "plain.safetensors", saved)
    load_trained(tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="no moving average"):
        load_trained(tmp_path / "plain.safetensors", ema=True)
    with pytest.raises(CheckpointError, match="no moving average"):
        load_generator(tmp_path / "plain.safetensors", ema=True)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_trained(tmp_path / "nowhere")
    (tmp_path / "other.safetensors").write_text("something else")
    with pytest.raises(CheckpointError, match=r"other\.safetensors is damaged"):
        load_trained(tmp_path / "other.safetensors")


# --- files that are whole, and say what can't be ---------------------------------------------------------------------


def rewritten(run: Path, change: Callable[[Checkpoint], Any]) -> Path:
    """The run's newest checkpoint after a change, with the checksum of that."""
    path = checkpoint.find(run)
    saved = checkpoint.load(path)
    change(saved)
    checkpoint.save(path, saved)
    return path


def setting(**values: Any) -> Callable[[Checkpoint], None]:
    return lambda saved: saved.state["config"].update(values)


def state(**values: Any) -> Callable[[Checkpoint], None]:
    return lambda saved: saved.state.update(values)


def without(name: str) -> Callable[[Checkpoint], Any]:
    return lambda saved: saved.state.pop(name, None) or saved.tensors.pop(name)


def tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Checkpoint], None]:
    return lambda saved: saved.tensors.update({name: change(saved.tensors[name])})


G_WEIGHT, D_WEIGHT = "generator/blocks.image.conv.weight", "discriminator/blocks.image.conv.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("config"), "config is of type NoneType"),
        (state(config=[1]), "config is of type list"),
        (state(step="3"), "step is '3': expected a whole number"),
        (state(step=-1), "step is -1"),
        (setting(colour=3), "there is no setting 'colour'"),
        (setting(conditional=True), "conditional is True: expected names or none"),
        (state(classes="cat"), "classes is 'cat': expected a list of names"),
        (state(classes=["cat", 1]), "expected a list of names"),
        (state(classes=["cat", "dog"]), "conditional is False: expected names or none"),
        (
            lambda saved: (setting(conditional=True)(saved), state(classes=["a", "b"])(saved)),
            "does not fit this network",
        ),
        (setting(ngf="4"), "ngf is '4': expected a whole number"),
        (setting(ngf=4.0), "ngf is 4.0"),
        (setting(ngf=1_000_000), "ngf is 1000000"),
        (setting(ngf=16_384, nz=16_384), "does not fit this network"),
        (setting(image_size=0), "image_size is 0"),
        (setting(channels=0), "channels is 0"),
        (setting(projection="linear"), "does not fit this network"),
        (setting(data=5), "data is 5"),
        (setting(lr_g=float("nan")), "lr_g is nan"),
        (without(G_WEIGHT), "blocks.image.conv.weight is missing"),
        (lambda saved: saved.tensors.update({"generator/more": torch.zeros(1)}), "more is not expected"),
        (tensor(G_WEIGHT, Tensor.char), "is torch.int8: expected torch.float32"),
        (tensor(G_WEIGHT, Tensor.bool), "is torch.bool: expected torch.float32"),
        (tensor(D_WEIGHT, lambda w: w.to(torch.complex64)), "is torch.complex64: expected torch.float32"),
        (tensor(G_WEIGHT, lambda w: w * float("nan")), "values that are not finite"),
        (tensor(D_WEIGHT, lambda w: w.double() + 1e300), "values that are not finite"),
        (tensor("generator/blocks.project.bn.running_var", Tensor.neg), "values below 0"),
        (tensor("generator/blocks.project.bn.num_batches_tracked", Tensor.float), "expected torch.int64"),
    ],
)
def test_networks_that_can_not_be(
    change: Callable[[Checkpoint], Any], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused by all that load networks, in one line that names the file; and no memory is asked for."""
    path = rewritten(run, change)
    before = sorted(run.parent.rglob("*"))
    with limited_memory(), pytest.raises(CheckpointError, match=path.name) as caught:
        load_trained(path)
    assert message in str(caught.value)
    assert main(["train", "--resume", str(run)]) == 2
    assert capsys.readouterr().err == f"error: {caught.value}\n"
    assert sorted(run.parent.rglob("*")) == before


@contextmanager
def limited_memory() -> Iterator[None]:
    """No more than 2 GB of addresses beyond those of now."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("images"), "images is None"),
        (without("data"), "data is of type NoneType"),
        (state(data={"epoch": 0, "position": 10**9}), "position is 1000000000"),
        (state(data={"epoch": "x", "position": 0}), "epoch is 'x'"),
        (state(scaler=3), "scaler is of type int"),
        (state(scaler={"scale": float("inf"), "_growth_tracker": 0}), "scale is inf"),
        (without("ema/blocks.image.conv.weight"), "blocks.image.conv.weight is missing"),
        (without("optimizer_g/0/exp_avg"), "optimizer_g/0/exp_avg is missing"),
        (without("optimizer_d/1/step"), "optimizer_d/1/step is missing"),
        (tensor("optimizer_d/0/exp_avg_sq", Tensor.neg), "optimizer_d/0/exp_avg_sq has values below 0"),
        (tensor("optimizer_g/0/exp_avg", Tensor.flatten), "optimizer_g/0/exp_avg has shape"),
        (tensor("optimizer_g/0/exp_avg", lambda m: m + float("inf")), "not finite"),
        *(
            (change, message)
            for name in ("noise", "data", "torch")
            for change, message in (
                (without(f"random/{name}"), f"random/{name} is missing"),
                (tensor(f"random/{name}", lambda r: r[:100]), f"random/{name} has shape [100]"),
                (tensor(f"random/{name}", Tensor.float), f"random/{name} is torch.float32"),
                (tensor(f"random/{name}", torch.zeros_like), f"random/{name} is no state of a random generator"),
            )
        ),
        (tensor("random/data", lambda r: torch.cat([r[:24], 0 * r[24:]])), "random/data is a state that always gives"),
    ],
)
def test_runs_that_can_not_go_on(
    change: Callable[[Checkpoint], Any], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The networks are well, so they can be used."""
    path = rewritten(run, change)
    before = torch.get_rng_state()
    with pytest.raises(CheckpointError, match=path.name) as caught:
        trained.read(run)
    assert torch.equal(torch.get_rng_state(), before)
    assert message in str(caught.value)
    assert main(["train", "--resume", str(path)]) == 2
    assert capsys.readouterr().err == f"error: {caught.value}\n"
    load_trained(path)


def test_floating_point_of_another_kind_is_taken(run: Path) -> None:
    weight = load_trained(run).generator.blocks.image.conv.weight
    path = rewritten(run, tensor(G_WEIGHT, Tensor.double))
    assert torch.equal(load_trained(path).generator.blocks.image.conv.weight, weight)


def test_weights_that_give_no_numbers(generator: Generator) -> None:
    with torch.no_grad():
        generator.blocks.project.conv.weight.fill_(3e38)
    with pytest.raises(ValueError, match="not finite"):
        sample(generator, 2)
