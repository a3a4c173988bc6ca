"""What a run is worth, for a person: `report.md` with the scores beside the baselines, and `forecast.png`.

Its one rule: every number in it was measured on the run's own splits. It must not know how the run was trained.
"""

from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

from training.checkpoint import Run, replace
from training.data.sequences import DataSet
from training.model import RecurrentModel

PLOTTED_ROWS, PLOTTED_TARGETS = 240, 4


def write_report(folder: Path, run: Run, data: DataSet) -> list[Path]:
    """Write the report of a finished run into its folder; returns what was written."""
    written = [folder / "report.md"]
    if run.data.task == "forecast":
        model, _ = run.best_model(folder)
        plot_forecast(folder / "forecast.png", model, data)
        written.append(folder / "forecast.png")
    replace(written[0], describe(run, data, [path.name for path in written[1:]]))
    return written


def describe(run: Run, data: DataSet, pictures: list[str]) -> str:
    """The report as Markdown."""
    result, references = run.result or {}, data.references
    others = list(dict.fromkeys(reference.name for reference in references))
    known = {(reference.name, reference.metric): f"{reference.value:.4g}" for reference in references}
    scores = {(metric["name"], metric["split"]): metric["value"] for metric in result["metrics"]}
    units = {metric["name"]: metric["unit"] for metric in result["metrics"]}
    steps = ", ".join(  # windows of the training split overlap
        f"{name} {sum(int(predicted.sum()) for _, _, predicted in data.splits[name].items)}"
        for name in ("valid", "test")
    )
    rows = [
        "| " + " | ".join([name, unit, *(f"{scores[name, split]:.4g}" for split in ("valid", "test")),
                           *(known.get((other, name), "") for other in others)]) + " |"
        for name, unit in units.items()
    ]  # fmt: skip
    head = ["metric", "unit", "valid", "test", *(f"{other}, test" for other in others)]
    return "\n".join(
        [
            f"# {run.data.name}: {run.data.description}",
            "",
            f"{run.model.layers} x {run.model.hidden} {run.model.cell}, seed {run.train.seed}, best of "
            f"{result['epochs']} epochs: {result['best_epoch']}, {result['seconds']} s. From {run.data.source}, sha256 "
            f"{run.data.sha256}. Split {run.data.split}; scored steps: {steps}.",
            "",
            *(f"- {note}" for note in data.notes),
            *([""] if data.notes else []),
            "| " + " | ".join(head) + " |",
            "|" + "---|" * len(head),
            *rows,
            "",
            "Baselines are scored on the same steps of the test split, unless they say else. `std` is a deviation of "
            "the training split.",
            *(f"\n![{picture}]({picture})" for picture in pictures),
            "",
        ]
    )


@matplotlib.rc_context({"text.parse_math": False})  # a column may be called price_$/kWh
@torch.no_grad()
def plot_forecast(path: Path, model: RecurrentModel, data: DataSet) -> None:
    """Measured and forecast values of the first scored rows of the test split, with two standard deviations."""
    inputs, targets, predicted = data.splits["test"].items[0]
    values = model.predict(model(torch.from_numpy(inputs)[None].float())[0][0])
    shown = predicted.nonzero()[0][:PLOTTED_ROWS]
    count = min(targets.shape[1], PLOTTED_TARGETS)
    figure = Figure(figsize=(10, 2.6 * count), layout="constrained")
    for column, axes in enumerate(figure.subplots(count, squeeze=False)[:, 0]):
        forecast = values[0][shown, column].numpy()
        axes.plot(shown - shown[0], targets[shown, column], color="black", linewidth=1, label="measured")
        axes.plot(shown - shown[0], forecast, color="tab:blue", linewidth=1.2, label="forecast")
        if len(values) > 1:
            spread = 2 * values[1][shown, column].numpy()
            axes.fill_between(shown - shown[0], forecast - spread, forecast + spread, color="tab:blue", alpha=0.2)
        name, unit = data.info.outputs[column]
        axes.set_ylabel(f"{name} [{unit}]" if unit else name)
    axes.set_xlabel("rows of the test split")
    figure.axes[0].legend(loc="upper right")
    figure.suptitle(data.info.description)
    figure.savefig(path, dpi=100, metadata={"Software": None})
