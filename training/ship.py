"""The shipped models: what is in `models/`, from data to folder, so that anyone can make them again.

Its one rule: every shipped model is a row of the table, with the same settings as its neighbours. It must not know
how a model is trained or exported.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training import data
from training.config import TrainConfig
from training.export import export
from training.trainer import configure, fit


@dataclass(frozen=True)
class Shipped:
    """A model folder and the run behind it."""

    data: str
    cell: str
    hidden: int = 46
    train: TrainConfig = field(default_factory=TrainConfig)


# Chung 2014's sizes, about 20,000 parameters for each of its three units; the variants keep the GRU's 46 units.
HIDDEN = {"lstm": 36, "rnn": 100}
UNITS = ("gru", "gru1", "gru2", "gru3", "mgu", "mgu1", "mgu2", "mgu3", "lstm", "rnn")
SHIPPED = {f"chorales-{cell}": Shipped("chorales", cell, HIDDEN.get(cell, 46)) for cell in UNITS} | {
    "sensors": Shipped("sensors", "gru", 32, TrainConfig(rate=0.005, patience=8))
}


def ship(name: str, runs: Path, models: Path, **options: Any) -> Path:
    """Train (or resume, or find finished in runs/<name>) and export one shipped model, replacing its version 1."""
    what = SHIPPED[name]
    data_set = data.load(what.data)
    fit(data_set, configure(data_set, what.cell, hidden=what.hidden), what.train, runs / name, **options)
    return export(runs / name, models, name, "1", force=True)
