"""The command line: `latch-train fit | evaluate | export | data | ship`.

Its one rule: it reads options and prints results; everything it does is a call that a notebook could make too.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from training import data, ship
from training.cells import BLENDS, CANDIDATE_ACTIVATIONS, GATE_ACTIVATIONS, RESETS, UNITS
from training.checkpoint import Run
from training.config import TrainConfig
from training.data import polymusic
from training.data.sequences import DataSet
from training.errors import DataError, TrainingError
from training.export import export as export_run
from training.graph import LOWERINGS
from training.scores import Metric, score_all
from training.trainer import LOGGERS, OPTIMISERS, configure
from training.trainer import fit as fit_run

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Train recurrent units and hand them to the service as model folders.",
)
console = Console(markup=False, soft_wrap=True)  # paths and names may hold brackets, and stay whole
DataName = Annotated[str, typer.Argument(help=f"One of {', '.join(data.LOADERS)}.")]
RunFolder = Annotated[Path, typer.Argument(help="The folder of a run, as given to `fit --run`.")]
Models = Annotated[Path, typer.Option(help="The model repository to write to.")]
Threads = Annotated[int, typer.Option(help="CPU threads; at these sizes one is fastest.")]


def one_of(names: object) -> str:
    """The end of a help text."""
    return "one of " + ", ".join(str(name) for name in names)  # type: ignore[attr-defined]


@app.command()
def fit(
    name: DataName,
    cell: Annotated[str, typer.Option(help=f"The unit: {one_of(UNITS)}.")] = "gru",
    hidden: Annotated[int, typer.Option(help="Hidden units of each layer.")] = 46,
    layers: Annotated[int, typer.Option(help="Stacked layers.")] = 1,
    dropout: Annotated[float, typer.Option(help="Dropout between layers.")] = 0.0,
    learned_initial_state: Annotated[
        bool, typer.Option("--learned-initial-state", help="Train the state before the first step.")
    ] = False,
    blend: Annotated[str | None, typer.Option(help=f"{one_of(BLENDS)}; the paper's is write.")] = None,
    reset: Annotated[str | None, typer.Option(help=f"{one_of(RESETS)}; the paper's is before.")] = None,
    gate_activation: Annotated[str | None, typer.Option(help=f"{one_of(GATE_ACTIVATIONS)}.")] = None,
    candidate_activation: Annotated[str | None, typer.Option(help=f"{one_of(CANDIDATE_ACTIVATIONS)}.")] = None,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = TrainConfig.seed,
    optimiser: Annotated[str, typer.Option(help=f"{one_of(OPTIMISERS)}.")] = TrainConfig.optimiser,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = TrainConfig.rate,
    weight_decay: Annotated[float, typer.Option(help="L2 penalty in the gradient.")] = TrainConfig.weight_decay,
    batch_size: Annotated[int, typer.Option(help="Sequences in a batch.")] = TrainConfig.batch_size,
    epochs: Annotated[int, typer.Option(help="At most this many epochs in all.")] = TrainConfig.max_epochs,
    patience: Annotated[
        int, typer.Option(help="Epochs without a better valid loss before stopping.")
    ] = TrainConfig.patience,
    clip: Annotated[float, typer.Option(help="Largest gradient norm.")] = TrainConfig.clip,
    run: Annotated[Path | None, typer.Option(help="Run folder; default runs/NAME-CELL.")] = None,
    logs: Annotated[str, typer.Option(help=f"{one_of(LOGGERS)}.")] = "csv",
    threads: Threads = 1,
) -> None:
    """Train until the valid split stops improving. The same command resumes an interrupted run.

    With more `--epochs` or `--patience` it takes a finished run further; all else stays as the run began.

    **Examples**

    `latch-train fit chorales --cell mgu2 --seed 2 --run runs/mine`

    `latch-train fit sensors --cell gru --hidden 32 --rate 0.005 --logs tensorboard`
    """
    data_set = data.load(name)
    model = configure(
        data_set,
        cell,
        hidden=hidden,
        layers=layers,
        dropout=dropout,
        learned_initial_state=learned_initial_state,
        blend=blend,
        reset=reset,
        gate_activation=gate_activation,
        candidate_activation=candidate_activation,
    )
    config = TrainConfig(seed, optimiser, rate, weight_decay, batch_size, epochs, patience, clip)
    folder = run or Path("runs") / f"{name}-{cell}"
    progress = sys.stdout.isatty()
    try:
        done = fit_run(data_set, model, config, folder, logs=logs, threads=threads, progress=progress)
    except KeyboardInterrupt:
        console.print(
            f"interrupted; the same command goes on from the last whole epoch in {folder}, "
            f"and `latch-train export {folder} --best-so-far` writes the best one as a model"
        )
        raise typer.Exit(130) from None
    result = done.result or {}
    console.print(f"{folder}: best epoch {result['best_epoch']} of {result['epochs']}, {result['seconds']} s")
    show(data_set, [Metric(**metric) for metric in result["metrics"]])


def show(data_set: DataSet, metrics: list[Metric]) -> None:
    """Scores by split, and under them what the test score is to be read beside."""
    table = Table("", "metric", "valid", "test", "unit", title=data_set.info.description)
    for metric in (metric for metric in metrics if metric.split == "test"):
        valid = next(other.value for other in metrics if (other.name, other.split) == (metric.name, "valid"))
        table.add_row("this run", metric.name, f"{valid:.4f}", f"{metric.value:.4f}", metric.unit)
    for reference in data_set.references:
        table.add_row(reference.name, reference.metric, "", f"{reference.value:.4f}", "")
    console.print(table)


@app.command()
def evaluate(folder: RunFolder) -> None:
    """Score a run's best weights (so far) anew on the valid and test splits, beside baselines and the papers' figures.

    **Example:** `latch-train evaluate runs/mine`
    """
    run = Run.load(folder)
    model, epoch = run.best_model(folder)
    data_set = data.load(run.data.name)
    console.print(f"{folder}: best epoch {epoch}" + ("" if run.result else " so far; the run has not finished"))
    show(data_set, score_all(model, data_set))


@app.command()
def export(
    folder: RunFolder,
    name: Annotated[str, typer.Option(help="The model's name; default the run folder's.")] = "",
    version: Annotated[
        str | None, typer.Option(help="The model's version, a whole number; default the next free one.")
    ] = None,
    models: Models = Path("models"),
    force: Annotated[bool, typer.Option("--force", help="Replace a version that exists.")] = False,
    best_so_far: Annotated[
        bool, typer.Option("--best-so-far", help="Write the best weights of a run that has not finished.")
    ] = False,
    lowering: Annotated[
        str, typer.Option(help=f"What a step becomes in ONNX: {one_of(LOWERINGS)}; only gru has an operator.")
    ] = "primitives",
) -> None:
    """Write a run as models/NAME/VERSION: step graph, manifest, golden vectors. No parity, no artifact.

    **Example:** `latch-train export runs/mine --name my-chorales --models models`
    """
    name = name or folder.resolve().name
    path = export_run(folder, models, name, version, force=force, best_so_far=best_so_far, lowering=lowering)
    console.print(f"wrote {path}")


@app.command(name="data")
def data_command(
    name: Annotated[str | None, typer.Argument(help="The set to fetch and check; all names when left out.")] = None,
) -> None:
    """Fetch and verify a data set, or list them all.

    With `LATCH_DATA` set, files are read from that folder (polymusic/JSB_Chorales.mat and so on); otherwise they are
    downloaded once and checked by sha256. **Example:** `latch-train data chorales`
    """
    if name is None:
        table = Table("name", "from", "licence")
        for known in data.LOADERS:
            rolls = polymusic.SETS.get(known)
            table.add_row(known, rolls.file if rolls else "made or bundled", rolls.licence if rolls else "free to use")
        console.print(table)
        return
    data_set = data.load(name)
    table = Table("split", "sequences", "steps", title=f"{name}: {data_set.info.description}")
    for split, items in data_set.splits.items():
        table.add_row(split, str(len(items)), str(sum(len(inputs) for inputs, _, _ in items.items)))
    console.print(table)
    console.print(f"source: {data_set.info.source}\nsha256: {data_set.info.sha256}\nlicence: {data_set.info.licence}")


@app.command(name="ship")
def ship_command(
    names: Annotated[list[str] | None, typer.Argument(help="Which; all when left out.")] = None,
    runs: Annotated[Path, typer.Option(help="Where the run folders go.")] = Path("runs/shipped"),
    models: Models = Path("models"),
    threads: Threads = 1,
) -> None:
    """Train and export the shipped models again, replacing their version 1: the content of models/ from the data.

    **Examples:** `latch-train ship`, `latch-train ship sensors --models /tmp/models`
    """
    for name in names or ship.SHIPPED:
        if name not in ship.SHIPPED:
            raise DataError(f"unknown shipped model {name!r}: choose one of {', '.join(ship.SHIPPED)}")
        console.print(f"wrote {ship.ship(name, runs, models, threads=threads, progress=sys.stdout.isatty())}")


def main() -> None:
    """Run the command; a refusal is one line on stderr and exit status 2."""
    try:
        app()
    except TrainingError as error:
        # A message may hold brackets, which are not markup, and stays one line, so that it can be searched for.
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
