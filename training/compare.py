"""Runs side by side: one table and one picture, best first.

Its one rule: only scores of the same data set are compared, so every data set is ranked by itself. It must not know
how a run was trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from training.checkpoint import Run
from training.errors import CheckpointError, ConfigError
from training.model import RecurrentModel, count

COLUMNS = ("run", "unit", "hidden", "weights", "seed", "rate", "epochs", "s", "valid", "test")


@dataclass(frozen=True)
class Row:
    """A finished run; `valid` and `test` are its first metric, nll or else mae: lower is better."""

    folder: Path
    run: Run
    parameters: int
    metric: str
    valid: float
    test: float

    @property
    def contest(self) -> tuple[str, str, str, str]:
        """What its scores may be compared within: what is asked of the data, which part of them is scored, what else
        decides on that and what the data hold, the metric.
        """
        data = self.run.data
        rows = {key: data.own[key] for key in ("season", "max_gap", "by", "draw") if key in data.own}
        rows |= (self.run.result or {}).get("scored", {})  # fewer where an input is missing
        return f"{data.name}: {data.description}", f"split {data.split}", f"{data.sha256} {rows}", self.metric

    def cells(self) -> tuple[str, ...]:
        """The row as text, under COLUMNS."""
        model, train, result = self.run.model, self.run.train, self.run.result or {}
        size = str(model.hidden) if model.layers == 1 else f"{model.layers} x {model.hidden}"
        return (
            str(self.folder), model.cell, size, str(self.parameters), str(train.seed),
            f"{train.rate:.2g}", str(result["epochs"]), f"{result['seconds']:.0f}", f"{self.valid:.5g}",
            f"{self.test:.5g}",
        )  # fmt: skip


def compare(folders: Sequence[Path]) -> list[Row]:
    """The runs by data set, best valid score first; CheckpointError for a folder that holds no finished run."""
    rows = [_row(folder) for folder in folders]
    return sorted(rows, key=lambda row: (row.contest, row.valid))


def _row(folder: Path) -> Row:
    run = Run.load(folder)
    if run.result is None:
        raise CheckpointError(f"the run in {folder} has not finished: fit it to the end, or leave it out")
    metrics = {(metric["name"], metric["split"]): metric["value"] for metric in run.result["metrics"]}
    name = run.result["metrics"][0]["name"]  # nll, or mae for a head without a likelihood: lower is better for both
    return Row(folder, run, count(RecurrentModel(run.model)), name, metrics[name, "valid"], metrics[name, "test"])


@matplotlib.rc_context({"text.parse_math": False})  # what is forecast may be called price_$/kWh
def plot(path: Path, rows: Sequence[Row]) -> None:
    """Test score over parameters, one panel for each data set and score, one mark for each run, as a .png."""
    if path.suffix != ".png":
        raise ConfigError(f"a plot is a .png, not {path}")
    panels = list(dict.fromkeys(row.contest for row in rows))
    figure = Figure(figsize=(7, 4 * len(panels)), layout="constrained")
    for key, axes in zip(panels, figure.subplots(len(panels), squeeze=False)[:, 0], strict=True):
        shown = [row for row in rows if row.contest == key]
        for unit in dict.fromkeys(row.run.model.cell for row in shown):
            mine = [row for row in shown if row.run.model.cell == unit]
            axes.scatter([row.parameters for row in mine], [row.test for row in mine], label=unit)
        for row in shown:
            axes.annotate(
                row.folder.name, (row.parameters, row.test), fontsize=7, xytext=(4, 3), textcoords="offset points"
            )
        axes.set(xlabel="parameters", ylabel=f"test {key[3]}")
        axes.set_title(f"{key[0]}\n{key[1]}", fontsize="small", wrap=True)
        axes.legend()
    figure.savefig(path, dpi=100, metadata={"Software": None})
