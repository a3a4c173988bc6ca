"""From a finished run to a folder that the service can load: step graph, manifest, golden vectors.

Its one rule: without parity no artifact, and an artifact appears whole or not at all. It must not know how a model
was trained.
"""

import hashlib
import importlib.resources
import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from training.checkpoint import Run
from training.errors import ExportError
from training.graph import TOLERANCE, Values, build_graph, check_parity, output_names, synthetic_inputs, torch_steps
from training.model import RecurrentModel

GOLDEN_SEQUENCES, GOLDEN_STEPS, GOLDEN_SEED = 3, 24, 20141212


def golden_vectors(model: RecurrentModel) -> Values:
    """Synthetic sequences and what torch on a CPU makes of them, under the manifest's keys."""
    inputs = synthetic_inputs(model, GOLDEN_SEQUENCES, GOLDEN_STEPS, GOLDEN_SEED)
    steps = list(torch_steps(model, inputs))
    golden: Values = {"input.x": inputs}
    golden |= {f"output.{name}": np.stack([step[name] for step in steps], axis=1) for name in output_names(model)}
    return golden | {f"state.{name}": steps[-1][name] for name in model.state_names}


def _features(pairs: tuple[tuple[str, str], ...]) -> list[dict[str, str]]:
    return [{"name": name, "unit": unit} if unit else {"name": name} for name, unit in pairs]


def _tensor(name: str, shape: list[int], dtype: str = "float32") -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": shape, "batch_axis": 0}


def make_manifest(run: Run, model: RecurrentModel, name: str, version: str, files: dict[str, str]) -> dict[str, Any]:
    """The contract's words for `run`; the same weights give the same bytes (no times in it)."""
    data, config, cell = run.data, run.model, model.layers[0]
    if run.result is None:
        raise ExportError("the run has not finished: fit it to the end first")
    outputs = []
    for output in output_names(model):
        described = output in ("y", "std")
        entry = _tensor(output, [config.output_size if described else config.hidden])
        entry["role"] = {"y": "prediction", "std": "spread"}.get(output, "gate")
        outputs.append(entry | ({"features": _features(data.outputs)} if described else {}))
    states = []
    for index, state in enumerate(model.state_names):
        entry = _tensor(state, [config.hidden]) | {"input": state, "output": f"{state}_next"}
        initial = {"initial": model.initial[index].tolist()} if config.learned_initial_state else {}
        states.append(entry | initial)
    x = _tensor("x", [config.input_size]) | {"features": _features(data.inputs)}
    normalisation: dict[str, Any] = {"kind": "none"}
    if config.standardise:
        normalisation = {"kind": "standard", "mean": model.x_mean.tolist(), "std": model.x_std.tolist()}
    manifest = {
        "manifest_version": 1,
        "name": name,
        "version": version,
        "description": f"{data.description}: {cell.unit.title}, {config.hidden} units",
        "task": data.task,
        "head": config.head,
        "input": x if config.vocabulary is None else _tensor("x", [], "int64"),
        "outputs": outputs,
        "state": states,
        "constants": [],
        "normalisation": normalisation,
        "feedback": None if data.feedback is None else {"output": "y", "rule": data.feedback},
        "unit": {
            "cell": config.cell,
            "blend": cell.blend,
            "reset": cell.reset,
            "gate_activation": cell.gate_activation,
            "candidate_activation": cell.candidate_activation,
            "input_size": config.input_size,
            "hidden_size": config.hidden,
            "layers": config.layers,
            "learned_initial_state": config.learned_initial_state,
            "parameters": sum(value.numel() for value in model.cells.parameters()),
        },
        "parameters": sum(value.numel() for value in model.parameters()),
        "files": files,
        "golden": {"sequences": GOLDEN_SEQUENCES, "steps": GOLDEN_STEPS, "tolerance": TOLERANCE},
        "data": {key: getattr(data, key) for key in ("name", "source", "sha256", "split", "licence")},
        "training": asdict(run.train)
        | {"dropout": config.dropout, "epochs": run.result["epochs"], "best_epoch": run.result["best_epoch"]},
        "metrics": run.result["metrics"],
        "libraries": run.libraries,
    }
    try:
        jsonschema.validate(
            manifest, json.loads((importlib.resources.files("models") / "manifest.schema.json").read_text())
        )
    except jsonschema.ValidationError as error:
        raise ExportError(f"the manifest breaks the contract at {error.json_path}: {error.message}") from error
    return manifest


def export(folder: Path, models: Path, name: str, version: str = "1") -> Path:
    """The finished run in `folder` as models/<name>/<version>, replaced whole; returns that path.

    Raises ExportError, and leaves `models` as it was, when any check fails.
    """
    run = Run.load(folder)
    model = run.best_model(folder)
    graph = build_graph(model).SerializeToString()
    check_parity(model, graph)
    models.mkdir(parents=True, exist_ok=True)
    partial, target = Path(tempfile.mkdtemp(prefix=".partial-", dir=models)), models / name / version
    try:
        (partial / "model.onnx").write_bytes(graph)
        np.savez(partial / "golden.npz", allow_pickle=False, **golden_vectors(model))
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(partial.iterdir())}
        manifest = make_manifest(run, model, name, version, files)
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        (partial / "manifest.json").write_text(text, encoding="utf-8")
        partial.chmod(0o755)  # mkdtemp's folder is private; a served one is not
        target.parent.mkdir(exist_ok=True)
        if target.exists():
            with tempfile.TemporaryDirectory(prefix=".replaced-", dir=models) as old:
                target.rename(Path(old) / version)
                partial.replace(target)
        else:
            partial.replace(target)
        return target
    finally:
        shutil.rmtree(partial, ignore_errors=True)
