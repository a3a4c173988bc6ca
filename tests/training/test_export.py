"""Export: the contract for every unit, parity or nothing, no trace of the machine."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from training import artifact
from training import export as module
from training.cells import UNITS
from training.checkpoint import Run, save_tensors
from training.config import HEADS, ModelConfig, TrainConfig
from training.data.sequences import DataSet
from training.errors import ExportError
from training.export import build_graph, export
from training.model import RecurrentModel
from training.presets import PRESETS

SCHEMA = json.loads(Path("models/manifest.schema.json").read_text())
METRICS = [{"name": "nll", "split": "test", "value": 1.5, "unit": "nats/frame"}]


def finished(folder: Path, data: DataSet, cell: str = "gru", **settings: Any) -> RecurrentModel:
    """A run folder with random weights that says it was trained."""
    torch.manual_seed(11)
    model = RecurrentModel(ModelConfig(cell, 6, 6, settings.pop("head", "bernoulli"), hidden=5, **settings)).eval()
    for value in model.initial:
        torch.nn.init.normal_(value)
    result = {"epochs": 3, "best_epoch": 2, "seconds": 1.0, "metrics": METRICS}
    Run(data.info, model.config, TrainConfig(), {"torch": "2"}, result).save(folder)
    save_tensors(folder / "best.safetensors", dict(model.state_dict()), {"epoch": 2, "valid_loss": 1.0})
    return model


def replay(folder: Path) -> None:
    """An independent reading of the contract: golden.npz through ONNX Runtime, by the manifest's words alone."""
    manifest = json.loads((folder / "manifest.json").read_text())
    jsonschema.validate(manifest, SCHEMA)
    assert sorted(manifest["files"]) == sorted(path.name for path in folder.iterdir() if path.name != "manifest.json")
    for name, expected in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    golden = np.load(folder / "golden.npz", allow_pickle=False)
    sequences, steps = manifest["golden"]["sequences"], manifest["golden"]["steps"]
    state = {}
    for pair in manifest["state"]:
        initial = np.reshape(pair.get("initial", np.zeros(pair["shape"])), pair["shape"])
        state[pair["input"]] = np.repeat(initial[None], sequences, axis=0).astype(pair["dtype"])
    outputs = [output["name"] for output in manifest["outputs"]]
    inputs = golden[f"input.{manifest['input']['name']}"]
    assert inputs.shape == (sequences, steps, *manifest["input"]["shape"])
    assert inputs.dtype == manifest["input"]["dtype"]

    def close(found: Any, expected: Any, largest: Any) -> None:
        assert found.shape == expected.shape
        assert (np.abs(found - expected) <= manifest["golden"]["tolerance"] * np.maximum(1, largest)).all()

    for step in range(steps):
        found = session.run(
            [*outputs, *(pair["output"] for pair in manifest["state"])],
            {manifest["input"]["name"]: inputs[:, step], **state},
        )
        for output, value in zip(manifest["outputs"], found[: len(outputs)], strict=True):
            assert value.shape == (sequences, *output["shape"])
            expected = golden[f"output.{output['name']}"]
            close(value, expected[:, step], np.abs(expected).max(axis=tuple(range(expected.ndim - 1))))
        state = {pair["input"]: value for pair, value in zip(manifest["state"], found[len(outputs) :], strict=True)}
    for pair in manifest["state"]:
        expected = golden[f"state.{pair['name']}"]
        close(state[pair["input"]], expected, np.abs(expected).max(axis=tuple(range(expected.ndim - 1))))


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_step_is_lean_and_in_parity(name: str, tiny: DataSet, tmp_path: Path) -> None:
    """At toy size: what only training does leaves no node behind, and the skip is one product and one sum."""
    settings = {key: value for key, value in PRESETS[name].model.items() if key != "hidden"}
    finished(tmp_path / "run", tiny, PRESETS[name].cell, **settings)
    replay(export(tmp_path / "run", tmp_path / "models", "preset"))
    plain = finished(tmp_path / "plain", tiny, PRESETS[name].cell)
    nodes = [node.op_type for node in onnx.load(tmp_path / "models" / "preset" / "1" / "model.onnx").graph.node]
    extra = ["Gemm", "Add"] if settings.get("skip") else []
    assert sorted(nodes) == sorted([*(node.op_type for node in build_graph(plain).graph.node), *extra])
    training = json.loads((tmp_path / "models" / "preset" / "1" / "manifest.json").read_text())["training"]
    assert settings.items() <= training.items()


@pytest.mark.parametrize("cell", UNITS)
def test_every_unit_exports_to_the_contract(cell: str, tiny: DataSet, tmp_path: Path) -> None:
    """Schema, checksums and golden vectors hold; the gates are outputs unless they are constant."""
    model = finished(tmp_path / "run", tiny, cell)
    folder = export(tmp_path / "run", tmp_path / "models", "a-model", "3")
    assert folder == tmp_path / "models" / "a-model" / "3"
    replay(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [o["name"] for o in manifest["outputs"] if o["role"] == "gate"] == model.gate_names
    assert bool(model.gate_names) == (cell not in ("gru3", "mgu3", "rnn"))
    assert manifest["unit"]["parameters"] == sum(value.numel() for value in model.cells.parameters())
    assert manifest["parameters"] == sum(value.numel() for value in model.parameters())
    assert manifest["unit"]["blend"] == ("write" if UNITS[cell].blends else None)
    assert manifest["feedback"] == {"output": "y", "rule": "sample_bernoulli"}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_stacked_models_with_every_head_export(head: str, cell: str, tiny: DataSet, tmp_path: Path) -> None:
    """Two layers, reset after and blend keep where there are such, learned initial state, normalisation."""
    data = replace(tiny, info=replace(tiny.info, head=head))
    chosen = {"blend": "keep", "reset": "after"} if cell == "gru" else {}
    finished(
        tmp_path / "run", data, cell, head=head, layers=2, learned_initial_state=True, standardise=head == "gaussian",
        **chosen,
    )  # fmt: skip
    folder = export(tmp_path / "run", tmp_path / "models", "deep")
    replay(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    expected = ["h1", "h2"] if cell == "gru" else ["h1", "c1", "h2", "c2"]
    assert [pair["name"] for pair in manifest["state"]] == expected
    assert all(any(pair["initial"]) for pair in manifest["state"])
    roles = {output["name"]: output["role"] for output in manifest["outputs"] if output["role"] != "gate"}
    assert roles == {"y": "prediction"} | ({"std": "spread"} if head == "gaussian" else {})
    names = [{"name": f"note {note}"} for note in range(6)]
    described = {output["name"]: output["features"] for output in manifest["outputs"] if "features" in output}
    assert described == dict.fromkeys(["y", *(["std"] if head == "gaussian" else [])], names)


def test_ids_export_as_int64(tiny: DataSet, tmp_path: Path) -> None:
    """A next-token model takes ids of shape [B]."""
    finished(tmp_path / "run", tiny, head="categorical", vocabulary=6)
    replay(export(tmp_path / "run", tmp_path / "models", "tokens"))


def test_same_weights_give_the_same_bytes(tiny: DataSet, tmp_path: Path) -> None:
    """Exporting twice changes no byte: no time, no counter, no address."""
    finished(tmp_path / "run", tiny)
    first = export(tmp_path / "run", tmp_path / "models", "same")
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    second = export(tmp_path / "run", tmp_path / "models", "same", "1", force=True)
    assert {path.name: path.read_bytes() for path in second.iterdir()} == before


def test_nothing_of_the_machine_ships(tiny: DataSet, tmp_path: Path) -> None:
    """The exporter's source lines and stack traces are gone, and with them every path."""
    finished(tmp_path / "run", tiny)
    folder = export(tmp_path / "run", tmp_path / "models", "clean")
    graph = onnx.load(folder / "model.onnx")
    assert not graph.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in graph.graph.node)
    for path in folder.iterdir():
        content = path.read_bytes()
        assert str(Path.cwd()).encode() not in content
        assert b"site-packages" not in content
        assert str(tmp_path).encode() not in content
    assert folder.stat().st_mode & 0o777 == 0o755  # the service may run as somebody else


def break_weights(graph: onnx.ModelProto) -> None:
    """Move one weight by a hundredth."""
    tensor = next(tensor for tensor in graph.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT)
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[0] += 0.01
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def break_gate(graph: onnx.ModelProto) -> None:
    """Swap the two gate outputs."""
    split = [node for node in graph.graph.node if node.op_type == "Split"][-1]
    split.output[0], split.output[1] = split.output[1], split.output[0]


@pytest.mark.parametrize("damage", [break_weights, break_gate])
def test_without_parity_no_artifact_is_written(
    damage: Any, tiny: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that computes something else is refused, and the version that was there stays as it was."""
    finished(tmp_path / "run", tiny)
    models = tmp_path / "models"
    good = (export(tmp_path / "run", models, "kept") / "manifest.json").read_bytes()

    def broken(model: RecurrentModel, lowering: str) -> onnx.ModelProto:
        graph = build_graph(model, lowering)
        damage(graph)
        return graph

    monkeypatch.setattr(module, "build_graph", broken)
    for name in ("kept", "new"):
        with pytest.raises(ExportError, match=r"differ by .* nothing was written"):
            export(tmp_path / "run", models, name, "1", force=True)
    assert [str(path.relative_to(models)) for path in sorted(models.rglob("*"))] == [
        "kept", "kept/1", "kept/1/golden.npz", "kept/1/manifest.json", "kept/1/model.onnx",
    ]  # fmt: skip
    assert (models / "kept" / "1" / "manifest.json").read_bytes() == good


@pytest.mark.parametrize(
    ("name", "version", "words"),
    [
        ("Not A Name", None, "a model cannot be called 'Not A Name'"),
        ("../up", None, "'../up'"),
        ("a", "0/b", "version"),
    ],
)
def test_a_name_that_no_folder_may_have_is_refused_at_once(
    tiny: DataSet, tmp_path: Path, name: str, version: str | None, words: str
) -> None:
    """It leaves nothing behind, in the models' folder or beside it."""
    finished(tmp_path / "run", tiny)
    with pytest.raises(ExportError, match=words):
        export(tmp_path / "run", tmp_path / "models", name, version)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_manifest_against_the_contract_is_not_written(tiny: DataSet, tmp_path: Path) -> None:
    """What the schema refuses leaves nothing behind."""
    finished(tmp_path / "run", tiny)
    run = Run.load(tmp_path / "run")
    replace(run, data=replace(run.data, task="guess")).save(tmp_path / "run")
    with pytest.raises(ExportError, match=r"breaks the contract at \$\.task"):
        export(tmp_path / "run", tmp_path / "models", "kept")
    assert not list((tmp_path / "models").iterdir())


def test_an_unfinished_run_is_not_exported(tiny: DataSet, tmp_path: Path) -> None:
    """Without a result there is nothing to say in the manifest."""
    finished(tmp_path / "run", tiny)
    replace(Run.load(tmp_path / "run"), result=None).save(tmp_path / "run")
    with pytest.raises(ExportError, match=r"has not finished: .* --best-so-far"):
        export(tmp_path / "run", tmp_path / "models", "early")
    assert not (tmp_path / "models").exists()


def test_the_best_so_far_of_a_finished_run_is_the_finished_run(tiny: DataSet, tmp_path: Path) -> None:
    """Nothing is scored anew, and the manifest does not call it unfinished."""
    finished(tmp_path / "run", tiny)
    folder = export(tmp_path / "run", tmp_path / "models", "whole", best_so_far=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert "unfinished" not in manifest["training"]
    assert manifest["metrics"] == METRICS


def test_a_version_is_never_replaced_unasked(tiny: DataSet, tmp_path: Path) -> None:
    """By default the next number is taken, past gaps; an existing one is refused by name, and replaced by force."""
    models = tmp_path / "models"
    finished(tmp_path / "run", tiny)
    first = export(tmp_path / "run", models, "kept")
    assert first == models / "kept" / "1"
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    finished(tmp_path / "run", tiny, "mgu")
    with pytest.raises(ExportError, match=r"kept/1 exists: leave out --version .* --force"):
        export(tmp_path / "run", models, "kept", "1")
    assert export(tmp_path / "run", models, "kept", "9") == models / "kept" / "9"
    assert export(tmp_path / "run", models, "kept") == models / "kept" / "10"
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before
    export(tmp_path / "run", models, "kept", "1", force=True)
    assert json.loads((first / "manifest.json").read_text())["unit"]["cell"] == "mgu"


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"description": "chords"}, "is for scales, and this is for chords"),
        ({"inputs": (("note 0", ""),)}, "takes note 0, note 1, .*, and this takes note 0:"),
        ({"outputs": (("note 0", ""),)}, "gives note 0, note 1, .*, and this gives note 0:"),
    ],
)
def test_a_new_version_answers_takes_and_gives_the_same(
    other: dict[str, Any], words: str, tiny: DataSet, tmp_path: Path
) -> None:
    """Else whoever asks for the newest gets other numbers, and is not told; a free name is anyone's."""
    finished(tmp_path / "run", tiny)
    export(tmp_path / "run", tmp_path / "models", "tiny")
    module.check_successor(tiny.info, tmp_path / "models", "tiny")
    changed = replace(tiny.info, **other)
    with pytest.raises(ExportError, match=rf"tiny/1 {words}"):
        module.check_successor(changed, tmp_path / "models", "tiny")
    module.check_successor(changed, tmp_path / "models", "free")


def test_the_manifest_tells_the_scale_of_the_inputs(tiny: DataSet, tmp_path: Path) -> None:
    """Each input's own mean and deviation, by which the graph divides."""
    model = finished(tmp_path / "run", tiny, head="gaussian", standardise=True)
    model.x_mean[:], model.x_std[:], model.y_mean[:] = torch.arange(6.0), torch.arange(6.0) + 2, 9
    save_tensors(tmp_path / "run" / "best.safetensors", dict(model.state_dict()), {"epoch": 2, "valid_loss": 1.0})
    folder = export(tmp_path / "run", tmp_path / "models", "scaled")
    replay(folder)
    assert json.loads((folder / "manifest.json").read_text())["normalisation"] == {
        "kind": "standard", "mean": [0, 1, 2, 3, 4, 5], "std": [2, 3, 4, 5, 6, 7],
    }  # fmt: skip


def test_the_best_so_far_says_how_far_it_was(tiny: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The epochs that were run, and which of them was the best."""
    finished(tmp_path / "run", tiny)
    replace(Run.load(tmp_path / "run"), result=None).save(tmp_path / "run")
    save_tensors(tmp_path / "run" / "last.safetensors", {"x": torch.zeros(1)}, {"epoch": 7})
    monkeypatch.setattr(module.data, "load_again", lambda _: tiny)
    folder = export(tmp_path / "run", tmp_path / "models", "early", best_so_far=True)
    training = json.loads((folder / "manifest.json").read_text())["training"]
    assert (training["epochs"], training["best_epoch"], training["unfinished"]) == (7, 2, True)


def test_a_model_is_of_the_run_whose_scores_it_has(tiny: DataSet, tmp_path: Path) -> None:
    """Another run with the same settings, of other data or another size, is not exported yet."""
    finished(tmp_path / "run", tiny)
    folder = export(tmp_path / "run", tmp_path / "models", "kept")
    run = Run.load(tmp_path / "run")
    assert module.exported(run, tmp_path / "models", "kept") == folder
    other = replace(run, result={**(run.result or {}), "metrics": [METRICS[0] | {"value": 1.25}]})
    assert module.exported(other, tmp_path / "models", "kept") is None


def test_a_model_that_says_something_else_of_its_data_is_another(tiny: DataSet, tmp_path: Path) -> None:
    """A run made again to have another licence, say, is written, although its scores are the same."""
    finished(tmp_path / "run", tiny)
    export(tmp_path / "run", tmp_path / "models", "kept")
    run = Run.load(tmp_path / "run")
    for other in ({"licence": "CC0"}, {"source": "elsewhere"}, {"sha256": "0"}):
        assert module.exported(replace(run, data=replace(run.data, **other)), tmp_path / "models", "kept") is None


def test_the_tenth_version_is_newer_than_the_ninth(tmp_path: Path) -> None:
    """Versions are numbers; what else lies beside them is none."""
    for name in ("9", "10", "9.old"):
        (tmp_path / name).mkdir()
    assert artifact.newest(tmp_path) == tmp_path / "10"
    assert artifact.newest(tmp_path / "10") is None
