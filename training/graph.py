"""The step of a model as an ONNX graph, and the proof that ONNX Runtime and torch compute the same with it.

Its one rule: a graph that is not in parity is an error, never a warning. It must not know runs, manifests or folders.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from training.artifact import Values, error
from training.errors import ExportError
from training.lowering import TRANSLATIONS, OperatorGraph
from training.model import RecurrentModel

TOLERANCE = 1e-5
PARITY_STEPS, PARITY_SEED = 200, 20141213
NEGLIGIBLE = 1e-30  # far below what float32 adds to anything, far above where its numbers become subnormal (1.2e-38)


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


LOWERINGS: dict[str, Callable[[RecurrentModel], nn.Module]] = {"primitives": StepGraph, "operator": OperatorGraph}


def output_names(model: RecurrentModel, lowering: str = "primitives") -> list[str]:
    """Outputs and gates in the graph's order, without the states. Constant gates (`gru3`, `mgu3`) are not outputs.

    ONNX Runtime computes every output at every step, asked for or not, and a constant says nothing about a step.
    """
    gates = model.gate_names if lowering == "primitives" else []
    return ["y", *(["std"] if model.config.head == "gaussian" else []), *gates]


def build_graph(model: RecurrentModel, lowering: str = "primitives") -> onnx.ModelProto:
    """The step as ONNX: inputs `x` and each state, outputs, then `<state>_next`; the batch axis is free.

    Raises ExportError for an unknown lowering, or one that the model does not have.
    """
    if lowering not in LOWERINGS:
        raise ExportError(f"unknown lowering {lowering!r}: choose one of {', '.join(LOWERINGS)}")
    step = LOWERINGS[lowering](model)
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
            step.eval(),
            (x, *(value.contiguous() for value in model.init_state(2))),
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=["x", *states],
            output_names=[*output_names(model, lowering), *(f"{name}_next" for name in states)],
            dynamic_shapes=({0: batch}, tuple({0: batch} for _ in states)),
            custom_translation_table=TRANSLATIONS,
        )
    if program is None:
        raise ExportError("torch.onnx.export returned nothing")
    graph = program.model_proto
    strip(graph)
    flush(graph)
    onnx.checker.check_model(graph, full_check=True)
    return graph


def strip(model: onnx.ModelProto) -> None:
    """Drop what the exporter says about itself: source lines and stack traces hold paths of the machine."""
    graph = model.graph
    things = (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer)
    for thing in (model, graph, *things):
        thing.ClearField("doc_string")
        thing.ClearField("metadata_props")


def flush(model: onnx.ModelProto) -> None:
    """Make weights 0 that come to nothing in any sum. An L2 penalty takes those there whose input never came, and for a
    product that is subnormal many a CPU needs a hundred times as long: all notes at once took ten times a chord.
    """
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            values = np.where(np.abs(values) < NEGLIGIBLE, np.float32(0), values)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


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
    """Outputs and states of every step by torch, from the initial state; inputs [B, T, ...]."""
    state, fused = model.init_state(len(inputs)), model.fuse()
    names = [*output_names(model), *model.state_names]
    for x in torch.from_numpy(inputs).unbind(1):
        raw, gates, state = model.step(x, state, fused)
        yield {name: value.numpy() for name, value in zip(names, (*model.predict(raw), *gates, *state), strict=True)}


def onnx_steps(model: RecurrentModel, graph: bytes, inputs: NDArray[Any]) -> Iterator[Values]:
    """The same by ONNX Runtime on one CPU thread; of the outputs, those that the graph has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    states = model.state_names
    fetch = [output.name for output in session.get_outputs()]
    outputs = fetch[: -len(states)]
    state = {
        name: value.detach().contiguous().numpy()
        for name, value in zip(states, model.init_state(len(inputs)), strict=True)
    }
    for step in range(inputs.shape[1]):
        found = session.run(fetch, {"x": np.ascontiguousarray(inputs[:, step]), **state})
        values = dict(zip([*outputs, *states], found, strict=True))
        state = {name: values[name] for name in states}
        yield values


def check_parity(model: RecurrentModel, graph: bytes) -> float:
    """The largest `error` of all outputs and states, of values in the data's units in deviations of theirs; ExportError
    when over TOLERANCE.
    """
    inputs = synthetic_inputs(model, 2, PARITY_STEPS, PARITY_SEED)
    steps = zip(torch_steps(model, inputs), onnx_steps(model, graph, inputs), strict=True)
    pairs = [{name: (found[name], expected[name]) for name in found} for expected, found in steps]
    units = dict.fromkeys(("y", "std"), model.y_std.numpy()) if model.config.head in ("gaussian", "regression") else {}
    worst = 0.0
    for name in pairs[0]:
        found, expected = (np.stack([step[name][side] for step in pairs]) for side in (0, 1))
        differs = error(found, expected, units.get(name, 1.0))
        if not differs <= TOLERANCE:
            raise ExportError(
                f"ONNX Runtime and torch differ by {differs:.2e} in {name!r} (limit {TOLERANCE}): nothing was written; "
                "the graph or the versions of torch and onnxscript are at fault"
            )
        worst = max(worst, differs)
    return worst
