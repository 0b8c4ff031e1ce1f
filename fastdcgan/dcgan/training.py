"""Training a DCGAN on real images.

from fastdcgan.dcgan import TrainConfig, Trainer

trainer = Trainer(TrainConfig(data="mnist", epochs=20, out="runs/mnist"))
trainer.run()                                     # samples, checkpoints, metrics and plots are in runs/mnist
Trainer.resume("runs/mnist", epochs=40).run()     # goes on where the newest checkpoint is
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdcgan.dcgan import checkpoint, console, distributed, files, images, plots, trained
from fastdcgan.dcgan.checkpoint import Checkpoint, CheckpointError, Record
from fastdcgan.dcgan.config import KEPT, TrainConfig
from fastdcgan.dcgan.console import Bar, say
from fastdcgan.dcgan.data import Batches, Images, Labelled, load_images, load_labelled, send
from fastdcgan.dcgan.files import LOCK, locked, own_folder
from fastdcgan.dcgan.metrics import ADVICE_NOT_FINITE, Diverged, MetricsLog, Watch
from fastdcgan.dcgan.models import placed
from fastdcgan.dcgan.sampling import mixed_labels
from fastdcgan.dispatch import autotune
from fastdcgan.gan_step import GANStep
from fastdcgan.optim import FusedAdam
from fastdcgan.train_step import GradientPenalty, StepMetrics, unwrapped

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `reason` is "finished", "time" (max_minutes) or "interrupted"."""

    reason: str
    step: int
    out: Path


class Trainer:
    """A training run: networks, optimisers, data and everything that a run writes into its folder.

    `images` replaces the data that `config` names, with labels if it is to be conditional. Attributes of use from
    outside: `generator`, `discriminator`, `optimizer_g`, `optimizer_d`, `batches`, `step`, `out`. Seeds torch's global
    generators with `config.seed`. Raises ValueError for settings that don't fit, and what `load_images` raises.
    """

    def __init__(self, config: TrainConfig, images: Images | Labelled | None = None, *, _resumed: bool = False) -> None:
        if images is not None and not config.data:
            config = dataclasses.replace(config, data="images in memory")
        config = config.resolved()
        self.config = config
        self.out = Path(config.out)
        # Before the processes join: after that the first one may write already.
        self._found, self._resumed = checkpoint.all_of(self.out), _resumed
        self._run = uuid.uuid4().hex  # its number
        if self._found and not _resumed:
            raise ValueError(f"{self.out} holds a run already: expected a new folder, or that run to be resumed")
        self.processes, self.device = distributed.join(config.device)
        if self.processes.main and (self.out / LOCK).exists():
            with locked(self.out):  # else it would turn out after the images were decoded
                pass
        parts = self.processes.world * config.accumulate
        if config.batch_size % parts:
            raise ValueError(
                f"batch_size is {config.batch_size}: expected a multiple of {parts}, for "
                f"{self.processes.world} processes and accumulate {config.accumulate}"
            )
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # every batch has one shape: measuring at first use pays
        console.mute(not self.processes.main)
        self.step = 0
        self._log = MetricsLog(self.out, config.batch_size, self.processes, config.tensorboard)
        self.penalty = None
        if config.gradient_penalty:
            self.penalty = GradientPenalty(config.gradient_penalty, config.penalty_kind)

        found = self._load_images() if images is None else images
        labels: np.ndarray | None = None
        self.images = found.images if isinstance(found, Labelled) else found
        self.classes: list[str] = []
        if config.conditional:
            if not isinstance(found, Labelled):
                raise ValueError("conditional needs images with classes: expected Labelled images")
            labels, self.classes = found.labels, found.classes

        torch.manual_seed(config.seed)
        self._noise = torch.Generator().manual_seed(config.seed + 1)
        self._fixed_z = torch.randn(config.samples, config.nz, generator=torch.Generator().manual_seed(config.seed + 2))
        generator, discriminator = (
            new(config, len(self.classes)) for new in (trained.new_generator, trained.new_discriminator)
        )
        self.generator, self.discriminator = self._placed(generator), self._placed(discriminator)
        self.optimizer_g = self._adam(self.generator, config.lr_g)
        self.optimizer_d = self._adam(self.discriminator, config.lr_d)
        self.scaler = torch.amp.GradScaler(self.device.type) if config.precision == "fp16" else None
        self._gan_step = GANStep(
            self.generator,
            self.discriminator,
            self.optimizer_g,
            self.optimizer_d,
            real_label=config.real_label,
            penalty=self.penalty,
            dtype=DTYPES[config.precision],
            scaler=self.scaler,
            accumulate=config.accumulate,
            ema=config.ema,
        )

        self.batches = Batches(
            self.images,
            config.batch_size,
            labels=labels,
            flips=bool(config.flips),
            holdout=config.holdout,
            seed=config.seed,
            device=self.device,
            rank=self.processes.rank,
            world=self.processes.world,
        )

    @classmethod
    def resume(cls, place: str | Path, images: Images | Labelled | None = None, **changes: Any) -> Trainer:
        """The run whose folder or checkpoint file `place` is, as it was then, with some settings changed.

        On one CPU, with one autotune cache, it goes on to the same bits as if it had never stopped, unless the changes
        change the arithmetic.
        Where it reads and writes is not the checkpoint's to say: it goes on in the run's folder, or in `out` if that is
        among the changes, on the data that this folder's record or `data` names, with the cache that `cache` names.
        Raises CheckpointError for a file that is none, or that is outside of its run's folder and comes without `out`;
        ValueError for a change that can't be: see `config.KEPT`.
        """
        saved = trained.read(place)
        before, path, run = saved.config, saved.path, saved.checkpoint.state.get("run")
        for name in KEPT:
            if changes.get(name, getattr(before, name)) != getattr(before, name):
                raise ValueError(f"{name} is {changes[name]}: the checkpoint's is {getattr(before, name)}, and stays")
        home = checkpoint.run_of(path)
        out = changes.get("out") or (str(home) if saved.record else "")
        if not out:
            raise CheckpointError(f"{path} is not in its run's folder: expected an out, the folder to go on in")
        data = changes.get("data") or saved.data or ("images in memory" if images is not None else "")
        if not data:
            raise CheckpointError(f"{path} is not in its run's folder: expected data, the images to go on with")
        in_place = home is not None and Path(out).resolve() == home.resolve()
        if in_place:
            checkpoint.check_own(checkpoint.all_of(out), run)
        config = dataclasses.replace(before, **{**changes, "out": out, "data": data})
        trainer = cls(config, images, _resumed=in_place)
        if in_place and isinstance(run, str):
            trainer._run = run
        trainer._restore(saved.checkpoint, path)
        if trainer.step >= trainer.total_steps and (config.epochs, config.max_steps) != (
            before.epochs,
            before.max_steps,
        ):
            raise ValueError(f"{trainer._finished()}: expected more of them, or max_steps 0 for no limit")
        changed = [
            f"{f.name} is {getattr(config, f.name)} (was {getattr(before, f.name)})"
            for f in dataclasses.fields(config)
            if f.name in changes
            and f.name not in ("out", "cache")
            and getattr(config, f.name) != getattr(before, f.name)
        ]
        if changed:
            say(f"Changed from here on: {', '.join(changed)}")
        if saved.checkpoint.state["config"].get("cache") and not config.cache and images is None:
            say("The run had a cache of its own: it is used if it is named again.")
        later = [p.stem for p in checkpoint.all_of(trainer.out) if checkpoint.step_of(p) > trainer.step]
        if later:
            say(f"Going on from step {trainer.step}: the next checkpoint takes the place of {', '.join(later)}")
        return trainer

    # --- the run ---

    @property
    def total_steps(self) -> int:
        """The step after which the run is finished. Steps that are done stay done, whatever their batch size was."""
        steps = self.step + self.batches.left(self.config.epochs)
        return min(steps, self.config.max_steps) if self.config.max_steps else steps

    def train_step(self, real: Tensor, labels: Tensor | None = None) -> StepMetrics:
        """One step on this process's part of a batch, with labels if the run is conditional."""
        with autotune.at_once():  # steps by what a resumed run finds measured, from the first on
            metrics = self._gan_step(real, self._z(len(real)), labels)
        self.step += 1
        return metrics

    def run(self) -> Outcome:
        """Train until all steps are done, `max_minutes` are over, or a signal (SIGINT, SIGTERM, SIGHUP) or a closed
        standard output asks to stop; then save.

        Raises Diverged when a loss or a weight is no longer finite; the checkpoints before that stay. Raises
        BlockingIOError while another process runs in this folder, ValueError if one did since this run was set up.
        """
        with locked(self.out) if self.processes.main else contextlib.nullcontext():
            if self.processes.main:
                if checkpoint.all_of(self.out) != self._found:
                    raise ValueError(f"{self.out} holds another run since this one was set up: resume that one")
                for folder in (self.out, checkpoint.folder(self.out), self.out / "samples"):
                    files.clean(folder)
            if self.step < self.total_steps:
                with _StopSignals() as stop:
                    reason = self._train(stop)
            else:
                reason = "finished"
                say(f"{self._finished()}. Nothing is left to do.")
            self._finish()
        return Outcome(reason, self.step, self.out)

    def _train(self, stop: _StopSignals) -> str:
        config, total = self.config, self.total_steps
        sample_every = config.sample_every or self.batches.per_epoch
        checkpoint_every = config.checkpoint_every or self.batches.per_epoch
        deadline = time.monotonic() + 60 * config.max_minutes if config.max_minutes else float("inf")
        if self.processes.main:
            own_folder(self.out, "samples", "losses.png", "samples.gif")
            checkpoint.write_record(self.out, Record(self._run, config.data))
        self._watch = Watch(config.real_label)
        self._announce()
        if self.step == 0:
            self.save_checkpoint()  # from the first moment on there is one to go on with
        self._log.start(self.step)
        try:
            with Bar("training", total, self.step) as bar, contextlib.closing(self.batches.batches()) as stream:
                if self.step == 0:
                    self.save_samples()
                while self.step < total:
                    self._log.add(self.train_step(*next(stream)))
                    asked = stop.asked or console.closed()
                    stopping = self.processes.any(asked or time.monotonic() >= deadline)
                    last = stopping or self.step == total
                    if last or self.step % config.log_every == 0:
                        bar.text = self._flush()
                    bar.update(self.step)
                    if last or self.step % sample_every == 0:
                        self.save_samples()
                    if last or self.step % checkpoint_every == 0:
                        self.save_checkpoint()
                    if stopping:
                        return "interrupted" if self.processes.any(asked) else "time"
            return "finished"
        finally:
            self._log.close()

    def _flush(self) -> str:
        """Write what the last steps measured, look for divergence, and put the numbers in words."""
        complete = self.step % self.config.log_every == 0
        row, steps = self._log.flush(self.step, self.batches.epoch, complete)
        for i, values in enumerate(steps):
            warning = self._watch.look(values, self.step - len(steps) + 1 + i)
            if warning:
                say(warning)
        return (
            f"loss D {row['loss_d']:.3f} G {row['loss_g']:.3f}  D(x) {row['d_real']:.2f}  D(G(z)) {row['d_fake']:.2f}"
            f"  {row['images_per_second']:.0f} images/s"
        )

    def _announce(self) -> None:
        c = self.config
        many = f"{self.processes.world} processes on " if self.processes.world > 1 else ""
        say(
            f"{self.batches.images} images of {c.image_size}x{c.image_size}x{c.channels}, batch {c.batch_size}, "
            f"{c.precision} on {many}{self.device}, steps {self.step} to {self.total_steps}, into {self.out}"
        )

    def _finish(self) -> None:
        log, pictures = (
            self.out / "metrics.csv",
            [path for step, path in images.sample_grids(self.out) if step <= self.step],
        )
        if self.processes.main and log.exists():
            plots.plot_losses(log, self.out / "losses.png")
        if self.processes.main and pictures:
            images.save_gif(pictures, self.out / "samples.gif")
        self.processes.wait()

    def _finished(self) -> str:
        c = self.config
        return f"{self.out} is finished at step {self.step}: epochs is {c.epochs}, max_steps is {c.max_steps}"

    # --- what a run writes ---

    @torch.no_grad()
    def sample(self, z: Tensor) -> Tensor:
        """Images [N, C, H, W] in [-1, 1] for `z` [N, nz], with running statistics, of all classes in turn; the networks
        stay as they are."""
        net: Any = unwrapped(self.generator)
        was_training = net.training
        net.eval()
        with torch.autocast(self.device.type, DTYPES[self.config.precision], enabled=self.config.precision != "fp32"):
            labels = mixed_labels(net, len(z))
            out = net(z.to(self.device), None if labels is None else labels.to(self.device))
        net.train(was_training)
        return out.float()

    def save_samples(self) -> None:
        """The grid of the fixed `z` as it is now: samples/step-N.png."""
        if self.processes.main:
            with self._log.paused():
                picture = images.grid(self.sample(self._fixed_z))
                path = self.out / "samples" / f"step-{self.step:08}.png"
                images.save_image(picture, path)
                if self._resumed:  # it may have gone another way from here before
                    for step, later in images.sample_grids(self.out):
                        if step > self.step:
                            later.unlink()
                self._log.add_picture("samples", np.asarray(picture), self.step)

    def save_checkpoint(self) -> Path:
        """Write everything that the run needs to go on; delete later checkpoints (of a run that went another way from
        an earlier one), and all but the newest `config.keep`.

        Raises Diverged, and writes nothing, if a weight is not finite.
        """
        path = checkpoint.path_at(self.out, self.step)
        with self._log.paused():
            self._check_weights()
            state = self._checkpoint()
            if self.processes.main:
                checkpoint.save(path, state)
                checkpoint.keep_newest(self.out, self.step, self.config.keep)
                self._found = checkpoint.all_of(self.out)
        return path

    def _check_weights(self) -> None:
        for name, net in (("generator", self.generator), ("discriminator", self.discriminator)):
            for key, value in unwrapped(net).state_dict().items():
                if not torch.isfinite(value).all():
                    raise Diverged(f"{key} of the {name} is not finite at step {self.step}. {ADVICE_NOT_FINITE}")

    def _checkpoint(self) -> Checkpoint:
        result = Checkpoint()
        stream = self.batches.state_dict()
        result.add("generator", unwrapped(self.generator).state_dict())
        result.add("discriminator", unwrapped(self.discriminator).state_dict())
        if self._gan_step.ema is not None:
            result.add("ema", self._gan_step.ema.state_dict())
        result.add_optimizer("optimizer_g", self.optimizer_g)
        result.add_optimizer("optimizer_d", self.optimizer_d)
        random = {"noise": self._noise.get_state(), "torch": torch.get_rng_state(), "data": stream.pop("random")}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        result.add("random", random)
        result.add("metrics", self._log.state_dict())
        result.state |= {
            "run": self._run,
            "step": self.step,
            "data": stream,
            "images": len(self.images),
            "classes": self.classes,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "config": dataclasses.asdict(self.config),
        }
        return result

    def _restore(self, saved: Checkpoint, path: Path) -> None:
        if saved.state["images"] != len(self.images):
            was = saved.state["images"]
            raise CheckpointError(f"{path} was trained on {was} images: {self.config.data} has {len(self.images)} now")
        if saved.state.get("classes", []) != self.classes:
            raise CheckpointError(f"{path} was trained on other classes than those that {self.config.data} has now")
        checkpoint.load_weights(unwrapped(self.generator), saved.part("generator"), path)
        checkpoint.load_weights(unwrapped(self.discriminator), saved.part("discriminator"), path)
        if self._gan_step.ema is not None:  # a run that had none begins its average with the weights
            average = saved.part("ema") or saved.part("generator")
            checkpoint.load_weights(self._gan_step.ema, average, path)
        saved.load_optimizer("optimizer_g", self.optimizer_g)
        saved.load_optimizer("optimizer_d", self.optimizer_d)
        random = saved.part("random")
        self.batches.load_state_dict({**saved.state["data"], "random": random["data"]})
        self._noise.set_state(random["noise"])
        torch.set_rng_state(random["torch"])
        if self.device.type == "cuda" and "cuda" in random:
            try:
                torch.cuda.set_rng_state(random["cuda"], self.device)
            except (RuntimeError, TypeError) as error:
                raise CheckpointError(f"{path} has no state of a GPU's random generator: {error}") from error
        scaler = saved.state["scaler"]
        if self.scaler is not None and scaler:
            found = {name: scaler[name] for name in ("scale", "_growth_tracker")}
            self.scaler.load_state_dict({**self.scaler.state_dict(), **found})
        self._log.load_state_dict(saved.part("metrics"))
        self.step = saved.state["step"]

    # --- setting up ---

    def _placed(self, net: nn.Module) -> nn.Module:
        wrapped = self.processes.wrap(placed(net, self.device), self.device)
        if self.config.sync_bn:
            # In place, and only now: on a CPU, where PyTorch's SyncBatchNorm does not run but the fused blocks do,
            # DistributedDataParallel takes no network that has one. The parameters stay the same objects.
            nn.SyncBatchNorm.convert_sync_batchnorm(net)
        return wrapped

    def _adam(self, net: nn.Module, lr: float) -> FusedAdam:
        betas = (self.config.beta1, self.config.beta2)
        return FusedAdam(net.parameters(), lr, betas, capturable=self.device.type == "cuda")

    def _load_images(self) -> Images | Labelled:
        """Process 0 decodes, then the first one of each other machine, unless it finds that cache there; the others
        read it."""
        c, turn_of_mine = self.config, 0 if self.processes.main else 1 if self.processes.local_rank == 0 else 2
        load: Callable[..., Images | Labelled] = load_labelled if c.conditional else load_images
        for turn in range(3):
            if turn == turn_of_mine:
                result = load(c.data, c.image_size, c.channels, cache_folder=c.cache or None, workers=c.workers)
            self.processes.wait()
        mean = self.processes.mean(torch.tensor(float(len(result)), dtype=torch.float64))
        if self.processes.any(float(mean) != len(result)):
            raise ValueError(f"{c.data} has {len(result)} images here: expected as many for all processes")
        return result

    def _z(self, count: int) -> Tensor:
        """This process's part of the noise for a whole batch: [count, nz]."""
        z = torch.randn(self.config.batch_size, self.config.nz, generator=self._noise)
        start = self.processes.rank * count
        return send(z[start : start + count], self.device)


class _StopSignals:
    """Turns the first SIGINT, SIGTERM or SIGHUP into a request to stop; a second one acts as it always does."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}
        self._terminal = sys.stdout.isatty()  # one that has hung up is none any more

    def __enter__(self) -> _StopSignals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python lets nobody handle signals
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                # What `nohup` has a process ignore stays ignored.
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self.__exit__()
        if number == signal.SIGHUP and self._terminal:
            console.hang_up()
        say("Stopping after this step and saving; once more stops at once.")
