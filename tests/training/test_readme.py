"""The README's figures are the manifests' and its commands exist."""

import json
import re
from pathlib import Path

import onnx
import pytest

from training import data, findings, reproduce, ship
from training.__main__ import app
from training.cells import UNITS
from training.experiments import EXPERIMENTS
from training.presets import PRESETS

README = Path("training/README.md").read_text()
# What a preset's score stands beside.
PAPERS = (("Bai 2018", "gru"), ("Bai 2018", "TCN"), ("RRU 2021", "gru"), ("RRU 2021", "RRU"))
# Experiments and arms that were run to their end with all units.
OTHERS = (
    ("music", "nottingham"), ("music", "musedata"), ("music", "piano-midi"), ("adding", "steps-100"),
    ("adding", "steps-200"), ("imdb", "imdb"), ("mnist-rows", "rows-0.001"),
)  # fmt: skip


@pytest.mark.parametrize("cell", ship.HIDDEN)
def test_the_units_table_is_what_the_manifests_say(cell: str) -> None:
    """Title, units, parameters, valid and test NLL and node count of every row."""
    name = f"chorales-{cell}"
    manifest = json.loads(Path("models", name, "1", "manifest.json").read_text())
    nodes = len(onnx.load(Path("models", name, "1", "model.onnx")).graph.node)
    unit, nll = manifest["unit"], {m["split"]: m["value"] for m in manifest["metrics"]}
    row = (
        f"| `{unit['cell']}` | {UNITS[unit['cell']].title} | {unit['hidden_size']} | {unit['parameters']} "
        f"| {nll['valid']:.2f} | {nll['test']:.2f} | {nodes} |"
    )
    assert row in README


@pytest.mark.parametrize("name", PRESETS)
def test_the_presets_table_is_what_the_manifests_say(name: str) -> None:
    """The model it ships as, its size, its scores, and those of the papers beside them; no other preset is named."""
    (model,) = [model for model, row in ship.SHIPPED.items() if row == PRESETS[name]]
    manifest = json.loads(Path("models", model, "1", "manifest.json").read_text())
    nll = {m["split"]: m["value"] for m in manifest["metrics"]}
    papers = EXPERIMENTS["music"].arms[PRESETS[name].data].papers
    figures = [papers[paper][other] for paper, other in PAPERS]
    row = [f"`{name}`", f"`{model}`", f"{manifest['parameters']:,}", f"{nll['valid']:.2f}", f"{nll['test']:.2f}"]
    assert f"| {' | '.join([*row, *(f'{figure:.2f}' for figure in figures)])} |" in README


def test_the_sensors_figures_are_measured() -> None:
    """The model's error is its manifest's, the baselines' are the data set's."""
    manifest = json.loads(Path("models/sensors/1/manifest.json").read_text())
    mae = next(m["value"] for m in manifest["metrics"] if (m["name"], m["split"]) == ("mae", "test"))
    last, season = (one.value for one in data.load("sensors").references if one.metric == "mae")
    assert f"model {mae:.3f}, last value {last:.3f}, same time yesterday {season:.3f}" in README


def test_every_command_is_in_the_readme() -> None:
    """And the README names no command that does not exist."""
    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert set(re.findall(r"`latch-train (\w+)", README)) == known


def table(name: str) -> list[str]:
    """The rows of a table of the service's README, without its head."""
    page = Path("README.md").read_text().partition(f"<!-- table: {name} -->\n\n")[2]
    return page.partition("\n\n")[0].splitlines()[2:]


def test_the_other_experiments_table_is_what_the_records_say() -> None:
    """Mean and deviation over the seeds of runs that were not cut short, a column for each of some experiments."""
    columns = []
    for experiment, arm in OTHERS:
        whole = EXPERIMENTS[experiment].arms[arm]
        records = reproduce.load(Path(f"training/results/{experiment}.json")).values()
        records = [one for one in records if one.arm == arm and one.train["max_epochs"] == whole.train.max_epochs]
        columns.append({cell: [one.test for one in records if one.cell == cell] for cell in whole.hidden})
    rows = [f"| `{cell}` | {' | '.join(findings.spread(column[cell]) for column in columns)} |" for cell in columns[0]]
    assert table("others") == rows


def test_the_sentence_on_speech_is_what_the_records_say() -> None:
    """Its scores, and how far the runs got."""
    records = reproduce.load(Path("training/results/speech.json")).values()
    scores = {one.cell: one.test for one in records}
    said = Path("README.md").read_text()
    assert re.findall(r"`(\w+)` (-\d+\.\d\d)", said) == [
        (cell, f"{scores[cell]:.2f}") for cell in ("gru", "lstm", "gru1", "mgu", "gru3", "rnn")
    ]
    whole = EXPERIMENTS["speech"].arms["speech"].train.max_epochs
    assert {one.cell: one.epochs for one in records if one.limit >= whole} == {"gru": 69, "lstm": 100}
    assert {one.epochs for one in records if one.limit < whole} == {33}
    for words in ("after 69 epochs", "had all 100", "33 epochs were run"):
        assert words in " ".join(said.split())


def test_the_papers_table_is_what_the_records_say() -> None:
    """The README's rows of JSB: size, parameters, mean and deviation, and the papers' figures of the same unit."""
    arm, rows = EXPERIMENTS["music"].arms["chorales"], []
    records = reproduce.load(Path("training/results/music.json")).values()
    for cell, hidden in arm.hidden.items():
        mine = [record for record in records if (record.arm, record.cell) == ("chorales", cell)]
        ours = [str(hidden), f"{mine[0].parameters:,}", findings.spread([record.test for record in mine])]
        papers = [findings.figure(arm, arm.papers[name], cell) for name in ("Chung 2014", "Bai 2018", "RRU 2021")]
        rows.append(f"| `{cell}` | {' | '.join([*ours, *papers])} |")
    assert table("papers") == rows
