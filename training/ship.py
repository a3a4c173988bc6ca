"""The shipped models: what is in `models/`, from data to folder, so that anyone can make them again.

Its one rule: every shipped model is a row of the table, the units with the same settings as their neighbours. It must
not know how a model is trained or exported.
"""

from pathlib import Path
from typing import Any

from training import data
from training.config import TrainConfig
from training.experiments import MUSIC
from training.export import export
from training.presets import PRESETS, Preset
from training.trainer import configure, fit

# The article's units and what they are compared with, in the sizes of the papers' experiment.
HIDDEN = {cell: hidden for cell, hidden in MUSIC.items() if cell != "mingru"}
SHIPPED = {f"chorales-{cell}": Preset("chorales", cell, {"hidden": hidden}) for cell, hidden in HIDDEN.items()} | {
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
