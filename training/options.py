"""The options of `latch-train fit`, each with its help, and how they name a data set.

Its one rule: an option is described once, whatever commands have it. It must not know what is done with it.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from training import data
from training.cells import BLENDS, CANDIDATE_ACTIVATIONS, GATE_ACTIVATIONS, RESETS, UNITS
from training.data import own
from training.data.sequences import DataSet
from training.errors import DataError
from training.trainer import LOGGERS, OPTIMISERS


def one_of(names: Iterable[str]) -> str:
    """The end of a help text."""
    return "one of " + ", ".join(names)


def option(text: str, *names: str, panel: str | None = None) -> Any:
    """An option with its help, in a panel of its own kind."""
    return typer.Option(*names, help=text, rich_help_panel=panel)


OWN, MODEL, TRAINING = "A file of your own", "The model", "Training"

Name = Annotated[str | None, typer.Argument(help=f"A data set: {one_of(data.LOADERS)}. Or give a file of your own.")]
Csv = Annotated[Path | None, option("A CSV with a header: forecast some of its columns.", panel=OWN)]
Targets = Annotated[str | None, option("Columns to forecast, separated by commas.", panel=OWN)]
Inputs = Annotated[str | None, option("Columns that a client sends; all number columns when left out.", panel=OWN)]
Horizon = Annotated[int, option("Rows ahead of the forecast.", panel=OWN)]
Season = Annotated[
    int | None, option("Rows of a season for the baseline; 0 is none; found by the times when left out.", panel=OWN)
]
MaxGap = Annotated[
    int, option("Missing rows that are filled with the last value; more of them end a sequence.", panel=OWN)
]
Time = Annotated[str | None, option("The column of times; the first of ISO dates when left out.", panel=OWN)]
Split = Annotated[str, option("Percent of the data for train/valid/test, in the order of time.", panel=OWN)]
Window = Annotated[int, option("Steps of a training sequence.", panel=OWN)]
Licence = Annotated[str, option("What the manifest says of the data's licence.", panel=OWN)]

CellName = Annotated[str, option(f"The unit: {one_of(UNITS)}.", "--cell", panel=MODEL)]
Hidden = Annotated[int, option("Hidden units of each layer.", panel=MODEL)]
Layers = Annotated[int, option("Stacked layers.", panel=MODEL)]
Dropout = Annotated[float, option("Dropout between layers.", panel=MODEL)]
LearnedInitialState = Annotated[
    bool, option("Train the state before the first step.", "--learned-initial-state", panel=MODEL)
]
Blend = Annotated[str | None, option(f"{one_of(BLENDS)}; the paper's is write.", panel=MODEL)]
Reset = Annotated[str | None, option(f"{one_of(RESETS)}; the paper's is before.", panel=MODEL)]
GateActivation = Annotated[str | None, option(f"{one_of(GATE_ACTIVATIONS)}.", panel=MODEL)]
CandidateActivation = Annotated[str | None, option(f"{one_of(CANDIDATE_ACTIVATIONS)}.", panel=MODEL)]

Seed = Annotated[int, option("Everything random follows from it.", panel=TRAINING)]
Optimiser = Annotated[str, option(f"{one_of(OPTIMISERS)}.", panel=TRAINING)]
Rate = Annotated[float, option("Learning rate.", panel=TRAINING)]
WeightDecay = Annotated[
    float | None, option("L2 penalty in the gradient; 0.0003, or 0.003 for a file of your own.", panel=TRAINING)
]
BatchSize = Annotated[int, option("Sequences in a batch.", panel=TRAINING)]
Epochs = Annotated[int, option("At most this many epochs in all.", panel=TRAINING)]
Patience = Annotated[int, option("Epochs without a better valid loss before stopping.", panel=TRAINING)]
Clip = Annotated[float, option("Largest gradient norm.", panel=TRAINING)]

RunTo = Annotated[Path | None, option("Run folder; default runs/NAME-CELL.")]
Logs = Annotated[str, option(f"{one_of(LOGGERS)}.")]
Threads = Annotated[int, option("CPU threads; at these sizes one is fastest.")]
Export = Annotated[
    bool | None, option("Write the run as a model too; a file of your own is, others not.", "--export/--no-export")
]
ExportName = Annotated[str | None, option("The name of that model; default the file's.", "--name")]
Models = Annotated[Path, option("The model repository to write to.")]


def slug(name: str) -> str:
    """A model's name made of a file's: lower case letters, digits, dots, underscores and hyphens."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")[:64] or "model"


def names(text: str | None) -> tuple[str, ...]:
    """`a, b` -> (a, b)."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def percentages(text: str) -> tuple[int, ...]:
    """`70/15/15` -> (70, 15, 15)."""
    try:
        return tuple(int(part) for part in text.split("/"))
    except ValueError:
        raise DataError(f"--split must be three percentages such as 70/15/15, not {text!r}") from None


def data_set(name: str | None, files: dict[str, Path | None], asked: dict[str, Any]) -> DataSet:
    """The data set called `name`, or the one of the only file given, by its kind; `asked` are the options as typed."""
    given = {kind: path for kind, path in files.items() if path is not None}
    if (name is not None) + len(given) != 1:
        raise DataError(f"name one data set ({', '.join(data.LOADERS)}), or give one file: --{', --'.join(files)}")
    if name is not None:
        return data.load(name)
    ((kind, path),) = given.items()
    read = {"targets": names, "inputs": names, "split": percentages}
    settings = {key: read[key](value) if key in read else value for key, value in asked.items()}
    return own.load(kind, path, **settings)
