"""The shipped models: what is in `models/`, from data to folder, so that anyone can make them again.

Its one rule: every shipped model is a row of the table, the units with the same settings as their neighbours. It must
not know how a model is trained or exported.
"""

from pathlib import Path
from typing import Any

from training import data
from training.config import TrainConfig
from training.export import export
from training.presets import PRESETS, Preset
from training.trainer import configure, fit

# Chung 2014's sizes, about 20,000 parameters for each of its three units; the variants keep the GRU's 46 units.
HIDDEN = {"lstm": 36, "rnn": 100}
UNITS = ("gru", "gru1", "gru2", "gru3", "mgu", "mgu1", "mgu2", "mgu3", "lstm", "rnn")
SHIPPED = {f"chorales-{cell}": Preset("chorales", cell, {"hidden": HIDDEN.get(cell, 46)}) for cell in UNITS} | {
    "sensors": Preset("sensors", "gru", {"hidden": 32}, TrainConfig(rate=0.005, patience=8)),
    "chorales-best": PRESETS["jsb-best"],
    "nottingham-best": PRESETS["nottingham-best"],
}


def ship(name: str, runs: Path, models: Path, **options: Any) -> Path:
    """Train (or resume, or find finished in runs/<name>) and export one shipped model, replacing its version 1."""
    what = SHIPPED[name]
    data_set = data.load(what.data)
    fit(data_set, configure(data_set, what.cell, **what.model), what.train, runs / name, **options)
    return export(runs / name, models, name, "1", force=True)
