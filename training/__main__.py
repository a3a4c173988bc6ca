"""The command line: `latch-train fit | sweep | compare | evaluate | export | adopt | data | reproduce | ship`.

The options that name data and settings are in `options.py`.

Its one rule: it reads options and prints results; everything it does is a call that a notebook could make too.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from training import adopt, compare, data, experiments, findings, options, reproduce, ship, sweep
from training.artifact import check_name
from training.cells import UNITS
from training.checkpoint import Run, replace
from training.config import ModelConfig, TrainConfig
from training.data.sequences import DataSet
from training.errors import DataError, TrainingError
from training.export import check_successor, exported
from training.export import export as export_run
from training.graph import LOWERINGS
from training.report import write_report
from training.scores import Metric, score_all
from training.trainer import configure
from training.trainer import fit as fit_run

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Train recurrent units and hand them to the service as model folders.",
)
console = Console(markup=False, soft_wrap=True)  # paths and names may hold brackets, and stay whole
RunFolder = Annotated[Path, typer.Argument(help="The folder of a run, as given to `fit --run`.")]


@app.command()
def fit(
    name: options.Name = None,
    csv: options.Csv = None,
    text: options.Text = None,
    npz: options.Npz = None,
    wav: options.Wav = None,
    targets: options.Targets = None,
    inputs: options.Inputs = None,
    horizon: options.Horizon = None,
    season: options.Season = None,
    max_gap: options.MaxGap = None,
    time: options.Time = None,
    time_format: options.TimeFormat = None,
    by: options.By = None,
    split: options.Split = None,
    window: options.Window = None,
    licence: options.Licence = None,
    cell: options.CellName = "gru",
    hidden: options.Hidden = None,
    layers: options.Layers = 1,
    dropout: options.Dropout = 0.0,
    input_dropout: options.InputDropout = 0.0,
    head_dropout: options.HeadDropout = 0.0,
    recurrent_dropout: options.RecurrentDropout = 0.0,
    skip: options.Skip = False,
    learned_initial_state: options.LearnedInitialState = False,
    blend: options.Blend = None,
    reset: options.Reset = None,
    gate_activation: options.GateActivation = None,
    candidate_activation: options.CandidateActivation = None,
    seed: options.Seed = TrainConfig.seed,
    optimiser: options.Optimiser = TrainConfig.optimiser,
    rate: options.Rate = TrainConfig.rate,
    schedule: options.Schedule = TrainConfig.schedule,
    average: options.Average = TrainConfig.average,
    weight_decay: options.WeightDecay = None,
    batch_size: options.BatchSize = None,
    epochs: options.Epochs = TrainConfig.max_epochs,
    patience: options.Patience = None,
    clip: options.Clip = TrainConfig.clip,
    transpose: options.Transpose = TrainConfig.transpose,
    settle: options.Settle = TrainConfig.settle,
    similar_lengths: options.SimilarLengths = TrainConfig.similar_lengths,
    devices: options.Devices = TrainConfig.devices,
    accelerator: options.Accelerator = TrainConfig.accelerator,
    run: options.RunTo = None,
    logs: options.Logs = "csv",
    threads: options.Threads = 1,
    config: options.Config = None,
    preset: options.PresetName = None,
    export: options.Export = None,
    export_name: options.ExportName = None,
    models: options.Models = Path("models"),
) -> None:
    """Train until the valid split stops improving. The same command resumes an interrupted run.

    On a data set of `latch-train data`, or on a file of your own, which also becomes a model in `models/` that
    `latch serve` then serves. With more `--epochs` or `--patience` it takes a finished run further; all else stays as
    the run began. `--preset` takes the best settings found for a data set, which this help explains one by one.

    **Examples**

    `latch-train fit --csv plant.csv --targets temperature,flow --horizon 6`

    `latch-train fit --text novel.txt` · `latch-train fit --npz utterances.npz` · `latch-train fit --wav words/`

    `latch-train fit chorales --cell mgu2 --seed 2 --run runs/mine`

    `latch-train fit --preset jsb-best` · `latch-train fit --preset nottingham-best`

    `latch-train fit sensors --cell gru --hidden 32 --rate 0.005 --logs tensorboard`
    """
    typed = {**locals()}
    data_set = options.data_set(typed)
    for note in data_set.notes:
        console.print(f"{data_set.info.source}: {note}")
    asked = options.of(typed, ModelConfig, TrainConfig) | {"max_epochs": epochs}
    chosen, how = options.settings_for(data_set.info, asked)
    model = configure(data_set, **chosen)
    options.check_dropouts(model)
    model_name = export_name or options.slug(data_set.info.name)
    if export is None:
        export = bool(data_set.info.own)
    if export:
        check_name(model_name)
        if export_name is None:
            check_successor(data_set.info, models, model_name, "give it a --name of its own, and a --run")
    folder = run or Path("runs") / f"{data_set.info.name}-{cell}"
    try:
        done = fit_run(data_set, model, how, folder, logs=logs, threads=threads, progress=sys.stdout.isatty())
    except KeyboardInterrupt:
        console.print(
            f"interrupted; the same command goes on from the last whole epoch in {folder}, "
            f"and `latch-train export {folder} --best-so-far` writes the best one as a model"
        )
        raise typer.Exit(130) from None
    result = done.result or {}
    console.print(f"{folder}: best epoch {result['best_epoch']} of {result['epochs']}, {result['seconds']} s")
    show(data_set, [Metric(**metric) for metric in result["metrics"]])
    if export or data_set.info.own:
        console.print(f"wrote {', '.join(map(str, write_report(folder, done, data_set)))}")
    if export:
        if (version := exported(done, models, model_name)) is not None:
            console.print(f"the same model is there already: {version} is left as it is")
        else:
            console.print(f"wrote {export_run(folder, models, model_name)}; `latch serve --models {models}` serves it")


def show(data_set: DataSet, metrics: list[Metric]) -> None:
    """Scores by split, and under each what the test score is to be read beside."""
    table = Table("", "metric", "valid", "test", "unit", title=data_set.info.description)
    for metric in (metric for metric in metrics if metric.split == "test"):
        valid = next(other.value for other in metrics if (other.name, other.split) == (metric.name, "valid"))
        table.add_row("this run", metric.name, f"{valid:.5g}", f"{metric.value:.5g}", metric.unit)
        for reference in data_set.references:
            if reference.metric == metric.name:
                table.add_row(reference.name, reference.metric, "", f"{reference.value:.5g}", metric.unit)
    console.print(table)


@app.command(name="sweep")
def sweep_command(
    name: options.Name = None,
    csv: options.Csv = None,
    text: options.Text = None,
    npz: options.Npz = None,
    wav: options.Wav = None,
    targets: options.Targets = None,
    inputs: options.Inputs = None,
    horizon: options.Horizon = None,
    season: options.Season = None,
    max_gap: options.MaxGap = None,
    time: options.Time = None,
    time_format: options.TimeFormat = None,
    by: options.By = None,
    split: options.Split = None,
    window: options.Window = None,
    licence: options.Licence = None,
    cells: Annotated[str, typer.Option(help=f"Units to try: {options.one_of(UNITS)}.")] = ",".join(sweep.Space.cells),
    hidden: Annotated[str, typer.Option(help="Hidden units, LOWEST:HIGHEST.")] = "16:128",
    layers: Annotated[str, typer.Option(help="Layers, LOWEST:HIGHEST.")] = "1",
    rate: Annotated[str, typer.Option(help="Learning rates, LOWEST:HIGHEST.")] = "0.0005:0.02",
    trials: Annotated[int, typer.Option(help="Trials in all, those of earlier calls included.")] = 30,
    seed: options.Seed = TrainConfig.seed,
    epochs: options.Epochs = 100,
    patience: options.Patience = None,
    run: Annotated[Path | None, typer.Option(help="The sweep's folder; default runs/sweep-NAME.")] = None,
    threads: options.Threads = 1,
) -> None:
    """Try units, sizes and rates; the valid split decides. The same command goes on with a sweep that was stopped.

    Optuna draws the points and gives up early on those that are worse than most. The best become `best.json`, which
    `latch-train fit --config` trains, scores and exports.

    **Examples**

    `latch-train sweep --csv plant.csv --targets flow --trials 40 --run runs/plant`

    `latch-train sweep chorales --cells gru,mgu2 --hidden 32:64`
    """
    typed = {**locals()}
    data_set = options.data_set(typed)
    for note in data_set.notes:
        console.print(f"{data_set.info.source}: {note}")
    settings, config = options.settings_for(
        data_set.info, {"seed": seed, "max_epochs": epochs, "patience": patience, "hidden": None}
    )
    del settings["hidden"]
    space = sweep.Space(
        options.names(cells), options.span(hidden, int), options.span(layers, int), options.span(rate, float)
    )
    folder = run or Path("runs") / f"sweep-{data_set.info.name}"
    try:
        found = sweep.sweep(
            data_set, space, settings, config, folder, trials=trials, threads=threads, tell=console.print
        )
    except KeyboardInterrupt:
        console.print(f"interrupted; the same command goes on with the trial that was running, in {folder}")
        raise typer.Exit(130) from None
    title = f"{data_set.info.name}: the best of {len(found)} that came to their end"
    table = Table("valid", "unit", "hidden", "rate", title=title)
    table.add_column("run", overflow="fold")
    for trial in found[:10]:
        cell, size, rates = (trial.params[key] for key in ("cell", "hidden", "rate"))
        where = sweep.folder_of(folder, trial.params).name
        table.add_row(f"{trial.value:.5g}", cell, f"{trial.params['layers']} x {size}", f"{rates:.2g}", where)
    console.print(table)
    best = {"name": name, "seed": seed, "epochs": epochs, "patience": patience}
    best |= options.of(typed, *options.ASKED) | found[0].params
    best |= {kind: str(path.resolve()) for kind, path in options.given_files(typed).items()}
    replace(folder / "best.json", json.dumps({key: value for key, value in best.items() if value is not None}) + "\n")
    console.print(f"`latch-train fit --config {folder / 'best.json'}` trains the best, scores it on the test split")


@app.command(name="compare")
def compare_command(
    folders: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    picture: Annotated[Path | None, typer.Option("--plot", help="Write a .png of score over parameters.")] = None,
) -> None:
    """Put runs side by side, those of one data set together, best valid score first.

    **Example:** `latch-train compare runs/chorales-gru runs/chorales-mgu2 --plot compare.png`
    """
    rows = compare.compare(folders)
    for contest in dict.fromkeys(row.contest for row in rows):
        table = Table(title=f"{contest[0]}\n{contest[1]}\n{contest[3]}")
        for column in compare.COLUMNS:
            table.add_column(column, overflow="fold")
        for row in rows:
            if row.contest == contest:
                table.add_row(*row.cells())
        console.print(table)
    if picture is not None:
        compare.plot(picture, rows)
        console.print(f"wrote {picture}")


@app.command()
def evaluate(folder: RunFolder) -> None:
    """Score a run's best weights (so far) anew on the valid and test splits, beside baselines and the papers' figures.

    **Example:** `latch-train evaluate runs/mine`
    """
    run = Run.load(folder)
    model, epoch = run.best_model(folder)
    data_set = data.load_again(run.data)
    console.print(f"{folder}: best epoch {epoch}" + ("" if run.result else " so far; the run has not finished"))
    show(data_set, score_all(model, data_set))


@app.command()
def export(
    folder: RunFolder,
    name: Annotated[str, typer.Option(help="The model's name; default the run folder's.")] = "",
    version: Annotated[
        str | None, typer.Option(help="The model's version, a whole number; default the next free one.")
    ] = None,
    models: options.Models = Path("models"),
    force: Annotated[bool, typer.Option("--force", help="Replace a version that exists.")] = False,
    best_so_far: Annotated[
        bool, typer.Option("--best-so-far", help="Write the best weights of a run that has not finished.")
    ] = False,
    lowering: Annotated[
        str, typer.Option(help=f"What a step becomes in ONNX: {options.one_of(LOWERINGS)}; only gru has an operator.")
    ] = "primitives",
) -> None:
    """Write a run as models/NAME/VERSION: step graph, manifest, golden vectors. No parity, no artifact.

    **Example:** `latch-train export runs/mine --name my-chorales --models models`
    """
    if not name:
        name = folder.resolve().name
        if not force:
            check_successor(Run.load(folder).data, models, name)
    path = export_run(folder, models, name, version, force=force, best_so_far=best_so_far, lowering=lowering)
    console.print(f"wrote {path}")


@app.command(name="adopt")
def adopt_command(
    file: Annotated[Path, typer.Argument(help="An ONNX graph of one step that takes and returns its state.")],
    state: Annotated[
        list[str],
        typer.Option(help="IN=OUT or IN=OUT@AXIS: a state, its next value, the axis of its batch; repeat it."),
    ],
    constant: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE: an input that is always the same, in JSON; repeat it.")
    ] = None,
    sequence: Annotated[
        str | None, typer.Option("--input", help="NAME or NAME@AXIS of what a client sends; else the input left over.")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="NAME=512 or NAME=2x64: sizes, without the batch, that the graph leaves open."),
    ] = None,
    ids: Annotated[int | None, typer.Option(help="An int64 input takes ids below this.")] = None,
    sample: Annotated[
        Path | None,
        typer.Option(help="A .npy of inputs [sequences, steps, ...] for the golden vectors; else random ones."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name; default the file's.")] = None,
    about: Annotated[str, typer.Option(help="A sentence for the person who picks a model.")] = "",
    version: Annotated[str | None, typer.Option(help="A whole number; default the next free one.")] = None,
    models: options.Models = Path("models"),
    force: Annotated[bool, typer.Option("--force", help="Replace a version that exists.")] = False,
) -> None:
    """Write models/NAME/VERSION around a step graph made by anyone: manifest and golden vectors.

    The graph takes one input of the client's, any number of states and constants, each tensor with a dynamic batch
    axis of its own. It is run to see that this holds; one that cannot be served says which tensor is why.

    **Examples**

    `latch-train adopt vad.onnx --state state=stateN@1 --constant sr=16000 --shape input=512`

    `latch-train adopt lstm.onnx --name words --state h=h_out --state c=c_out --ids 5000`
    """
    plan = adopt.Plan(state, constant or (), shape or (), sequence, ids, sample)
    named = name or options.slug(file.stem)
    path = adopt.adopt(
        file, models, named, plan, version=version, force=force, about=about, succeeds=name is None and not force
    )
    console.print(f"wrote {path}; `latch serve --models {models}` serves it")


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
            table.add_row(known, *data.FILES.get(known, ("made or bundled", "free to use")))
        console.print(table)
        return
    data_set = data.load(name)
    table = Table("split", "sequences", "steps", title=f"{name}: {data_set.info.description}")
    for split, items in data_set.splits.items():
        table.add_row(split, str(len(items)), str(sum(len(inputs) for inputs, _, _ in items.items)))
    console.print(table)
    console.print(f"source: {data_set.info.source}\nsha256: {data_set.info.sha256}\nlicence: {data_set.info.licence}")


@app.command(name="reproduce")
def reproduce_command(
    name: Annotated[str, typer.Argument(help=f"The experiment: {options.one_of(experiments.EXPERIMENTS)}.")],
    quick: Annotated[bool, typer.Option("--quick", help="A few minutes: few sequences, units and epochs.")] = False,
    arms: Annotated[str | None, typer.Option(help="Only these data sets of it, separated by commas.")] = None,
    cells: Annotated[str | None, typer.Option(help="Only these units.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Only these seeds, such as 1,2.")] = None,
    epochs: Annotated[int | None, typer.Option(help="At most so many epochs; the report calls it reduced.")] = None,
    results: Annotated[Path, typer.Option(help="Where NAME.json, .md and .png go.")] = Path("training/results"),
    runs: Annotated[Path, typer.Option(help="Where the run folders go.")] = Path("runs/reproduce"),
    jobs: Annotated[int, typer.Option(help="Runs at a time; of more than one no bar is shown.")] = 1,
    threads: options.Threads = 1,
) -> None:
    """Run a paper's experiment and set its figures beside ours. The same command goes on where it was stopped.

    Every run that has ended is a record in NAME.json; a run that has a record is not run again. The report is written
    anew each time, so that a part of an experiment has one too.

    **Examples**

    `latch-train reproduce music --quick`

    `latch-train reproduce music --arms chorales --cells gru,mgu2 --seeds 1,2,3 --jobs 4`
    """
    experiment = experiments.find(name)
    if quick:
        experiment, name = experiment.quick(), f"{name}-quick"
    choice = reproduce.Choice(
        options.names(arms) or None, options.names(cells) or None, options.numbers(seeds) or None, epochs
    )
    try:
        records = reproduce.reproduce(
            name, experiment, choice, results / f"{name}.json", runs,
            jobs=jobs, threads=threads, progress=sys.stdout.isatty(), tell=console.print,
        )  # fmt: skip
    except KeyboardInterrupt:
        console.print(
            f"interrupted; the same command goes on from the last whole epoch; records: {results / name}.json"
        )
        raise typer.Exit(130) from None
    console.print(f"wrote {', '.join(map(str, findings.write(results, name, experiment, records)))}")


@app.command(name="ship")
def ship_command(
    names: Annotated[list[str] | None, typer.Argument(help="Which; all when left out.")] = None,
    runs: Annotated[Path, typer.Option(help="Where the run folders go.")] = Path("runs/shipped"),
    models: options.Models = Path("models"),
    threads: options.Threads = 1,
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
    except (TrainingError, OSError) as error:  # a folder that is a file, a disk that is full
        # A message may hold brackets, which are not markup, and stays one line, so that it can be searched for.
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
