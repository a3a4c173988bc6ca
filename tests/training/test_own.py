"""The user's own file: loaded again for its run, refused when it has changed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from training import data, options
from training.checkpoint import Run
from training.config import TrainConfig
from training.data import own
from training.errors import DataError
from training.model import RecurrentModel
from training.trainer import configure, set_normalisation


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    """Two slow waves."""
    path = tmp_path / "waves.csv"
    rows = [f"{np.sin(row / 9):.4f},{np.cos(row / 7):.4f}" for row in range(300)]
    path.write_text("\n".join(["a,b", *rows]) + "\n")
    return path


def test_a_run_finds_its_file_again(csv: Path, tmp_path: Path) -> None:
    """With the options that it was loaded with, through run.json, and equal to what went in."""
    found = own.load("csv", csv, targets=("a",), horizon=3, window=32)
    run = Run(found.info, configure(found, "gru"), TrainConfig(), {})
    run.save(tmp_path / "run")
    back = Run.load(tmp_path / "run")
    assert back == run
    back.same_as(run)
    again = data.load_again(back.data)
    assert again.info == found.info
    for split, items in found.splits.items():
        for mine, theirs in zip(items.items, again.splits[split].items, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_a_changed_file_is_refused(csv: Path) -> None:
    """The message names the file and both checksums."""
    info = own.load("csv", csv, targets=("a",)).info
    csv.write_text(csv.read_text() + "1,2\n")
    with pytest.raises(DataError, match=rf"waves\.csv has changed since the run .* then {info.sha256}"):
        data.load_again(info)


def test_a_named_set_is_loaded_by_its_name() -> None:
    """As it always was."""
    assert data.load_again(data.load("digits").info).info.name == "digits"


def test_a_forecast_of_own_columns_starts_from_their_last_values(csv: Path) -> None:
    """Its head gives changes; a target that is no input has no last value to start from."""
    assert configure(own.load("csv", csv, targets=("b", "a")), "gru").residual == (1, 0)
    assert configure(own.load("csv", csv, targets=("b",), inputs=("a",)), "gru").residual == ()


def test_the_first_guess_is_the_usual_change(tmp_path: Path) -> None:
    """A counter's change is many deviations away from none: training would begin far off, and may never arrive."""
    rises = np.random.default_rng(0).normal([10, -3], [1, 0.5], (300, 2)).cumsum(axis=0)
    path = tmp_path / "meter.csv"
    path.write_text("a,b\n" + "\n".join(f"{a:.3f},{b:.3f}" for a, b in rises))
    data = own.load("csv", path, targets=("b", "a"), horizon=5)
    model = RecurrentModel(configure(data, "gru", hidden=4))
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    set_normalisation(model, data)
    inputs = torch.from_numpy(data.splits["train"].items[0][0])[None]
    mean = model.predict(model(inputs)[0])[0][0]
    torch.testing.assert_close(
        mean - inputs[0][:, [1, 0]], torch.tensor([-15.0, 50.0]).expand(len(mean), 2), atol=1.0, rtol=0
    )


def test_changes_and_values_are_measured_in_one_scale(csv: Path) -> None:
    """A target among more inputs has its own scale there, too; the usual change is in units of it, and a head of zeros
    says "as now".
    """
    found = own.load("csv", csv, targets=("a",), horizon=3)
    model = RecurrentModel(configure(found, "gru", hidden=3)).eval()
    assert model.config.residual == (0,)
    set_normalisation(model, found)
    before = np.concatenate([inputs[asked, :1] for inputs, _, asked in found.uncut]).astype(np.float64)
    after = np.concatenate([targets[asked] for _, targets, asked in found.uncut]).astype(np.float64)
    scale = after.std(ddof=1)
    assert (model.x_mean[0].item(), model.x_std[0].item()) == (model.y_mean.item(), model.y_std.item())
    assert (model.y_mean.item(), model.y_std.item()) == pytest.approx((after.mean(), scale), rel=1e-4)
    assert model.change.item() == pytest.approx((after - before).std(ddof=1) / scale, rel=1e-4)
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    x = torch.from_numpy(found.splits["test"].items[0][0])[None]
    with torch.no_grad():
        torch.testing.assert_close(model.predict(model(x)[0])[0], x[..., :1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "usual"),
    [
        ("csv", {"weight_decay": 3e-3, "batch_size": 8, "hidden": 46, "patience": 15}),
        ("text", {"weight_decay": 0.0, "batch_size": 32, "hidden": 128, "patience": 3}),
        ("npz", {"weight_decay": 3e-4, "batch_size": 8, "hidden": 46, "patience": 15}),
        ("wav", {"weight_decay": 3e-4, "batch_size": 32, "hidden": 46, "patience": 8}),
    ],
)
def test_what_is_not_said_is_as_the_kind_of_file_has_it(kind: str, usual: dict[str, float], csv: Path) -> None:
    """And what is said wins."""
    info = replace(own.load("csv", csv, targets=("a",)).info, own={"kind": kind})
    model, train = options.settings_for(info, {"weight_decay": None, "rate": 0.01})
    assert {**vars(train), **model}.items() >= (usual | {"rate": 0.01}).items()
    assert options.settings_for(info, {"weight_decay": 0.5})[1].weight_decay == 0.5


def test_what_is_nothing_is_an_answer_too(csv: Path) -> None:
    """No season, no filled gap, no times, no penalty: said, it is not what is usual."""
    asked = {"targets": "a", "season": 0, "max_gap": 0, "time": "", "horizon": None}
    info = options.data_set(dict.fromkeys(own.KINDS) | {"name": None, "csv": csv} | asked).info
    assert {key: info.own[key] for key in asked} == asked | {"targets": ["a"], "horizon": 1}
    assert options.settings_for(info, {"weight_decay": 0.0})[1].weight_decay == 0


def test_a_run_finds_its_file_from_any_folder(csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it was named where the run was made."""
    monkeypatch.chdir(csv.parent)
    monkeypatch.setenv("HOME", str(csv.parent))
    for path in ("waves.csv", "~/waves.csv"):
        assert own.load("csv", Path(path), targets=("a",)).info.own["path"] == str(csv)
