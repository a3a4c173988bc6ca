"""The command line: each command does what its help says, and refusals are one line."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import typer
from scipy.io import wavfile
from typer.testing import CliRunner

from tests.training import strangers
from tests.training.test_export import replay
from tests.training.test_trainer import StopAt
from training import __main__ as cli
from training import data, options, ship, sweep
from training.checkpoint import Run, load_tensors
from training.config import TrainConfig
from training.data.sequences import DataSet
from training.errors import ConfigError, ExportError, TrainingError
from training.presets import PRESETS, Preset
from training.trainer import configure, fit

COMMANDS = ("fit", "sweep", "compare", "evaluate", "export", "adopt", "data", "ship")
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dropout", "0.3"], "--dropout 0.3 is between layers: say --layers 2"),
        (["--cell", "mingru", "--recurrent-dropout", "0.2"], "mingru has no weights from h to h"),
    ],
)
def test_a_dropout_that_drops_nothing_is_refused(words: list[str], message: str, tmp_path: Path) -> None:
    """Who asked for it would believe that it helped, or did not."""
    with pytest.raises(ConfigError, match=message):
        call("fit", "sensors", *words, "--run", str(tmp_path / "run"))


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


@pytest.fixture
def waves(tmp_path: Path) -> Path:
    """A CSV of two slow waves and a gap."""
    path = tmp_path / "Two Waves.csv"
    rows = [f"{np.sin(row / 9):.4f},{np.cos(row / 7):.4f}" for row in range(300)]
    rows[50] = ","
    path.write_text("\n".join(["a [m],b", *rows]) + "\n")
    return path


def test_one_command_makes_a_model_of_a_csv(tmp_path: Path, waves: Path) -> None:
    """Trained, scored beside the baselines, drawn and exported; again, it is found finished and nothing is added."""
    models, run = tmp_path / "models", tmp_path / "run"
    words = ["fit", "--csv", str(waves), "--targets", "a [m]", "--season", "57", "--window", "32", "--hidden", "6"]
    words += ["--epochs", "2", "--run", str(run), "--models", str(models)]
    told = call(*words)
    assert "Two Waves.csv: a [m]: 1 cell missing (line 52): 1 filled with the last value" in told
    assert all(name in told for name in ("this run", "last value", "seasonal naive (57 rows)"))
    replay(models / "two-waves" / "1")
    manifest = json.loads((models / "two-waves" / "1" / "manifest.json").read_text())
    assert manifest["input"]["features"] == [{"name": "a", "unit": "m"}, {"name": "b"}]
    assert manifest["data"]["source"] == "Two Waves.csv"
    report = (run / "report.md").read_text()
    assert "| mae a | m |" in report
    assert "seasonal naive (57 rows), test" in report
    assert (run / "forecast.png").read_bytes().startswith(b"\x89PNG")
    assert f"the same model is there already: {models / 'two-waves' / '1'} is left as it is" in call(*words)
    assert [path.name for path in (models / "two-waves").iterdir()] == ["1"]
    assert "last value" in call("evaluate", str(run))


def test_another_question_is_no_new_version(tmp_path: Path, waves: Path) -> None:
    """Who asks for a model gets its newest version: other targets or inputs need a name, and to give it is consent."""
    models, run = tmp_path / "models", tmp_path / "run"
    words = ["fit", "--csv", str(waves), "--window", "32", "--hidden", "6", "--epochs", "1", "--models", str(models)]
    call(*words, "--targets", "a", "--run", str(run))
    with pytest.raises(ExportError, match=r"1 is for a 1 row .*, and this is for b 1 row .* a --name of its own"):
        call(*words, "--targets", "b", "--run", str(tmp_path / "other"))
    with pytest.raises(ExportError, match="takes a, b, and this takes a: that is no new version"):
        call(*words, "--targets", "a", "--inputs", "a", "--run", str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()
    assert [path.name for path in (models / "two-waves").iterdir()] == ["1"]
    named = call(*words, "--targets", "b", "--run", str(tmp_path / "other"), "--name", "two-waves")
    assert str(models / "two-waves" / "2") in named


def test_export_under_the_folders_name_asks_as_fit_does(tmp_path: Path, waves: Path) -> None:
    """A run folder may be called as a model of something else is; to give the name, or to force it, is consent."""
    models, words = tmp_path / "models", ["--csv", str(waves), "--window", "32", "--hidden", "6", "--epochs", "1"]
    for target in "ab":
        call("fit", *words, "--targets", target, "--no-export", "--run", str(tmp_path / target / "flow"))
    first, other = (("export", str(tmp_path / target / "flow"), "--models", str(models)) for target in "ab")
    call(*first)
    with pytest.raises(ExportError, match=r"flow/1 is for a 1 row .* this is for b .* so give it a --name of its own$"):
        call(*other)
    assert [path.name for path in (models / "flow").iterdir()] == ["1"]
    assert str(models / "flow" / "2") in call(*first)
    assert str(models / "flow" / "3") in call(*other, "--name", "flow")
    assert str(models / "flow" / "1") in call(*other, "--version", "1", "--force")


def test_a_text_has_versions_too(tmp_path: Path) -> None:
    """The same question of the same file, whether its ids have names in the manifest or not; other folders are none."""
    (tmp_path / "t.txt").write_text("abcd efgh " * 60)
    words = ["fit", "--text", str(tmp_path / "t.txt"), "--hidden", "4", "--epochs", "1", "--models"]
    words += [str(tmp_path / "m"), "--run"]
    call(*words, str(tmp_path / "one"))
    (tmp_path / "m" / "t" / "1.old").mkdir()
    assert "is left as it is" in call(*words, str(tmp_path / "one"))
    assert str(tmp_path / "m" / "t" / "2") in call(*words, str(tmp_path / "two"), "--seed", "2")
    (tmp_path / "m" / "t" / "1" / "manifest.json").write_text("{")
    assert str(tmp_path / "m" / "t" / "3") in call(*words, str(tmp_path / "three"), "--seed", "3", "--name", "t")


def test_a_finished_run_becomes_a_model_once(tmp_path: Path, waves: Path) -> None:
    """Whether it does is a matter of the run, not of whether there is a model of the name."""
    models = tmp_path / "models"
    words = ["fit", "--csv", str(waves), "--window", "32", "--hidden", "6", "--epochs", "1", "--models", str(models)]
    words += ["--targets", "a"]
    call(*words, "--run", str(tmp_path / "one"))
    other = [*words, "--cell", "mgu", "--run", str(tmp_path / "other")]
    call(*other, "--no-export")
    assert str(models / "two-waves" / "2") in call(*other)
    assert f"{models / 'two-waves' / '2'} is left as it is" in call(*other)
    assert sorted(path.name for path in (models / "two-waves").iterdir()) == ["1", "2"]


def test_adopt_writes_a_model(tmp_path: Path) -> None:
    """What `adopt --help` shows, on a graph of that kind."""
    path, models = strangers.voice(tmp_path / "VAD.onnx"), tmp_path / "models"
    words = ("--state", "state=stateN@1", "--constant", "rate=16000", "--shape", "x=6")
    assert f"wrote {models / 'vad' / '1'}" in call("adopt", str(path), *words, "--models", str(models))
    assert json.loads((models / "vad" / "1" / "manifest.json").read_text())["description"] == "adopted from VAD.onnx"
    assert f"wrote {models / 'voice' / '1'}" in call(
        "adopt", str(path), *words, "--name", "voice", "--models", str(models)
    )


def test_text_and_arrays_become_models(tmp_path: Path) -> None:
    """One command each; the alphabet and the classes are the output's features."""
    (tmp_path / "novel.txt").write_text("the cat sat on the mat. " * 40)
    rng, y = np.random.default_rng(0), np.arange(60) % 2
    np.savez(tmp_path / "walks.npz", x=rng.normal(size=(60, 5, 3)) + y[:, None, None], y=y, classes=["up", "down"])
    small = ("--hidden", "4", "--epochs", "1", "--models", str(tmp_path / "models"))
    told = call("fit", "--text", str(tmp_path / "novel.txt"), "--run", str(tmp_path / "text"), *small)
    assert all(name in told for name in ("bits", "perplexity", "unigrams", "bigrams"))
    told = call("fit", "--npz", str(tmp_path / "walks.npz"), "--run", str(tmp_path / "npz"), *small)
    assert all(name in told for name in ("accuracy", "most frequent class", "class with the nearest mean input"))
    for name, features in (("novel", [*" .acehmnost", "�"]), ("walks", ["up", "down"])):
        replay(tmp_path / "models" / name / "1")
        manifest = json.loads((tmp_path / "models" / name / "1" / "manifest.json").read_text())
        assert [feature["name"] for feature in manifest["outputs"][0]["features"]] == features


def test_recordings_become_a_model(tmp_path: Path) -> None:
    """The input's features are the bands, the output's the folders."""
    for label, hertz in (("high", 2000), ("low", 300)):
        (tmp_path / "sounds" / label).mkdir(parents=True)
        for take in range(7):
            wave = 9000 * np.sin(2 * np.pi * hertz * np.arange(800 + 80 * take) / 8000)
            wavfile.write(tmp_path / "sounds" / label / f"{take}.wav", 8000, wave.astype(np.int16))
    small = ("--hidden", "4", "--epochs", "1", "--models", str(tmp_path / "models"), "--run", str(tmp_path / "run"))
    assert "14 recordings at 8000 Hz" in call("fit", "--wav", str(tmp_path / "sounds"), *small)
    replay(tmp_path / "models" / "sounds" / "1")
    manifest = json.loads((tmp_path / "models" / "sounds" / "1" / "manifest.json").read_text())
    assert len(manifest["input"]["features"]) == 40
    assert [feature["name"] for feature in manifest["outputs"][0]["features"]] == ["high", "low"]


def test_a_sweeps_best_is_trained_by_its_file(tmp_path: Path, waves: Path) -> None:
    """The file holds the data, the point and the limits; what is typed beside it wins; `compare` ranks the runs."""
    words = ("--csv", str(waves), "--targets", "b", "--inputs", "b", "--window", "32", "--season", "0")
    swept = ("--cells", "gru3,mgu3", "--hidden", "2:3", "--epochs", "1", "--trials", "2", "--run", str(tmp_path / "s"))
    swept += ("--patience", "7")
    told = call("sweep", *words, *swept)
    assert "the best of 2 that came to their end" in told
    assert "the best of 2 that" in call("sweep", *words, *swept, "--trials", "1")
    best = json.loads((tmp_path / "s" / "best.json").read_text())
    assert best["csv"] == str(waves)
    losses = {path.parent: load_tensors(path)[1]["valid_loss"] for path in (tmp_path / "s").glob("runs/*/best.*")}
    assert len(losses) == 2
    assert min(losses, key=lambda folder: losses[folder]) == sweep.folder_of(tmp_path / "s", best)
    config = ("fit", "--config", str(tmp_path / "s" / "best.json"), "--no-export")
    call(*config, "--run", str(tmp_path / "best"))
    run = Run.load(tmp_path / "best")
    assert (run.model.cell, run.model.hidden, run.train.rate) == (best["cell"], best["hidden"], best["rate"])
    assert (run.train.max_epochs, run.train.patience, run.data.own["targets"]) == (1, 7, ["b"])
    call(*config, "--run", str(tmp_path / "other"), "--hidden", "5")
    assert Run.load(tmp_path / "other").model.hidden == 5
    compared = call("compare", str(tmp_path / "best"), str(tmp_path / "other"), "--plot", str(tmp_path / "both.png"))
    assert "Two Waves: b 1 row ahead, with uncertainty" in compared
    assert (tmp_path / "both.png").is_file()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "is not a file of options"),
        ('{"size": 3}', "unknown option size"),
        ("{", "is not a file of options"),
        ('{"targets": ["a", "b"]}', r'targets is \["a", "b"\]: write it as it is typed, such as "a,b"'),
    ],
)
def test_a_config_that_is_none_is_refused(tmp_path: Path, content: str, words: str) -> None:
    """By its name, and by the option that nobody knows."""
    (tmp_path / "best.json").write_text(content)
    with pytest.raises(TrainingError, match=rf"best\.json.*{words}"):
        call("fit", "--config", str(tmp_path / "best.json"))


def test_an_option_of_another_kind_is_refused(tmp_path: Path) -> None:
    """A horizon means nothing to a text."""
    with pytest.raises(TrainingError, match="--horizon says nothing about a --text: leave it out"):
        call("fit", "--text", str(tmp_path / "novel.txt"), "--horizon", "3")


def test_a_models_name_is_refused_before_the_training(tmp_path: Path, waves: Path) -> None:
    """Not after it."""
    with pytest.raises(TrainingError, match=r"a model cannot be called '\.\./x'"):
        call("fit", "--csv", str(waves), "--targets", "b", "--name", "../x", "--run", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [[], ["digits", "--csv", "x.csv"]])
def test_one_data_set_is_asked_for(words: list[str]) -> None:
    """Neither none nor two."""
    with pytest.raises(TrainingError, match=r"name one data set \(.*or give one file: --csv"):
        call("fit", *words)


def test_a_split_that_is_none_is_refused(waves: Path) -> None:
    """As typed."""
    with pytest.raises(TrainingError, match="--split must be three percentages such as 70/15/15, not 'most'"):
        call("fit", "--csv", str(waves), "--targets", "b", "--split", "most")


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
    assert all(f"{metric['value']:.5g}" in told for metric in manifest["metrics"])
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
    shown = [float(number) for number in re.findall(r"\d\.\d+", call("evaluate", str(run)))]
    assert any(number == pytest.approx(told, abs=1e-5) for number in shown)


def test_data_lists_and_checks() -> None:
    """Without a name all sets are listed; with one its splits are counted."""
    listed = call("data")
    assert all(name in listed for name in ("chorales", "nottingham", "sensors", "adding", "digits"))
    assert "1200" in call("data", "digits")


def test_ship_trains_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the table becomes a model folder; the same command again replaces it and adds no version."""
    monkeypatch.setitem(ship.SHIPPED, "tiny", Preset("digits", "gru3", {"hidden": 6}, TrainConfig(max_epochs=1)))
    for _ in range(2):
        call("ship", "tiny", "--runs", str(tmp_path / "runs"), "--models", str(tmp_path / "models"))
    replay(tmp_path / "models" / "tiny" / "1")
    assert [path.name for path in (tmp_path / "models" / "tiny").iterdir()] == ["1"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_one_would_have_typed(
    name: str, tiny: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model and training reach the run, in a folder of its name; what a file says wins, and what is typed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data.LOADERS, PRESETS[name].data, lambda _: tiny)
    Path("mine.json").write_text('{"clip": 0.7, "hidden": 9}')
    call("fit", "--config", "mine.json", "--preset", name, "--hidden", "5", "--epochs", "1", "--transpose", "0")
    run, preset = Run.load(Path("runs", name)), PRESETS[name]
    assert run.train == replace(preset.train, max_epochs=1, transpose=0, clip=0.7)
    assert run.model == configure(tiny, preset.cell, **(preset.model | {"hidden": 5}))
    assert run.result is not None


def test_a_file_of_options_wins_over_a_preset_wherever_it_stands(tmp_path: Path) -> None:
    """Before it on the line, or behind."""
    (tmp_path / "mine.json").write_text('{"clip": 0.7}')
    read = [
        lambda context: options.preset(context, "jsb-best"),
        lambda context: options.from_file(context, tmp_path / "mine.json"),
    ]
    for order in (read, read[::-1]):
        context = typer.Context(typer.main.get_command(cli.app).commands["fit"])  # type: ignore[attr-defined]
        for each in order:
            each(context)
        assert context.default_map is not None
        assert (context.default_map["clip"], context.default_map["run"]) == (0.7, "runs/jsb-best")


def test_an_unknown_preset_is_refused() -> None:
    """The message lists the known ones."""
    with pytest.raises(TrainingError, match="unknown preset 'x': choose one of jsb-best, nottingham-best"):
        runner.invoke(cli.app, ["fit", "--preset", "x"], catch_exceptions=False)


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


def test_what_the_disk_refuses_is_one_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file where a folder should be, say."""
    (tmp_path / "taken").write_text("")
    monkeypatch.setattr("sys.argv", ["latch-train", "fit", "adding", "--run", str(tmp_path / "taken")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert (said.startswith("error: "), str(tmp_path / "taken") in said, said.count("\n")) == (True, True, 1)


def test_names_may_hold_commas_in_quotes_and_no_line_breaks() -> None:
    """As in the header that they are of."""
    assert options.names('a, "b, c" ,d') == ("a", "b, c", "d")
    assert options.names(None) == ()
    with pytest.raises(ConfigError, match="is no list of names"):
        options.names("v\nw")
