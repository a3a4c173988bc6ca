"""Settings under a name: the best that were found for a data set, for `latch-train fit --preset` and for `ship`.

Its one rule: they are data, chosen by the valid split alone. It must not know how a model is trained.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from training.config import TrainConfig
from training.errors import ConfigError


@dataclass(frozen=True)
class Preset:
    """A data set, a unit, what its model is beyond the data's sizes, and how it is trained."""

    data: str
    cell: str
    model: dict[str, Any] = field(default_factory=dict)
    train: TrainConfig = field(default_factory=TrainConfig)

    def options(self) -> dict[str, Any]:
        """The same as options of `latch-train fit`."""
        train = asdict(self.train)
        return {"name": self.data, "cell": self.cell, **self.model, "epochs": train.pop("max_epochs"), **train}


PRESETS = {
    "jsb-best": Preset(
        "chorales",
        "gru",
        {"hidden": 400, "skip": True, "input_dropout": 0.1, "head_dropout": 0.5, "recurrent_dropout": 0.3},
        TrainConfig(
            rate=0.003, schedule="cosine", average=0.99, weight_decay=0.0, batch_size=8, max_epochs=500, patience=500,
            transpose=5, settle=150, similar_lengths=True,
        ),
    ),
    "nottingham-best": Preset(
        "nottingham",
        "gru",
        {"hidden": 400, "skip": True, "head_dropout": 0.5, "recurrent_dropout": 0.2},
        TrainConfig(
            rate=0.003, schedule="cosine", average=0.995, weight_decay=0.0, batch_size=8, max_epochs=260, patience=260,
            transpose=5, settle=80, similar_lengths=True,
        ),
    ),
}  # fmt: skip


def find(name: str) -> Preset:
    """The preset called `name`; ConfigError for an unknown one."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
