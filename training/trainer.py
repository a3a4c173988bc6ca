"""Fit: one model on one data set, into one run folder, on Lightning.

Its one rule: a run that was interrupted and resumed ends with the weights of one that was not. It must not
know ONNX or the manifest.
"""

import atexit
import importlib.metadata
import logging
import math
import platform
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import Tensor
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from training import errors
from training.checkpoint import Run, alone, flatten_optimiser, load_tensors, restore_optimiser, save_tensors, split_off
from training.config import ModelConfig, TrainConfig
from training.data.polymusic import transposed
from training.data.sequences import Batch, DataSet, Item, collate, similar_lengths
from training.errors import ConfigError, DivergedError
from training.model import RecurrentModel
from training.progress import EpochBar
from training.scores import score_all

log = logging.getLogger(__name__)

LOGGERS: dict[str, Callable[[Path], Logger]] = {
    "csv": lambda folder: CSVLogger(folder, name="logs", flush_logs_every_n_steps=1),  # a kill loses no epoch of it
    "tensorboard": lambda folder: TensorBoardLogger(folder, name="logs"),
}
OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}

# Values that an id is embedded into, at most.
EMBEDDING = 32


def libraries() -> dict[str, str]:
    """Versions that the weights may depend on."""
    names = ("torch", "lightning", "numpy", "onnx", "onnxscript", "onnxruntime")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def configure(data: DataSet, cell: str, **settings: Any) -> ModelConfig:
    """The model that fits `data`: sizes, head and normalisation are the data's, the rest is asked for.

    A forecast of the user's own columns is the change from their last values: without that, whatever moves slowly or
    leaves the range that it was trained in is forecast worse than by its last value.
    """
    info = data.info
    if info.task == "forecast" and info.own and set(info.outputs) <= set(info.inputs):
        settings.setdefault("residual", tuple(map(info.inputs.index, info.outputs)))
    return ModelConfig(
        cell,
        len(info.inputs) if info.vocabulary is None else min(info.vocabulary, EMBEDDING),
        len(info.outputs),
        info.head,
        standardise=info.standardise,
        vocabulary=info.vocabulary,
        **settings,
    )


def deviation(values: Tensor) -> Tensor:
    """Of each column, 1 where it never changes but for rounding: nothing is blown up that differs for the first time
    when served.
    """
    found = values.std(0)
    return torch.where(found > 1e-6 * values.abs().amax(0), found, 1.0)


def set_normalisation(model: RecurrentModel, data: DataSet) -> None:
    """Mean and deviation of the training split's inputs, of its targets where they are values, and of their change."""
    items = data.uncut or data.splits["train"].items
    if data.info.standardise:
        inputs = torch.cat([torch.from_numpy(inputs) for inputs, _, _ in items]).float()
        model.x_mean, model.x_std = inputs.mean(0), deviation(inputs)
    if data.info.head in ("gaussian", "regression"):
        targets = torch.cat([torch.from_numpy(target[predicted]) for _, target, predicted in items]).float()
        model.y_mean, model.y_std = targets.mean(0), deviation(targets)
    if model.config.residual:
        columns = list(model.config.residual)
        before = torch.cat([torch.from_numpy(inputs[predicted]) for inputs, _, predicted in items]).float()[:, columns]
        model.x_mean[columns], model.x_std[columns] = model.y_mean, model.y_std  # one scale on both sides
        moves = (targets - before) / model.y_std
        model.change = deviation(moves)
        with torch.no_grad():  # the first guess is the usual change: a counter's is many deviations from none
            model.head.bias[: len(columns)] += moves.mean(0) / model.change


def moved(average: Tensor, weight: Tensor, _: Tensor | int, *, share: float) -> Tensor:
    """A moving average after one more step."""
    return average.lerp(weight, share)


def hush_hints() -> None:
    """Nothing of Lightning's about itself."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def hush_advice() -> None:
    """No warnings that ask for more loader workers: a batch is made in microseconds."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")  # torch's class, in Lightning


class Fitting(lightning.LightningModule):
    """The model, its loss over predicted steps only, its optimiser, and its batches in an order that an epoch fixes.

    `average` is the moving average of the weights, where there is one: it is what is validated and kept as the best.

    Of several devices each makes the whole batch and takes every n-th row of it, so that all know how much it counts.
    """

    def __init__(self, model: RecurrentModel, config: TrainConfig, data: DataSet, threads: int) -> None:
        super().__init__()
        self.model, self.config, self.data, self.threads = model, config, data, threads
        self.average: AveragedModel | None = None
        if config.average:
            # Not torch's own function for it, which cannot be sent to the processes of several devices.
            average = partial(moved, share=1 - config.average)
            self.average = AveragedModel(model, avg_fn=average).requires_grad_(False)
        self.train_sum, self.train_steps = 0.0, 0
        self.valid_sum, self.valid_steps = 0.0, 0
        self.overflows = 0

    @property
    def judged(self) -> RecurrentModel:
        """The model whose weights are validated and kept."""
        return self.model if self.average is None else cast("RecurrentModel", self.average.module)

    def setup(self, stage: str) -> None:
        """What a process started for one of several devices does not know yet."""
        del stage
        hush_hints()
        hush_advice()
        torch.set_num_threads(self.threads)
        if self.config.devices > 1:
            torch.manual_seed(1_000_003 * self.global_rank + self.config.seed)  # or all would drop the same units
            atexit.register(leave_group)

    def train_dataloader(self) -> DataLoader[Item]:
        """Called anew each epoch: the order depends on seed and epoch alone, so a resumed run sees the same one."""
        config = self.config
        rng = torch.Generator().manual_seed(1_000_003 * config.seed + self.current_epoch)
        split = self.data.splits["train"]
        size = config.batch_size * config.devices
        if config.transpose and self.current_epoch < config.max_epochs - config.settle:
            split = transposed(split, config.transpose, rng)
        # The generator is given in any case: a loader without one takes a number from the model's random numbers when
        # it begins, as that of the valid split does after every epoch, in a resumed run as in any other.
        if config.similar_lengths:
            batches = similar_lengths([len(inputs) for inputs, _, _ in split.items], size, rng)
            return DataLoader(split, batch_sampler=batches, generator=rng, collate_fn=collate)
        return DataLoader(split, size, shuffle=True, generator=rng, collate_fn=collate)

    def val_dataloader(self) -> DataLoader[Item]:
        """The valid split, in its own order."""
        return DataLoader(self.data.splits["valid"], batch_size=64, collate_fn=collate)

    def _losses(self, model: RecurrentModel, batch: Batch) -> Tensor:
        mine = slice(self.global_rank, None, self.config.devices)
        inputs, targets, predicted = (part[mine] for part in batch)
        raw, _ = model(inputs, predicted=predicted)
        return model.loss(raw, targets[predicted])

    def _reduce(self, value: Tensor, how: str) -> Tensor:
        """`value` over all devices: its "mean" or "sum"."""
        reduced: Tensor = self.trainer.strategy.reduce(value, reduce_op=how)
        return reduced

    def _require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            kept = "last.safetensors holds the epoch before" if self.current_epoch else "no epoch was finished"
            raise DivergedError(
                f"the {what} became {value} in epoch {self.current_epoch + 1}, step {self.global_step + 1}, at rate "
                f"{self.config.rate}: try a lower --rate or --clip; {kept}"
            )

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """Mean loss of the batch's predicted steps; DivergedError when it is not a number."""
        count = int(batch[2].sum())
        # The gradients of the devices are averaged, and their shares of the predicted steps differ.
        loss = self._losses(self.model, batch).sum() * (self.config.devices / count)
        whole = self._reduce(loss.detach(), "mean").item()
        self._require_finite("loss", whole)
        self.train_sum += whole * count  # logged once an epoch: a `log` at every step is slow
        self.train_steps += count
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """By the norm of all gradients (Pascanu 2013). One that grew beyond all numbers on its way back through a long
        sequence has no direction: its batch moves nothing, as in mixed precision (Micikevicius 2018, 3.2).
        """
        del gradient_clip_val, gradient_clip_algorithm
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        if not norm.isfinite():
            self.overflows += 1
            optimizer.zero_grad()  # a parameter without a gradient is left as it is

    def on_train_epoch_start(self) -> None:
        """The rate of the epoch: a resumed run finds it by the epoch's number."""
        self.train_sum, self.train_steps = 0.0, 0
        self.overflows = 0
        if self.config.schedule == "cosine":
            left = (1 + math.cos(math.pi * self.current_epoch / self.config.max_epochs)) / 2
            for group in self.trainer.optimizers[0].param_groups:
                group["lr"] = self.config.rate * left

    def on_train_batch_end(self, *_: Any) -> None:
        """The average follows the weights."""
        if self.average is not None:
            self.average.update_parameters(self.model)

    def on_validation_epoch_start(self) -> None:
        """A new sum, unless no batch of the epoch has moved anything."""
        self.valid_sum, self.valid_steps = 0.0, 0
        batches = self.trainer.num_training_batches
        if self.overflows == batches:
            self._require_finite("gradient of every batch", math.inf)
        if self.overflows and self.trainer.is_global_zero:
            log.warning(
                "epoch %d: the gradients of %d of %d batches overflowed and moved nothing: a lower --rate helps",
                self.current_epoch + 1,
                self.overflows,
                batches,
            )

    def validation_step(self, batch: Batch, _: int) -> None:
        """Sums, so that the mean is over steps and not over batches."""
        losses = self._losses(self.judged, batch)
        self.valid_sum += losses.sum().item()
        self.valid_steps += len(losses)

    def on_validation_epoch_end(self) -> None:
        """What early stopping watches, and beside it the loss of the epoch that led there."""
        sums = torch.tensor([self.valid_sum, self.valid_steps], dtype=torch.float64, device=self.device)
        total, steps = self._reduce(sums, "sum").tolist()
        self._require_finite("valid loss", total)
        self.log("train_loss", self.train_sum / self.train_steps, prog_bar=True, sync_dist=True)
        self.log("valid_loss", total / steps, prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam or RMSProp, with an L2 penalty in the gradient."""
        config = self.config
        make = OPTIMISERS[config.optimiser]
        return make(self.model.parameters(), lr=config.rate, weight_decay=config.weight_decay)


def leave_group() -> None:
    """Ends the threads that speak with the other processes: they must not outlive the interpreter, or it may abort."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def generator(device: torch.device) -> torch.Generator:
    """Whose random numbers drop out units on `device`."""
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator


def random_states(devices: int, device: torch.device) -> Tensor:
    """The state of the random numbers, or of several devices' [devices, bytes]: each drops out other units."""
    state = generator(device).get_state()
    if devices == 1:
        return state
    states = [torch.empty_like(state, device=device) for _ in range(devices)]
    torch.distributed.all_gather(states, state.to(device))
    return torch.stack(states).cpu()


class Keeper(Callback):
    """Writes `best` and `last` after every epoch and restores `last` before the first.

    Early stopping has judged the epoch by then (at the end of its validation); its verdict is saved too, and how long
    the run has taken since it `started`, by the monotonic clock.
    """

    def __init__(self, folder: Path, early: EarlyStopping, started: float) -> None:
        self.last, self.best, self.early = folder / "last.safetensors", folder / "best.safetensors", early
        self.started = started

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Weights, optimiser, early stopping and random numbers, as they were when the last epoch ended."""
        if self.last.is_file():
            tensors, meta = load_tensors(self.last)
            pl_module.load_state_dict(split_off(tensors, "fitting"))
            restore_optimiser(trainer.optimizers[0], tensors)
            self.early.wait_count = meta["early_stopping"]["wait_count"]
            self.early.best_score = torch.tensor(meta["early_stopping"]["best_score"])
            state = tensors["random"].view(trainer.world_size, -1)[trainer.global_rank]
            generator(pl_module.device).set_state(state.clone())

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """`best` first: if the kill comes between the two, the repeated epoch writes the same `best` again."""
        random = random_states(trainer.world_size, pl_module.device)
        if not trainer.is_global_zero:
            return
        valid, epoch = trainer.callback_metrics["valid_loss"].item(), trainer.current_epoch + 1
        if self.early.wait_count == 0:
            judged = cast("Fitting", pl_module).judged
            save_tensors(self.best, dict(judged.state_dict()), {"epoch": epoch, "valid_loss": valid})
        tensors = {f"fitting.{name}": value for name, value in pl_module.state_dict().items()}
        tensors |= flatten_optimiser(trainer.optimizers[0]) | {"random": random}
        # Without the patience, which is the run's: it may be another one when the run is taken up again.
        early = {"wait_count": self.early.wait_count, "best_score": self.early.best_score.item()}
        seconds = time.monotonic() - self.started
        save_tensors(self.last, tensors, {"epoch": epoch, "early_stopping": early, "seconds": seconds})


def raised_elsewhere(failed: ProcessRaisedException) -> Exception:
    """The refusal with which a device's process ended, of which only the traceback's text comes through."""
    name, _, words = str(failed).strip().splitlines()[-1].partition(": ")
    kind = getattr(errors, name.removeprefix(f"{errors.__name__}."), None)
    return kind(words) if isinstance(kind, type) and issubclass(kind, errors.TrainingError) else failed


def resume_point(folder: Path, config: TrainConfig) -> tuple[int, bool, float]:
    """Whole epochs that `folder` holds, whether the limits of `config` leave room for more, and the seconds so far."""
    last = folder / "last.safetensors"
    if not last.is_file():
        return 0, True, 0.0
    meta = load_tensors(last)[1]
    if meta["epoch"] > config.max_epochs:
        raise ConfigError(
            f"--epochs is {config.max_epochs}, but the run in {folder} has {meta['epoch']} epochs already: "
            f"ask for at least as many, or choose another --run"
        )
    unfinished = meta["epoch"] < config.max_epochs and meta["early_stopping"]["wait_count"] < config.patience
    return meta["epoch"], unfinished, meta.get("seconds", 0.0)  # a run of an older version has none


def fit(
    data: DataSet,
    model_config: ModelConfig,
    config: TrainConfig,
    folder: Path,
    *,
    logs: str = "csv",
    threads: int = 1,
    progress: bool = False,
    callbacks: tuple[Callback, ...] = (),
) -> Run:
    """Train until the valid split stops improving, then score the best weights; resumes what `folder` holds.

    A finished run goes on where other `TrainConfig.limits` leave it room, and is returned as it is where they do not.
    One thread is the default: at these sizes a second costs more than it does. Several devices work in processes of
    their own and end, but for what each drops out, with the weights of one that had all their batches in one. Raises
    CheckpointError when `folder` belongs to a different run, is damaged, or another process is at work in it,
    DivergedError when the loss is not a number; KeyboardInterrupt on Ctrl-C, after which the same call goes on from the
    last whole epoch.
    """
    if logs not in LOGGERS:
        raise ConfigError(f"unknown logs {logs!r}: choose one of {', '.join(LOGGERS)}")
    if config.accelerator == "gpu" and torch.cuda.device_count() < config.devices:
        raise ConfigError(f"devices is {config.devices}, but there are {torch.cuda.device_count()} GPUs here")
    if threads < 1:
        raise ConfigError(f"threads must be at least 1, not {threads}")
    with alone(folder):
        run = Run(data.info, model_config, config, libraries())
        found = Run.load(folder) if (folder / "run.json").is_file() else run
        if found.result is not None or (folder / "last.safetensors").is_file():  # else nothing of it was trained
            found.same_as(run)
        if found.result is not None and found.train == config:
            return found
        epoch, unfinished, seconds = resume_point(folder, config)
        if found.result is not None and not unfinished:
            return found
        started = time.monotonic() - seconds
        torch.set_num_threads(threads)
        lightning.seed_everything(config.seed, verbose=False)
        model = RecurrentModel(model_config)
        set_normalisation(model, data)
        run.save(folder)
        if unfinished:
            hush_hints()
            # Judged when validation ends: at the end of the epoch Lightning would call it after the Keeper.
            early = EarlyStopping("valid_loss", patience=config.patience, check_on_train_epoch_end=False)
            trainer = lightning.Trainer(
                accelerator=config.accelerator,
                devices=config.devices,
                strategy="auto" if config.devices == 1 else "ddp_spawn",
                use_distributed_sampler=False,
                max_epochs=config.max_epochs,
                logger=LOGGERS[logs](folder),
                callbacks=[early, *callbacks, Keeper(folder, early, started), *([EpochBar(early)] if progress else [])],
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=progress,
                log_every_n_steps=1,
                num_sanity_val_steps=0,
                reload_dataloaders_every_n_epochs=1,
            )
            # Lightning restores its epoch counter only from its own pickled checkpoints.
            epochs = dict.fromkeys(("ready", "started", "processed", "completed"), epoch)
            trainer.fit_loop.epoch_progress.current.load_state_dict(epochs)
            with warnings.catch_warnings():
                hush_advice()
                try:
                    trainer.fit(Fitting(model, config, data, threads))
                except ProcessRaisedException as failed:
                    raise raised_elsewhere(failed) from failed
                except SystemExit as stopped:  # Lightning's answer to Ctrl-C, which it also leaves switched off
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                    raise KeyboardInterrupt from stopped
        model, best_epoch = run.best_model(folder)
        result = {
            "epochs": resume_point(folder, config)[0],
            "best_epoch": best_epoch,
            "seconds": round(time.monotonic() - started, 1),
            "metrics": [metric.as_dict() for metric in score_all(model, data)],
            "scored": {name: sum(int(item[2].sum()) for item in data.splits[name].items) for name in ("valid", "test")},
        }
        run = replace(run, result=result)
        run.save(folder)
        return run
