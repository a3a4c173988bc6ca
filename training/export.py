"""From a trained run to a folder the service can load: step graph, manifest, golden vectors.

Its one rule: without parity no artifact. Everything is written beside the target and moved there whole, after ONNX
Runtime agreed with torch on every output and state over 200 steps. It must not know how a model was trained.
"""

import hashlib
import importlib.resources
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.checkpoint import Run
from training.errors import ExportError
from training.model import RecurrentModel

TOLERANCE = 1e-5
PARITY_STEPS, GOLDEN_SEQUENCES, GOLDEN_STEPS = 200, 3, 24
GOLDEN_SEED = 20141212
Values = dict[str, NDArray[Any]]


class StepGraph(nn.Module):
    """The model's `step` with the fused weights as constants: (x, *state) -> (outputs, gates, next state)."""

    def __init__(self, model: RecurrentModel) -> None:
        super().__init__()
        self.model = model
        with torch.no_grad():
            # Contiguous, or the exporter would write the stored transpose and transpose it back at every step.
            self.fused = [
                {name: value.detach().contiguous() for name, value in layer.items()} for layer in model.fuse()
            ]

    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Flat, because a graph has no structure."""
        raw, gates, after = self.model.step(x, state, self.fused)
        return (*self.model.predict(raw), *gates, *after)


def output_names(model: RecurrentModel) -> list[str]:
    """Outputs and gates in the graph's order, without the states. Constant gates (`gru3`, `mgu3`) are not outputs.

    ONNX Runtime computes every output at every step, asked for or not, and a constant says nothing about a step.
    """
    return ["y", *(["std"] if model.config.head == "gaussian" else []), *model.gate_names]


def build_graph(model: RecurrentModel) -> onnx.ModelProto:
    """The step as ONNX: inputs `x` and each state, outputs, then `<state>_next`; the batch axis is free."""
    states = model.state_names
    batch = torch.export.Dim("batch")
    shape = () if model.embedding is not None else (model.config.input_size,)
    x = torch.zeros(2, *shape, dtype=torch.int64 if model.embedding is not None else torch.float32)
    # The exporter logs, as a warning, that it skips operators of a package that nobody here uses (torchvision).
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        # The first is about torch's own class, the second says that all our batch axes are one, as they should be.
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
        warnings.filterwarnings("ignore", message=".*axis name: batch will not be used")
        program = torch.onnx.export(
            StepGraph(model).eval(),
            (x, *(value.contiguous() for value in model.init_state(2))),
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=["x", *states],
            output_names=[*output_names(model), *(f"{name}_next" for name in states)],
            dynamic_shapes=({0: batch}, tuple({0: batch} for _ in states)),
        )
    if program is None:
        raise ExportError("torch.onnx.export returned nothing")
    graph = program.model_proto
    strip(graph)
    onnx.checker.check_model(graph, full_check=True)
    return graph


def strip(model: onnx.ModelProto) -> None:
    """Drop what the exporter says about itself: source lines and stack traces hold paths of the machine."""
    graph = model.graph
    things = (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer)
    for thing in (model, graph, *things):
        thing.ClearField("doc_string")
        thing.ClearField("metadata_props")


def synthetic_inputs(model: RecurrentModel, sequences: int, steps: int, seed: int) -> NDArray[Any]:
    """Made-up inputs [sequences, steps, ...] in the range of the data: chords of four notes, ids, or values."""
    rng, config = np.random.default_rng(seed), model.config
    if config.vocabulary is not None:
        return rng.integers(config.vocabulary, size=(sequences, steps))
    size = (sequences, steps, config.input_size)
    if config.head == "bernoulli":
        return (rng.random(size) < 4 / config.input_size).astype(np.float32)
    return (model.x_mean.numpy() + model.x_std.numpy() * rng.normal(size=size)).astype(np.float32)


@torch.no_grad()
def torch_steps(model: RecurrentModel, inputs: NDArray[Any]) -> Iterator[Values]:
    """Outputs and states of every step by torch, unfused, from the initial state; inputs [B, T, ...]."""
    state, fused = model.init_state(len(inputs)), model.fuse()
    names = [*output_names(model), *model.state_names]
    for x in torch.from_numpy(inputs).unbind(1):
        raw, gates, state = model.step(x, state, fused)
        yield {name: value.numpy() for name, value in zip(names, (*model.predict(raw), *gates, *state), strict=True)}


def onnx_steps(model: RecurrentModel, graph: bytes, inputs: NDArray[Any]) -> Iterator[Values]:
    """The same by ONNX Runtime on one CPU thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    outputs, states = output_names(model), model.state_names
    state = {
        name: value.detach().contiguous().numpy()
        for name, value in zip(states, model.init_state(len(inputs)), strict=True)
    }
    fetch = [*outputs, *(f"{name}_next" for name in states)]
    for step in range(inputs.shape[1]):
        found = session.run(fetch, {"x": np.ascontiguousarray(inputs[:, step]), **state})
        values = dict(zip([*outputs, *states], found, strict=True))
        state = {name: values[name] for name in states}
        yield values


def check_parity(model: RecurrentModel, graph: bytes) -> float:
    """The largest |difference| / max(1, |expected|) over all outputs and states; ExportError when over TOLERANCE."""
    inputs = synthetic_inputs(model, 2, PARITY_STEPS, GOLDEN_SEED + 1)
    worst = 0.0
    pairs = zip(torch_steps(model, inputs), onnx_steps(model, graph, inputs), strict=True)
    for step, (expected, found) in enumerate(pairs, start=1):
        for name, value in expected.items():
            error = float((np.abs(found[name] - value) / np.maximum(1, np.abs(value))).max())
            if not error <= TOLERANCE:
                raise ExportError(
                    f"ONNX Runtime and torch differ by {error:.2e} in {name!r} at step {step} (limit {TOLERANCE}): "
                    f"nothing was written; the graph or the versions of torch and onnxscript are at fault"
                )
            worst = max(worst, error)
    return worst


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
