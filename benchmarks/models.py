"""Models that are not shipped: untrained units of any size, in a folder that goes away.

Rule: they are made by the training package, as every model is; only their weights mean nothing.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from training.checkpoint import Run, save_tensors
from training.config import DataInfo, ModelConfig, TrainConfig
from training.export import export
from training.model import RecurrentModel

NOTES = tuple((f"note {i}", "") for i in range(88))
INFO = DataInfo("none", "Untrained", "next_frame", "bernoulli", NOTES, NOTES, "none", None, "none", "none")
NOTHING = {"epochs": 0, "best_epoch": 0, "metrics": []}


@contextmanager
def repository(cells: Sequence[str], hidden: int) -> Iterator[Path]:
    """A model repository with one untrained model of 88 notes a unit: `gru-256` and so on."""
    with tempfile.TemporaryDirectory() as folder:
        for cell in cells:
            run = Run(INFO, ModelConfig(cell, 88, 88, "bernoulli", hidden=hidden), TrainConfig(), {}, NOTHING)
            run.save(Path(folder) / "run")
            torch.manual_seed(1)
            weights = RecurrentModel(run.model).state_dict()
            save_tensors(Path(folder) / "run" / "best.safetensors", weights, {"epoch": 0})
            export(Path(folder) / "run", Path(folder) / "models", f"{cell}-{hidden}", "1")
        yield Path(folder) / "models"
