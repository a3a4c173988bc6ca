"""From a run to a folder that the service can load: step graph, manifest, golden vectors.

Its one rule: without parity no artifact, and an artifact appears whole or not at all. It must not know how a model
was trained.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from training import data
from training.artifact import (
    GOLDEN_SEED,
    GOLDEN_SEQUENCES,
    GOLDEN_STEPS,
    Values,
    free_version,
    newest,
    read_manifest,
    write_version,
)
from training.checkpoint import Run, load_tensors
from training.config import DataInfo
from training.errors import ExportError
from training.graph import TOLERANCE, build_graph, check_parity, output_names, synthetic_inputs, torch_steps
from training.model import RecurrentModel, count
from training.scores import score_all


def golden_vectors(model: RecurrentModel, lowering: str = "primitives") -> Values:
    """Synthetic sequences and what torch on a CPU makes of them, under the manifest's keys."""
    inputs = synthetic_inputs(model, GOLDEN_SEQUENCES, GOLDEN_STEPS, GOLDEN_SEED)
    steps, names = list(torch_steps(model, inputs)), output_names(model, lowering)
    golden: Values = {"input.x": inputs}
    golden |= {f"output.{name}": np.stack([step[name] for step in steps], axis=1) for name in names}
    return golden | {f"state.{name}": steps[-1][name] for name in model.state_names}


def _features(pairs: tuple[tuple[str, str], ...]) -> list[dict[str, str]]:
    return [{"name": name, "unit": unit} if unit else {"name": name} for name, unit in pairs]


def _settings(run: Run) -> dict[str, Any]:
    config, result = run.model, run.result or {}
    return (
        asdict(run.train)
        | {name: getattr(config, name) for name in (*config.DROPOUTS, "skip")}
        | {key: result[key] for key in ("epochs", "best_epoch", "unfinished") if key in result}
    )


def _data(info: DataInfo) -> dict[str, Any]:
    return {key: getattr(info, key) for key in ("name", "source", "sha256", "split", "licence")}


def _tensor(name: str, shape: list[int], dtype: str = "float32") -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": shape, "batch_axis": 0}


def check_successor(info: DataInfo, models: Path, name: str, ways: str = "give it a --name of its own") -> None:
    """ExportError where a model of `info` would be no new version of `name` in `models`, but another model: it answers
    another question, or takes or gives other features than the newest version. Whoever asks for the name gets the
    newest, and would not be told. `ways` say what to do.
    """
    before = newest(models / name)
    if before is None:
        return
    found = read_manifest(before)

    def features(tensor: dict[str, Any]) -> str:
        return ", ".join(feature["name"] for feature in tensor.get("features", ()))

    for what, then, now in (
        ("is for", found["description"].rpartition(": ")[0], info.description),
        ("takes", features(found["input"]), "" if info.vocabulary else ", ".join(name for name, _ in info.inputs)),
        ("gives", features(found["outputs"][0]), ", ".join(name for name, _ in info.outputs)),
    ):
        if then != now:
            raise ExportError(f"{before} {what} {then}, and this {what} {now}: that is no new version of it, so {ways}")


def exported(run: Run, models: Path, name: str) -> Path | None:
    """The version of `name` in `models` that says of itself what a finished run would; None where there is none."""
    mine = (run.model.cell, _data(run.data), _settings(run), (run.result or {}).get("metrics"))
    for version in sorted(models.glob(f"{name}/*")):
        if not version.name.isdecimal():
            continue
        try:
            found = read_manifest(version)
        except ExportError:  # of a version that is none
            continue
        if ((found["unit"] or {}).get("cell"), *(found[key] for key in ("data", "training", "metrics"))) == mine:
            return version
    return None


def make_manifest(
    run: Run,
    model: RecurrentModel,
    name: str,
    version: str,
    files: dict[str, str],
    lowering: str = "primitives",
) -> dict[str, Any]:
    """The contract's words for `run`; the same weights give the same bytes (no times in it)."""
    info, config, cell, result = run.data, run.model, model.layers[0], run.result or {}
    outputs = []
    for output in output_names(model, lowering):
        described = output in ("y", "std")
        entry = _tensor(output, [config.output_size if described else config.hidden])
        entry["role"] = {"y": "prediction", "std": "spread"}.get(output, "gate")
        outputs.append(entry | ({"features": _features(info.outputs)} if described else {}))
    states = []
    for index, state in enumerate(model.state_names):
        entry = _tensor(state, [config.hidden]) | {"input": state, "output": f"{state}_next"}
        initial = {"initial": model.initial[index].tolist()} if config.learned_initial_state else {}
        states.append(entry | initial)
    x = _tensor("x", [config.input_size]) | {"features": _features(info.inputs)}
    normalisation: dict[str, Any] = {"kind": "none"}
    if config.standardise:
        normalisation = {"kind": "standard", "mean": model.x_mean.tolist(), "std": model.x_std.tolist()}
    return {
        "manifest_version": 1,
        "name": name,
        "version": version,
        "description": f"{info.description}: {cell.unit.title}, {config.hidden} units",
        "task": info.task,
        "head": config.head,
        "input": x if config.vocabulary is None else _tensor("x", [], "int64"),
        "outputs": outputs,
        "state": states,
        "constants": [],
        "normalisation": normalisation,
        "feedback": None if info.feedback is None else {"output": "y", "rule": info.feedback},
        "unit": {
            "cell": config.cell,
            "lowering": lowering,
            "blend": cell.blend,
            "reset": cell.reset,
            "gate_activation": cell.gate_activation,
            "candidate_activation": cell.candidate_activation,
            "input_size": config.input_size,
            "hidden_size": config.hidden,
            "layers": config.layers,
            "learned_initial_state": config.learned_initial_state,
            "parameters": count(model.cells),
        },
        "parameters": count(model),
        "files": files,
        "golden": {"sequences": GOLDEN_SEQUENCES, "steps": GOLDEN_STEPS, "tolerance": TOLERANCE},
        "data": _data(info),
        "training": _settings(run),
        "metrics": result["metrics"],
        "libraries": run.libraries,
    }


def scored_now(run: Run, folder: Path, model: RecurrentModel, epoch: int) -> Run:
    """An unfinished run with a result all the same: what `model`, its best of `epoch`, scores at this moment."""
    metrics = [metric.as_dict() for metric in score_all(model, data.load_again(run.data))]
    epochs = load_tensors(folder / "last.safetensors")[1]["epoch"]
    return replace(run, result={"epochs": epochs, "best_epoch": epoch, "unfinished": True, "metrics": metrics})


def export(
    folder: Path,
    models: Path,
    name: str,
    version: str | None = None,
    *,
    force: bool = False,
    best_so_far: bool = False,
    lowering: str = "primitives",
) -> Path:
    """The run in `folder` as models/<name>/<version>, by default the next free one; returns that path.

    `lowering` is what the unit's step becomes: primitives, or the one operator that computes it (`lowering.py`).

    An existing version is replaced, whole, only by `force`; an unfinished run is exported only as `best_so_far`.
    Raises ExportError, and leaves `models` as it was, when any check fails.
    """
    version = free_version(models, name, version, force=force)
    run = Run.load(folder)
    if run.result is None and not best_so_far:
        raise ExportError(f"the run in {folder} has not finished: fit it to the end, or export it with --best-so-far")
    model, epoch = run.best_model(folder)
    if run.result is None:
        run = scored_now(run, folder, model, epoch)
    graph = build_graph(model, lowering).SerializeToString()
    check_parity(model, graph)
    return write_version(
        models / name / version,
        graph,
        golden_vectors(model, lowering),
        lambda files: make_manifest(run, model, name, version, files, lowering),
    )
