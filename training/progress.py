"""The line that a person watches while a run goes on.

Its one rule: one line in a terminal of 80 columns. It must not know what is trained, or how.
"""

import math
from typing import Any

import lightning
from lightning.pytorch.callbacks import EarlyStopping, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


class EpochBar(TQDMProgressBar):
    """`Epoch 3/300: (bar) 12/29, train=8.91, valid=9.02, best=8.99`; train and valid are the last whole epoch's."""

    BAR_FORMAT = "{desc}{bar} {n_fmt}/{total_fmt}{postfix}"

    def __init__(self, early: EarlyStopping) -> None:
        super().__init__()
        self.early = early

    def init_validation_tqdm(self) -> Tqdm:
        """None: it would be a second line that comes and goes."""
        return Tqdm(disable=True)

    def on_train_epoch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Epochs count from 1, as everywhere else."""
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
        return {name: f"{losses[f'{name}_loss']:.4g}" for name in known}
