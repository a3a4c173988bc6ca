"""The command line: each command does what its help says, and refusals are one line."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.training.test_export import replay
from training import __main__ as cli
from training import ship
from training.config import TrainConfig
from training.errors import TrainingError

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
    replay(tmp_path / "models" / "small" / "1")


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
    """A row of the table becomes a model folder, in one command that can be repeated."""
    monkeypatch.setitem(ship.SHIPPED, "tiny", ship.Shipped("digits", "gru3", 6, TrainConfig(max_epochs=1)))
    for _ in range(2):
        call("ship", "tiny", "--runs", str(tmp_path / "runs"), "--models", str(tmp_path / "models"))
    replay(tmp_path / "models" / "tiny" / "1")


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
