"""The line that a person watches while a run goes on.

Its one rule: one line in a terminal of 80 columns. It must not know what is trained, or how.
"""

import math
import time
from typing import Any

import lightning
from lightning.pytorch.callbacks import EarlyStopping, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


def short(seconds: float) -> str:
    """`45s`, `12m`, `3h`."""
    if seconds < 100:
        return f"{seconds:.0f}s"
    return f"{seconds / 60:.0f}m" if seconds < 6000 else f"{seconds / 3600:.0f}h"


class EpochBar(TQDMProgressBar):
    """`Epoch 3/300: (bar) 12/29, left=9s-3m, train=8.91, valid=9.02, best=8.99`; losses are the last whole epoch's.

    What is left lies between an early stop as soon as patience allows and the last epoch, at the pace so far.
    """

    BAR_FORMAT = "{desc}{bar} {n_fmt}/{total_fmt}{postfix}"

    def __init__(self, early: EarlyStopping) -> None:
        super().__init__()
        self.early = early
        self.started, self.first, self.pace = 0.0, 0, math.nan

    def init_validation_tqdm(self) -> Tqdm:
        """None: it would be a second line that comes and goes."""
        return Tqdm(disable=True)

    def on_train_epoch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Epochs count from 1, as everywhere else."""
        if math.isnan(self.pace):
            self.started, self.first, self.pace = time.monotonic(), trainer.current_epoch, math.inf
        else:
            self.pace = (time.monotonic() - self.started) / (trainer.current_epoch - self.first)
        self.train_progress_bar.set_description(f"Epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", False)
        self.train_progress_bar.reset(self.total_train_batches)

    def on_exception(self, *_: Any) -> None:
        """Ends the line, so that what is said next has its own."""
        if self._train_progress_bar is not None:
            self._train_progress_bar.close()

    def get_metrics(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Losses to four digits; Lightning's own would add the number of the log folder."""
        losses = trainer.progress_bar_metrics | {"best_loss": float(self.early.best_score)}
        known = [name for name in ("train", "valid", "best") if math.isfinite(losses.get(f"{name}_loss", math.inf))]
        left = (trainer.max_epochs or 0) - trainer.current_epoch - 1
        times: dict[str, int | str | float | dict[str, float]] = {}
        if left > 0 and math.isfinite(self.pace):
            soonest = min(left, self.early.patience - self.early.wait_count)
            times = {"left": f"{short(soonest * self.pace)}-{short(left * self.pace)}"}
        return times | {name: f"{losses[f'{name}_loss']:.4g}" for name in known}
