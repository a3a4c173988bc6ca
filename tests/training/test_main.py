"""The command line: each command does what its help says, and refusals are one line."""

import json
from functools import partial
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.training.test_export import replay
from tests.training.test_trainer import StopAt
from training import __main__ as cli
from training import ship
from training.config import TrainConfig
from training.errors import TrainingError
from training.trainer import fit

COMMANDS = ("fit", "evaluate", "export", "data", "ship")
runner = CliRunner()


def call(*words: str) -> str:
    """The output of a command that succeeds."""
    result = runner.invoke(cli.app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str) -> None:
    """Every command's help has an example that starts with the command itself."""
    assert f"latch-train {command}" in " ".join(call(command, "--help").split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_what_was_written(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 80 columns no option is cut short, and no word of an option's help is taken for markup."""
    monkeypatch.setenv("COLUMNS", "80")
    shown = call(command, "--help")
    assert "…" not in shown
    for option in typer.main.get_command(cli.app).commands[command].params:  # type: ignore[attr-defined]
        assert set((option.help or "").replace("`", "").split()) <= set(shown.split())


def test_no_example_exports_over_a_shipped_model() -> None:
    """Somebody will copy it."""
    assert not any(name in call("export", "--help") for name in ship.SHIPPED)


def test_fit_evaluate_export(tmp_path: Path) -> None:
    """From a data set to a model folder in three commands; fitting again finds the finished run."""
    run = str(tmp_path / "small")
    fit = ("fit", "digits", "--cell", "mgu2", "--hidden", "8", "--epochs", "2", "--batch-size", "64", "--run", run)
    assert "accuracy" in call(*fit)
    first = (tmp_path / "small" / "run.json").read_text()
    call(*fit)
    assert (tmp_path / "small" / "run.json").read_text() == first
    assert "chance" in call("evaluate", run)
    call("export", run, "--models", str(tmp_path / "models"))
    for version in ("1", "2"):
        call("export", run, "--models", str(tmp_path / "models"))
        replay(tmp_path / "models" / "small" / version)
    with pytest.raises(TrainingError, match="exists: leave out --version"):
        call("export", run, "--models", str(tmp_path / "models"), "--version", "1")
    call("export", run, "--models", str(tmp_path / "models"), "--version", "1", "--force")


def test_an_interrupted_run_can_be_scored_and_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`evaluate` says that it has not finished, and the exported metrics are those that `evaluate` prints."""
    run, models = tmp_path / "run", tmp_path / "models"
    words = ("fit", "digits", "--hidden", "8", "--batch-size", "64", "--run", str(run))
    monkeypatch.setattr(cli, "fit_run", partial(fit, callbacks=(StopAt(3, KeyboardInterrupt()),)))
    stopped = runner.invoke(cli.app, words)
    assert stopped.exit_code == 130
    assert f"`latch-train export {run} --best-so-far`" in stopped.output
    told = call("evaluate", str(run))
    assert "best epoch 2 so far; the run has not finished" in told
    call("export", str(run), "--models", str(models), "--best-so-far")
    replay(models / "run" / "1")
    manifest = json.loads((models / "run" / "1" / "manifest.json").read_text())
    assert (manifest["training"]["epochs"], manifest["training"]["unfinished"]) == (2, True)
    assert {metric["split"] for metric in manifest["metrics"]} == {"valid", "test"}
    assert all(f"{metric['value']:.4f}" in told for metric in manifest["metrics"])
    assert json.loads((run / "run.json").read_text())["result"] is None


def test_evaluate_repeats_the_runs_own_scores(tmp_path: Path) -> None:
    """What `fit` stored is what `evaluate` prints."""
    run = tmp_path / "run"
    call(
        "fit", "adding", "--cell", "mingru", "--hidden", "4", "--epochs", "1", "--batch-size", "200", "--run", str(run)
    )
    told = next(
        m["value"] for m in json.loads((run / "run.json").read_text())["result"]["metrics"] if m["split"] == "test"
    )
    assert f"{told:.4f}" in call("evaluate", str(run))


def test_data_lists_and_checks() -> None:
    """Without a name all sets are listed; with one its splits are counted."""
    listed = call("data")
    assert all(name in listed for name in ("chorales", "nottingham", "sensors", "adding", "digits"))
    assert "1200" in call("data", "digits")


def test_ship_trains_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the table becomes a model folder; the same command again replaces it and adds no version."""
    monkeypatch.setitem(ship.SHIPPED, "tiny", ship.Shipped("digits", "gru3", 6, TrainConfig(max_epochs=1)))
    for _ in range(2):
        call("ship", "tiny", "--runs", str(tmp_path / "runs"), "--models", str(tmp_path / "models"))
    replay(tmp_path / "models" / "tiny" / "1")
    assert [path.name for path in (tmp_path / "models" / "tiny").iterdir()] == ["1"]


def test_an_unknown_shipped_model_is_refused(tmp_path: Path) -> None:
    """The message lists the known ones."""
    with pytest.raises(TrainingError, match="unknown shipped model 'x': choose one of chorales-gru, "):
        runner.invoke(cli.app, ["ship", "x"], catch_exceptions=False)


def test_a_refusal_is_one_line_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No traceback reaches the user."""
    monkeypatch.setattr("sys.argv", ["latch-train", "fit", "corals"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "error: unknown data set 'corals'" in error
    assert "Traceback" not in error


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Status 130, and a sentence instead of a traceback."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "fit_run", interrupted)
    result = runner.invoke(cli.app, ["fit", "digits"])
    assert result.exit_code == 130
    assert "the same command goes on" in result.output
