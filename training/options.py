"""The options of `latch-train fit`, each with its help, and how they name a data set.

Its one rule: an option is described once, whatever commands have it. It must not know what is done with it.
"""

import csv
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from training import data
from training.cells import BLENDS, CANDIDATE_ACTIVATIONS, GATE_ACTIVATIONS, RESETS, UNITS
from training.config import DataInfo, ModelConfig, TrainConfig
from training.data import own
from training.data.sequences import DataSet
from training.errors import ConfigError, DataError
from training.presets import PRESETS, find
from training.trainer import LOGGERS, OPTIMISERS


def one_of(names: Iterable[str]) -> str:
    """The end of a help text."""
    return "one of " + ", ".join(names)


def option(text: str, *names: str, panel: str | None = None) -> Any:
    """An option with its help, in a panel of its own kind."""
    return typer.Option(*names, help=text, rich_help_panel=panel)


ASKED = tuple(kind.options for kind in own.KINDS.values())  # dataclasses of what may be asked of a file
OWN, MODEL, TRAINING = "A file of your own", "The model", "Training"

Name = Annotated[str | None, typer.Argument(help=f"A data set: {one_of(data.LOADERS)}. Or give a file of your own.")]
Csv = Annotated[Path | None, option("A CSV with a header: forecast some of its columns.", panel=OWN)]
Text = Annotated[Path | None, option("A text in UTF-8: the next character.", panel=OWN)]
Npz = Annotated[Path | None, option("Arrays x and y: a class or values for each sequence or step.", panel=OWN)]
Wav = Annotated[Path | None, option("A folder of folders of .wav files, named by their labels.", panel=OWN)]
Targets = Annotated[str | None, option("Columns to forecast, separated by commas.", panel=OWN)]
Inputs = Annotated[str | None, option("Columns that a client sends; all number columns when left out.", panel=OWN)]
Horizon = Annotated[int | None, option("Rows ahead of the forecast; 1 when left out.", panel=OWN)]
Season = Annotated[
    int | None, option("Rows of a season for the baseline; 0 is none; found by the times when left out.", panel=OWN)
]
MaxGap = Annotated[
    int | None,
    option("Missing rows that are filled with the last value; more end a sequence; 6 when left out.", panel=OWN),
]
Time = Annotated[
    str | None,
    option("The column of times, or Date,Time for two; the first of dates when left out, '' for none.", panel=OWN),
]
TimeFormat = Annotated[
    str | None, option("How they are written, as of strptime: '%d/%m/%Y %H:%M'; found when left out.", panel=OWN)
]
By = Annotated[
    str | None,
    option(
        "The column that says which series (machine, shop) a row belongs to: each has a state of its own.", panel=OWN
    ),
]
Split = Annotated[str | None, option("Percent of the data for train/valid/test; 70/15/15 when left out.", panel=OWN)]
Window = Annotated[
    int | None, option("Steps of a training sequence; 192 of a CSV, 128 of a text, 200 of sound.", panel=OWN)
]
Licence = Annotated[str | None, option("What the manifest says of the data's licence.", panel=OWN)]

CellName = Annotated[str, option(f"The unit: {one_of(UNITS)}.", "--cell", panel=MODEL)]
Hidden = Annotated[int | None, option("Hidden units of each layer; 46, for a text 128.", panel=MODEL)]
Layers = Annotated[int, option("Stacked layers.", panel=MODEL)]
Dropout = Annotated[float, option("Dropout between layers, so for two and more.", panel=MODEL)]
InputDropout = Annotated[
    float, option("Dropout of features of the input, the same ones for a whole sequence.", panel=MODEL)
]
HeadDropout = Annotated[
    float, option("Dropout of what the head sees of h, the same units for a whole sequence.", panel=MODEL)
]
RecurrentDropout = Annotated[
    float, option("Dropout of the weights from h to h, the same ones for a batch.", panel=MODEL)
]
Skip = Annotated[bool, option("The head sees the step's input too, beside h.", "--skip", panel=MODEL)]
LearnedInitialState = Annotated[
    bool, option("Train the state before the first step.", "--learned-initial-state", panel=MODEL)
]
Blend = Annotated[str | None, option(f"{one_of(BLENDS)}; the paper's is write.", panel=MODEL)]
Reset = Annotated[str | None, option(f"{one_of(RESETS)}; the paper's is before.", panel=MODEL)]
GateActivation = Annotated[str | None, option(f"{one_of(GATE_ACTIVATIONS)}.", panel=MODEL)]
CandidateActivation = Annotated[str | None, option(f"{one_of(CANDIDATE_ACTIVATIONS)}.", panel=MODEL)]

Seed = Annotated[
    int, option("Everything random follows from it, but which sequences are in which split.", panel=TRAINING)
]
Optimiser = Annotated[str, option(f"{one_of(OPTIMISERS)}.", panel=TRAINING)]
Rate = Annotated[float, option("Learning rate.", panel=TRAINING)]
Schedule = Annotated[
    str,
    option(f"Of the rate: {one_of(TrainConfig.SCHEDULES)}, which falls to 0 over --epochs.", panel=TRAINING),
]
Average = Annotated[
    float,
    option("Decay, a step, of the average of the weights that is validated and kept; 0 is none.", panel=TRAINING),
]
WeightDecay = Annotated[
    float | None, option("L2 penalty in the gradient; 0.0003, for a CSV 0.003, for a text 0.", panel=TRAINING)
]
BatchSize = Annotated[int | None, option("Sequences in a batch; 8, for text and sound 32.", panel=TRAINING)]
Epochs = Annotated[int, option("At most this many epochs in all.", panel=TRAINING)]
Patience = Annotated[
    int | None,
    option("Epochs without a better valid loss before stopping; 15, for a text 3, for sound 8.", panel=TRAINING),
]
Clip = Annotated[float, option("Largest gradient norm.", panel=TRAINING)]
Transpose = Annotated[
    int, option("Piano rolls are moved by at most so many semitones, anew in every epoch.", panel=TRAINING)
]
Settle = Annotated[int, option("Epochs at the end in which nothing is transposed.", panel=TRAINING)]
SimilarLengths = Annotated[
    bool, option("Make batches of sequences of nearly one length.", "--similar-lengths", panel=TRAINING)
]
Devices = Annotated[int, option("Processes, or GPUs, that share the work; each takes --batch-size.", panel=TRAINING)]
Accelerator = Annotated[str, option("cpu, or gpu for --devices of them.", panel=TRAINING)]

RunTo = Annotated[Path | None, option("Run folder; default runs/NAME-CELL.")]
Logs = Annotated[str, option(f"{one_of(LOGGERS)}.")]
Threads = Annotated[int, option("CPU threads; at these sizes one is fastest.")]
Export = Annotated[
    bool | None, option("Write the run as a model too; a file of your own is, others not.", "--export/--no-export")
]
ExportName = Annotated[str | None, option("The name of that model; default the file's.", "--name")]
Models = Annotated[Path, option("The model repository to write to.")]


def preset(context: typer.Context, name: str | None) -> str | None:
    """Makes a preset's options the defaults of the command, under those of `--config`; what is typed still wins."""
    if name is not None:
        found = find(name).options() | {"run": f"runs/{name}"}
        context.default_map = found | dict(context.default_map or {})
    return name


def from_file(context: typer.Context, path: Path | None) -> Path | None:
    """Makes the options in a JSON file the defaults of the command; what is typed still wins."""
    if path is not None:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            unknown = sorted(found.keys() - {parameter.name for parameter in context.command.params})
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"{path} is not a file of options ({error}): `latch-train sweep` writes one") from error
        if unknown:
            raise ConfigError(f"{path}: unknown option {', '.join(unknown)}")
        for name, value in found.items():
            if isinstance(value, list | dict):
                raise ConfigError(f'{path}: {name} is {json.dumps(value)}: write it as it is typed, such as "a,b"')
        context.default_map = dict(context.default_map or {}) | found
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        help="A JSON file of options, as `sweep` writes its best; what is typed wins.",
        callback=from_file,
        is_eager=True,
    ),
]


PresetName = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help=f"The best settings found for a data set: {one_of(PRESETS)}; what is typed wins.",
        callback=preset,
        is_eager=True,
    ),
]


def span(text: str, kind: type[int] | type[float]) -> tuple[Any, Any]:
    """`16:128` -> (16, 128), and `16` -> (16, 16)."""
    low, _, high = text.partition(":")
    try:
        return kind(low), kind(high or low)
    except ValueError:
        raise ConfigError(f"{text!r} is not LOWEST:HIGHEST, such as 16:128") from None


def slug(name: str) -> str:
    """A model's name made of a file's: lower case letters, digits, dots, underscores and hyphens."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")[:64] or "model"


def names(text: str | None) -> tuple[str, ...]:
    """`a, "b, c"` -> (a, `b, c`)."""
    try:
        found = next(csv.reader([text or ""], skipinitialspace=True), [])
    except csv.Error as error:
        raise ConfigError(f"{text!r} is no list of names, a, b: {error}") from error
    return tuple(name.strip() for name in found if name.strip())


def numbers(text: str | None) -> tuple[int, ...]:
    """`1, 2` -> (1, 2)."""
    try:
        return tuple(int(name) for name in names(text))
    except ValueError:
        raise ConfigError(f"{text!r} are not whole numbers separated by commas") from None


def percentages(text: str) -> tuple[int, ...]:
    """`70/15/15` -> (70, 15, 15)."""
    try:
        return tuple(int(part) for part in text.split("/"))
    except ValueError:
        raise DataError(f"--split must be three percentages such as 70/15/15, not {text!r}") from None


def of(typed: Mapping[str, Any], *kinds: type[Any]) -> dict[str, Any]:
    """Those of the options of a command that are fields of these dataclasses."""
    return {one.name: typed[one.name] for kind in kinds for one in fields(kind) if one.name in typed}


def given_files(typed: Mapping[str, Any]) -> dict[str, Path]:
    """The files of the user's own among the options of a command, by kind."""
    return {kind: typed[kind] for kind in own.KINDS if typed[kind] is not None}


def data_set(typed: Mapping[str, Any]) -> DataSet:
    """The data set that the options of a command name, or the one of the only file given, by its kind."""
    name, found = typed["name"], given_files(typed)
    if (name is not None) + len(found) != 1:
        raise DataError(f"name one data set ({', '.join(data.LOADERS)}), or give one file: --{', --'.join(own.KINDS)}")
    if name is not None:
        return data.load(name)
    ((kind, path),) = found.items()
    read = {"targets": names, "inputs": names, "split": percentages}
    asked = {key: value for key, value in of(typed, *ASKED).items() if value is not None}
    return own.load(kind, path, **{key: read[key](value) if key in read else value for key, value in asked.items()})


def settings_for(info: DataInfo, asked: dict[str, Any]) -> tuple[dict[str, Any], TrainConfig]:
    """What is asked of the model and of the training; what was left out is as this kind of data has it."""
    usual = {"hidden": 46, **asdict(TrainConfig())} | (own.KINDS[info.own["kind"]].settings if info.own else {})
    wanted = usual | {key: value for key, value in asked.items() if value is not None}
    train = {field.name: wanted.pop(field.name) for field in fields(TrainConfig)}
    return wanted, TrainConfig(**train)


def check_dropouts(model: ModelConfig) -> None:
    """Raises ConfigError for a dropout that would drop nothing."""
    if model.dropout and model.layers == 1:
        raise ConfigError(
            f"--dropout {model.dropout} is between layers: say --layers 2, or --head-dropout for one layer"
        )
    unit = UNITS.get(model.cell)  # an unknown one is refused where it is made
    if model.recurrent_dropout and unit is not None and "h" not in unit.candidate_terms:
        raise ConfigError(f"--recurrent-dropout {model.recurrent_dropout}: {model.cell} has no weights from h to h")
