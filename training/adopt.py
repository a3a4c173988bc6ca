"""The contract around somebody else's step graph: which tensor is what, golden vectors, and why a graph cannot be one.

Its one rule: what the manifest says of a tensor was seen by running the graph, never only declared by it. It must not
know torch, or how the graph was made.
"""

import importlib.metadata
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TensorProto
from onnx.external_data_helper import load_external_data_for_model, uses_external_data
from onnx.inliner import inline_local_functions
from onnx.numpy_helper import to_array

from training.artifact import (
    GOLDEN_SEED,
    GOLDEN_SEQUENCES,
    GOLDEN_STEPS,
    Values,
    error,
    free_version,
    newest,
    read_manifest,
    write_version,
)
from training.errors import ExportError

Array = NDArray[Any]

# Somebody else's graph may hold operators that round a row by its place in the batch, and large numbers.
TOLERANCE = 1e-4
BATCHES = (2, 3, 5)
FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64"}
CONSTANTS = DTYPES | {"tensor(double)": "float64", "tensor(int32)": "int32", "tensor(bool)": "bool"}
STATE = re.compile(r"(?P<input>[^=@]+)=(?P<output>[^=@]+)(@(?P<axis>\d))?")
TENSOR = re.compile(r"(?P<name>[^=@]+)(@(?P<axis>\d))?")
NAMED = re.compile(r"(?P<name>[^=@]+)=(?P<value>.+)")
RECURRENT = ("GRU", "LSTM", "RNN")
RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")
MEANT = {"--state": "in=out or in=out@axis", "--input": "name or name@axis", "--constant": "name=value",
         "--shape": "name=size or name=sizexsize"}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Which tensor of the graph is what, as typed.

    `states` are in=out[@axis], the axis of the batch (0 when left out); `constants` are name=value in JSON; `shapes`
    are name=AxB, sizes without the batch, for a tensor whose graph leaves them open; `sequence` is name[@axis] of the
    input that a client sends, needed only where several are left. Ids of an int64 input are below `ids`; `sample`
    [sequences, steps, ...] are inputs for the golden vectors in place of random ones.
    """

    states: Sequence[str]
    constants: Sequence[str] = ()
    shapes: Sequence[str] = ()
    sequence: str | None = None
    ids: int | None = None
    sample: Path | None = None


@dataclass(frozen=True)
class Tensor:
    """A tensor of the graph with a batch: `shape` is without it, `axis` is where it is."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    axis: int

    def words(self, **more: Any) -> dict[str, Any]:
        """As a manifest describes it."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape), "batch_axis": self.axis} | more


class StepRunner:
    """The graph with its tensors sorted: runs a step of any number of sessions.

    Raises ExportError, naming the tensor, when a tensor is not there, has no free batch axis, or has a type or shape
    that a manifest cannot say.
    """

    def __init__(self, graph: bytes, plan: Plan) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the errors of the binding share no base class
            raise ExportError(f"ONNX Runtime {onnxruntime.__version__} cannot load the graph: {error}") from error
        self.inputs = {node.name: node for node in self.session.get_inputs()}
        self.results = {node.name: node for node in self.session.get_outputs()}
        self.shapes = dict(self._sizes(text) for text in plan.shapes)
        pairs = [_match(STATE, text, "--state") for text in plan.states]
        if not pairs:
            raise ExportError(
                f"no --state given: say which input takes which output of the step before, as in=out; the graph takes "
                f"{_list(self.inputs)} and returns {_list(self.results)}"
            )
        self.constants = dict(self._constant(text) for text in plan.constants)
        taken = [pair["input"] for pair in pairs] + list(self.constants)
        for name in (*taken, *(pair["output"] for pair in pairs)):
            if taken.count(name) > 1 or [pair["output"] for pair in pairs].count(name) > 1:
                raise ExportError(f"{name!r} is given twice: a tensor is one state, or one constant")
        rest = [name for name in self.inputs if name not in taken]
        if plan.sequence is None and len(rest) != 1:
            raise ExportError(
                f"{_list(rest) or 'no input'} would be what a client sends, and one input must be: "
                f"give the others as --state or --constant"
            )
        x = _match(TENSOR, plan.sequence or rest[0], "--input")
        if others := set(rest) - {x["name"]}:
            raise ExportError(f"{_list(others)} is neither state, constant nor the input {x['name']!r}: say what it is")
        self.x = self._tensor(x["name"], x["axis"])
        self.states = [
            (self._tensor(pair["input"], pair["axis"]), self._node(pair["output"], self.results).name) for pair in pairs
        ]
        self.outputs = self._seen()

    def step(self, x: Array, state: Sequence[Array]) -> dict[str, Array]:
        """One step: x [B, ...] and states [B, ...] each -> every result of the graph by name, as the graph gives it."""
        feed = {self.x.name: np.moveaxis(x, 0, self.x.axis), **self.constants}
        for (tensor, _), value in zip(self.states, state, strict=True):
            feed[tensor.name] = np.moveaxis(value, 0, tensor.axis)
        try:
            found = self.session.run(list(self.results), {key: np.ascontiguousarray(v) for key, v in feed.items()})
        except Exception as error:  # as above
            raise ExportError(f"the graph refuses a step of {len(x)} sessions: {error}") from error
        return dict(zip(self.results, found, strict=True))

    def replay(self, inputs: Array) -> Values:
        """Inputs [B, T, ...] -> output.<name> [B, T, ...] and state.<name> [B, ...] after the last step."""
        state = self.initial(len(inputs))
        columns: dict[str, list[Array]] = {tensor.name: [] for tensor in self.outputs}
        for x in np.moveaxis(inputs, 1, 0):
            found = self.step(x, state)
            for tensor in self.outputs:
                columns[tensor.name].append(np.moveaxis(found[tensor.name], tensor.axis, 0))
            state = [np.moveaxis(found[result], tensor.axis, 0) for tensor, result in self.states]
        for name, column in columns.items():
            if len({value.shape for value in column}) > 1:
                raise ExportError(f"output {name!r} has another size at each step: a model's is always the same")
        values = {f"output.{name}": np.stack(column, axis=1) for name, column in columns.items()}
        return values | {f"state.{t.name}": value for (t, _), value in zip(self.states, state, strict=True)}

    def initial(self, sessions: int) -> list[Array]:
        """States of zeros."""
        return [np.zeros((sessions, *tensor.shape), tensor.dtype) for tensor, _ in self.states]

    def words(self) -> dict[str, Any]:
        """Its tensors as a manifest describes them."""
        return {
            "input": self.x.words(),
            "outputs": [
                tensor.words(role="other" if index else "prediction") for index, tensor in enumerate(self.outputs)
            ],
            "state": [tensor.words(input=tensor.name, output=result) for tensor, result in self.states],
        }

    def _node(self, name: str, nodes: Mapping[str, Any]) -> Any:
        if name not in nodes:
            verb = "take" if nodes is self.inputs else "return"
            raise ExportError(f"the graph does not {verb} {name!r}: it {verb}s {_list(nodes)}")
        return nodes[name]

    def _sizes(self, text: str) -> tuple[str, tuple[int, ...]]:
        found = _match(NAMED, text, "--shape")
        self._node(found["name"], self.inputs)
        try:
            return found["name"], tuple(int(size) for size in found["value"].split("x"))
        except ValueError:
            raise ExportError(f"--shape {text!r} is not {MEANT['--shape']}") from None

    def _constant(self, text: str) -> tuple[str, Array]:
        found = _match(NAMED, text, "--constant")
        node = self._node(found["name"], self.inputs)
        if node.type not in CONSTANTS:
            raise ExportError(f"constant {node.name!r} is {node.type}; it must be one of {_list(CONSTANTS)}")
        try:
            said = np.array(json.loads(found["value"]))
            with np.errstate(over="ignore", invalid="ignore"):  # told below
                value = said.astype(CONSTANTS[node.type])
            if said.dtype.kind not in "biuf" or (value.dtype.kind != "f" and not np.array_equal(value, said)):
                raise ValueError(found["value"])
        except (ValueError, TypeError, OverflowError) as error:
            raise ExportError(f"the value of {node.name!r} is no {CONSTANTS[node.type]} in JSON: {error}") from error
        if not np.isfinite(value).all():
            raise ExportError(f"the value of {node.name!r} is no finite {CONSTANTS[node.type]}: {found['value']}")
        sizes = [size if isinstance(size, int) else None for size in node.shape]
        if len(sizes) != value.ndim or any(a not in (None, b) for a, b in zip(sizes, value.shape, strict=True)):
            raise ExportError(f"constant {node.name!r} has shape {node.shape}, its value {list(value.shape)}")
        return node.name, value

    def _tensor(self, name: str, said: str | None) -> Tensor:
        """An input with a batch, at the axis that was said or first, as declared, the open sizes from --shape."""
        node, axis = self._node(name, self.inputs), int(said or 0)
        if node.type not in DTYPES:
            raise ExportError(
                f"{name!r} is {node.type}; a step takes and returns {_list(DTYPES)}: export it with a Cast inside"
            )
        if axis >= len(node.shape):
            raise ExportError(f"{name!r} has shape {node.shape}: there is no axis {axis} for the batch")
        if isinstance(node.shape[axis], int):
            raise ExportError(
                f"{name!r} has shape {node.shape}: its batch axis {axis} is fixed at {node.shape[axis]}; export the "
                f"graph with a dynamic batch axis, or say which axis it is, as {name}@1"
            )
        declared = node.shape[:axis] + node.shape[axis + 1 :]
        shape = self.shapes.get(name, tuple(declared))
        if any(isinstance(size, int) and size < 1 for size in shape):
            raise ExportError(f"{name!r} has shape {list(shape)} without the batch: sizes are at least 1")
        if not all(isinstance(size, int) for size in shape):
            sizes = "x".join(str(size) if isinstance(size, int) else "1" for size in shape)
            raise ExportError(
                f"{name!r} has shape {node.shape}: say its sizes without the batch, such as --shape {name}={sizes}"
            )
        if len(shape) != len(declared) or any(
            isinstance(a, int) and a != b for a, b in zip(declared, shape, strict=True)
        ):
            raise ExportError(f"--shape of {name!r} is {list(shape)}, but the graph says {node.shape}")
        return Tensor(name, DTYPES[node.type], shape, axis)

    def _seen(self) -> list[Tensor]:
        """The outputs that are no state, with the shapes and axes that runs of 2, 3 and 5 sessions show."""
        for name, node in self.results.items():
            if not node.type.startswith("tensor("):
                raise ExportError(f"output {name!r} is {node.type}, no tensor: export the graph without it")
        shapes: dict[str, list[tuple[int, ...]]] = {name: [] for name in self.results}
        for sessions in BATCHES:
            x = np.zeros((sessions, *self.x.shape), self.x.dtype)
            for name, value in self.step(x, self.initial(sessions)).items():
                shapes[name].append(value.shape)
        for tensor, result in self.states:
            want = [(*tensor.shape[: tensor.axis], b, *tensor.shape[tensor.axis :]) for b in BATCHES]
            if shapes[result] != want:
                raise ExportError(
                    f"state {tensor.name!r} takes shape {list(want[0])} for {BATCHES[0]} sessions, but {result!r} "
                    f"returns {list(shapes[result][0])}: they cannot be a pair with the batch at axis {tensor.axis}"
                )
            if self.results[result].type != self.inputs[tensor.name].type:
                raise ExportError(f"state {tensor.name!r} is {tensor.dtype}, but {result!r} is of another type")
            self._require_declared(result, tensor.axis, len(tensor.shape) + 1)
        states = {result for _, result in self.states}
        found = [self._output(name, shapes[name]) for name in self.results if name not in states]
        if not found:
            raise ExportError(f"every result of the graph ({_list(self.results)}) is a state: a model needs an output")
        return found

    def _output(self, name: str, shapes: list[tuple[int, ...]]) -> Tensor:
        node = self.results[name]
        if node.type not in DTYPES:
            raise ExportError(f"output {name!r} is {node.type}; a step returns {_list(DTYPES)}")
        axes = [
            axis
            for axis in range(min(map(len, shapes)))
            if tuple(shape[axis] for shape in shapes) == BATCHES and len(set(map(len, shapes))) == 1
        ]
        rest = {tuple(size for axis, size in enumerate(shape) if axis not in axes) for shape in shapes}
        if len(axes) != 1 or len(rest) != 1:
            raise ExportError(
                f"output {name!r} has no batch axis: for {', '.join(map(str, BATCHES))} sessions it has shapes "
                f"{', '.join(str(list(shape)) for shape in shapes)}"
            )
        self._require_declared(name, axes[0], len(shapes[0]))
        return Tensor(name, DTYPES[node.type], rest.pop(), axes[0])

    def _require_declared(self, name: str, axis: int, axes: int) -> None:
        """What a result is declared as must be what it is: the service reads the declaration."""
        declared = self.results[name].shape
        if len(declared) != axes or isinstance(declared[axis], int):
            raise ExportError(
                f"{name!r} is declared with shape {declared}, but it has {axes} axes and the batch at axis {axis}: "
                f"declare it so, with a dynamic batch axis"
            )


def adopt(
    path: Path,
    models: Path,
    name: str,
    plan: Plan,
    *,
    version: str | None = None,
    force: bool = False,
    about: str = "",
    succeeds: bool = False,
) -> Path:
    """The graph in `path` as models/<name>/<version>, by default the next free one; returns that path. With `succeeds`
    it must have the tensors of the newest version that there is.

    Raises ExportError, and leaves `models` as it was, when the graph cannot be a model.
    """
    version = free_version(models, name, version, force=force)
    graph = read_graph(path)
    runner = StepRunner(graph.SerializeToString(), plan)
    require_forward(graph, [state.name for state, _ in runner.states])
    require_no_chance(graph, runner.constants)
    if succeeds and (before := newest(models / name)) is not None:
        found = read_manifest(before)
        if _tensors(found) != _tensors(runner.words()):
            raise ExportError(
                f"{before} has other tensors: {path.name} is no new version of it; give it a --name of its own"
            )
    inputs = golden_inputs(runner.x, plan)
    golden = prove(runner, inputs)
    sizes = {"sequences": inputs.shape[0], "steps": inputs.shape[1], "tolerance": TOLERANCE}
    weights = sum(int(np.prod(weight.dims)) for weight in _weights(graph.graph) if weight.data_type in FLOATS)

    def manifest(files: dict[str, str]) -> dict[str, Any]:
        return {
            "manifest_version": 1,
            "name": name,
            "version": version,
            "description": about or f"adopted from {path.name}",
            "task": "other",
            "head": "none",
            **runner.words(),
            "constants": [
                {"name": key, "dtype": str(value.dtype), "shape": list(value.shape), "value": value.ravel().tolist()}
                for key, value in runner.constants.items()
            ],
            "normalisation": {"kind": "none"},
            "feedback": None,
            "unit": None,
            "parameters": weights,
            "files": files,
            "golden": sizes,
            "data": None,
            "training": {},
            "metrics": [],
            "libraries": {key: importlib.metadata.version(key) for key in ("onnx", "onnxruntime", "numpy")},
        }

    return write_version(models / name / version, graph.SerializeToString(), golden, manifest)


def _tensors(words: Mapping[str, Any]) -> list[list[Any]]:
    """Name, type and shape of what a client sees of a manifest's tensors."""
    return [
        [tensor[key] for key in ("name", "dtype", "shape")]
        for tensor in (words["input"], *words["outputs"], *words["state"])
    ]


def read_graph(path: Path) -> onnx.ModelProto:
    """The checked ONNX model in `path`, with the weights that lie in files beside it; ExportError when it is none, is
    broken, or keeps weights elsewhere.
    """
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # protobuf's own, which is not part of its interface
        raise ExportError(f"{path} is not an ONNX model: {error}") from error
    for tensor in _weights(model.graph):
        if uses_external_data(tensor):
            place = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
            if not place or Path(place).name != place or not (path.parent / place).is_file():
                raise ExportError(
                    f"{path}: weight {tensor.name!r} lies in {place!r}, which is no file beside it: put it there, or "
                    f"save the model in one file (torch.onnx.export(..., external_data=False))"
                )
    try:
        load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # cut short, say; the helper and protobuf raise a family each
        raise ExportError(f"{path}: its weights in other files cannot be read: {error}") from error
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the checker and shape inference raise a family each
        opsets = ", ".join(f"{opset.domain or 'ai.onnx'} {opset.version}" for opset in model.opset_import)
        raise ExportError(f"{path} ({opsets}) does not pass ONNX's own check: {error}") from error
    return model


def require_forward(model: onnx.ModelProto, states: Iterable[str]) -> None:
    """ExportError where a recurrent operator goes backwards from a state: step by step its golden vectors would be
    right, and its answers would not be those that it was trained to give. One that begins from nothing does not go over
    steps, but over something within one: bands, say.
    """
    stateful = set(states)  # what may depend on one
    whole, *parts = _graphs(model)
    for graph in (whole, *parts):
        if graph is not whole:
            stateful.update(given if isinstance(given, str) else given.name for given in graph.input)
        for node in graph.node:
            if stateful.intersection(node.input) or any(map(_inner, node.attribute)):
                stateful.update(node.output)
            ways = [attribute.s.decode() for attribute in node.attribute if attribute.name == "direction"]
            if node.op_type in RECURRENT and ways not in ([], ["forward"]) and stateful.intersection(node.input[5:7]):
                raise ExportError(
                    f"{_called(node)} is {ways[0]}: it reads later steps, which a session does not have yet; train it "
                    f"forward"
                )


def require_no_chance(model: onnx.ModelProto, constants: Mapping[str, Array]) -> None:
    """ExportError where the graph draws random numbers: rare or small ones would not show when it is run twice."""
    known = {name: bool(np.any(value)) for name, value in constants.items()}
    known |= {weight.name: bool(to_array(weight).any()) for weight in _weights(model.graph) if not weight.dims}
    for node in (node for graph in _graphs(model) for node in graph.node):
        if node.op_type == "Constant" and node.attribute[0].name in ("value", "value_int", "value_float"):
            said = onnx.helper.get_attribute_value(node.attribute[0])
            known[node.output[0]] = bool(np.any(to_array(said) if isinstance(said, TensorProto) else said))
        elif node.op_type in ("Identity", "Cast") and node.input[0] in known:
            known[node.output[0]] = known[node.input[0]]
        given = [known.get(name, True) for name in node.input[1:3] if name]  # of Dropout: its ratio, whether it trains
        drops = node.op_type == "Dropout" and len(node.input) > 2 and node.input[2] and all(given)
        if node.op_type in RANDOM or drops:
            way = "export it in evaluation mode" if drops else "draw in the client, and send it as part of the input"
            raise ExportError(f"{_called(node)} draws random numbers: the graph is not deterministic; {way}")


def golden_inputs(x: Tensor, plan: Plan) -> Array:
    """Inputs [sequences, steps, ...]: the sample, ids, or normal numbers."""
    if plan.sample is not None:
        try:
            sample = np.load(plan.sample, allow_pickle=False)
            if not isinstance(sample, np.ndarray) or sample.dtype.kind not in "iuf":
                raise ValueError("np.save writes one, of numbers")
        except (OSError, ValueError, EOFError) as error:
            raise ExportError(f"{plan.sample} is no .npy array: {error}") from error
        if sample.ndim < 2 or sample.shape[2:] != x.shape or min(sample.shape[:2]) < 1:
            raise ExportError(
                f"{plan.sample} has shape {list(sample.shape)}, not [sequences, steps, {', '.join(map(str, x.shape))}]"
            )
        with np.errstate(over="ignore", invalid="ignore"):  # told below
            cast = np.asarray(sample, x.dtype)
        if not np.isfinite(cast).all():
            place = np.argwhere(~np.isfinite(cast))[0].tolist()
            raise ExportError(
                f"{plan.sample} is {sample[tuple(place)]} at {place}, which is no finite {x.dtype}: fill it"
            )
        if x.dtype == "int64" and not np.array_equal(cast, sample):
            raise ExportError(f"{plan.sample} holds values that are no whole numbers; input {x.name!r} is int64")
        return cast
    rng, size = np.random.default_rng(GOLDEN_SEED), (GOLDEN_SEQUENCES, GOLDEN_STEPS, *x.shape)
    if x.dtype == "int64":
        if plan.ids is None:
            raise ExportError(f"input {x.name!r} is int64: say below what its ids are with --ids, or give a --sample")
        if plan.ids < 1:
            raise ExportError(f"--ids is what ids are below: at least 1, not {plan.ids}")
        return rng.integers(plan.ids, size=size)
    return rng.normal(size=size).astype(np.float32)


def prove(runner: StepRunner, inputs: Array) -> Values:
    """The golden vectors; ExportError when a value is not finite, not repeatable, or depends on its batch-mates."""
    golden = runner.replay(inputs)
    again = runner.replay(inputs)
    alone = [runner.replay(row[None]) for row in inputs]
    for key, value in golden.items():
        kind, _, name = key.partition(".")
        if not np.isfinite(value).all():
            raise ExportError(
                f"{kind} {name!r} is not finite within {inputs.shape[1]} steps of random or sample inputs"
            )
        if not np.array_equal(value, again[key]):
            raise ExportError(
                f"{kind} {name!r} differs when the same steps are repeated: the graph is not deterministic"
            )
        single = np.concatenate([replayed[key] for replayed in alone])
        differs = error(value, single)
        if differs > TOLERANCE:
            raise ExportError(
                f"{kind} {name!r} differs by {differs:.2e} when a session runs alone and among {len(inputs)}: rows of "
                f"a batch influence each other, or the axis of its batch is another"
            )
    return {f"input.{runner.x.name}": inputs} | golden


def _match(pattern: re.Pattern[str], text: str, flag: str) -> re.Match[str]:
    found = pattern.fullmatch(text)
    if found is None:
        raise ExportError(f"{flag} {text!r} is not {MEANT[flag]}")
    return found


def _weights(graph: GraphProto) -> Iterator[TensorProto]:
    """Every stored tensor, in branches and loops too."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type == AttributeProto.GRAPH:
                yield from _weights(attribute.g)


def _inner(attribute: AttributeProto) -> list[GraphProto]:
    """The graphs of a branch or a loop."""
    return [*attribute.graphs, *([attribute.g] if attribute.type == AttributeProto.GRAPH else [])]


def _graphs(model: onnx.ModelProto) -> Iterator[GraphProto | FunctionProto]:
    """The graph itself, those of its branches and loops, and of the functions that cannot be put in their place."""

    def within(graph: GraphProto | FunctionProto) -> Iterator[GraphProto | FunctionProto]:
        yield graph
        for inner in (inner for node in graph.node for attribute in node.attribute for inner in _inner(attribute)):
            yield from within(inner)

    whole = inline_local_functions(model) if model.functions else model
    for part in (whole.graph, *whole.functions):
        yield from within(part)


def _called(node: NodeProto) -> str:
    """An operator as a person finds it in the graph."""
    return f"{node.op_type} {(node.name or node.output[0])!r}"


def _list(names: Any) -> str:
    return ", ".join(map(str, names))
