"""What a run is told, as frozen values that go to JSON and back.

Its one rule: no behaviour beyond checking itself. It must not know torch.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from training.errors import ConfigError

HEADS = ("bernoulli", "categorical", "gaussian", "regression")


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def option(name: str) -> str:
    """What a setting is called on the command line."""
    return "--epochs" if name == "max_epochs" else f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class ModelConfig:
    """A stack of one unit and its head; None stands for the unit's own convention.

    `vocabulary` is the number of ids of an int64 input (embedded into `input_size` values); None for float input.
    `residual` are the input columns, one an output, whose change the head gives: an output is that input plus it.
    `components` are the Gaussians, each over all outputs, that the gaussian head mixes (Bishop 1994).
    With `skip` the head sees the step's input beside h.

    What is dropped, and only in training: `dropout` single values between layers; `input_dropout` and `head_dropout`
    features of the input and values that the head sees, the same ones at all steps of a sequence (Gal & Ghahramani
    2016, arXiv:1512.05287); `recurrent_dropout` weights of U, the same ones in a batch (Merity 2018, arXiv:1708.02182).
    """

    DROPOUTS: ClassVar[tuple[str, ...]] = ("dropout", "input_dropout", "head_dropout", "recurrent_dropout")

    cell: str
    input_size: int
    output_size: int
    head: str
    hidden: int = 46
    layers: int = 1
    skip: bool = False
    dropout: float = 0.0
    input_dropout: float = 0.0
    head_dropout: float = 0.0
    recurrent_dropout: float = 0.0
    standardise: bool = False
    learned_initial_state: bool = False
    residual: tuple[int, ...] = ()
    components: int = 1
    vocabulary: int | None = None
    blend: str | None = None
    reset: str | None = None
    gate_activation: str | None = None
    candidate_activation: str | None = None

    def __post_init__(self) -> None:
        _require(self.head in HEADS, f"unknown head {self.head!r}: choose one of {', '.join(HEADS)}")
        for name in ("input_size", "output_size", "hidden", "layers", "components"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        _require(
            not self.residual or (len(self.residual) == self.output_size and self.standardise),
            f"residual must be an input column for each of {self.output_size} outputs, not {self.residual}",
        )
        _require(
            self.components == 1 or (self.head == "gaussian" and not self.residual),
            f"components are those of a gaussian head without residual: they must be 1, not {self.components}",
        )
        for name in self.DROPOUTS:
            _require(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1), not {getattr(self, name)}")
        _require(
            self.vocabulary is None or self.vocabulary >= 2, f"vocabulary must be at least 2, not {self.vocabulary}"
        )


@dataclass(frozen=True)
class TrainConfig:
    """How to train: everything that the final weights depend on.

    `limits` only say when to stop: they alone may change when a run is taken up again. `batch_size` is that of each of
    the `devices`: processes on the CPU (`accelerator` cpu), or GPUs (gpu). `schedule` cosine lets the rate fall to 0
    over `max_epochs`. `average` is the decay, a step, of the moving average of the weights that is validated and kept
    (0: the weights themselves). `transpose` moves every training sequence of piano rolls by a number of semitones, at
    most so many up or down, drawn anew in every epoch but the last `settle`, which leave the music as it is.
    `similar_lengths` makes batches with little padding.
    """

    SCHEDULES: ClassVar[tuple[str, ...]] = ("constant", "cosine")

    seed: int = 1
    optimiser: str = "adam"
    rate: float = 0.003
    schedule: str = "constant"
    average: float = 0.0
    weight_decay: float = 3e-4
    batch_size: int = 8
    max_epochs: int = 300
    patience: int = 15
    clip: float = 1.0
    transpose: int = 0
    settle: int = 0
    similar_lengths: bool = False
    devices: int = 1
    accelerator: str = "cpu"

    def __post_init__(self) -> None:
        _require(self.optimiser in ("adam", "rmsprop"), f"unknown optimiser {self.optimiser!r}: choose adam or rmsprop")
        _require(self.accelerator in ("cpu", "gpu"), f"unknown accelerator {self.accelerator!r}: choose cpu or gpu")
        for name in ("rate", "batch_size", "max_epochs", "patience", "clip", "devices"):
            _require(getattr(self, name) > 0, f"{option(name)} must be more than 0, not {getattr(self, name)}")
        for name in ("weight_decay", "transpose", "settle", "seed"):
            _require(getattr(self, name) >= 0, f"{option(name)} must be at least 0, not {getattr(self, name)}")
        _require(self.seed < 2**32, f"seed must be below {2**32}, not {self.seed}")
        known = ", ".join(self.SCHEDULES)
        _require(self.schedule in self.SCHEDULES, f"unknown schedule {self.schedule!r}: choose one of {known}")
        _require(0 <= self.average < 1, f"average must be in [0, 1), not {self.average}")
        _require(
            not self.transpose or self.settle < self.max_epochs,
            f"settle must be less than {self.max_epochs} epochs, or nothing is transposed, not {self.settle}",
        )

    @property
    def limits(self) -> tuple[str, ...]:
        """What only says when to stop; a schedule, or to settle, depends on how many epochs there will be."""
        depends = self.schedule != "constant" or (self.transpose and self.settle)
        return ("patience",) if depends else ("max_epochs", "patience")


@dataclass(frozen=True)
class DataInfo:
    """What a manifest says about a data set and what a model needs to fit it.

    Features are (name, unit) along the last axis. `feedback` is the manifest's rule by which an output becomes the
    next input, None where outputs are not inputs. `sha256` is None for generated data. `own` is empty for a set that
    has a name, and else what loads the user's file again (`data/own.py`); it stays in the run folder.
    """

    name: str
    description: str
    task: str
    head: str
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    source: str
    sha256: str | None
    split: str
    licence: str
    feedback: str | None = None
    standardise: bool = False
    vocabulary: int | None = None
    own: dict[str, Any] = field(default_factory=dict)
