"""Makes the graph of T steps from the graph of one, so that a chunk is one run: with an ONNX `Scan`, or none.

Rule: only the recurrence loops. What a step makes of its input alone goes before the loop and what no state waits for
goes after it, on the rows of all T steps at once; every node is still the step graph's own. Whoever uses the wrapped
graph checks that it gives the bits of T single steps (`proof` does). It knows ONNX, not ONNX Runtime.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from service.manifest import Manifest
from service.operators import is_operator, over_time
from service.recurrence import Parts, made, read, rows_of, split

# Names inside and outside of the loop must differ, and no exporter writes these.
_INPUTS, _SEQUENCE, _FIRST, _LAST, _ROWS, _COPY, _SHAPE = (
    f"latch.{part}/" for part in ("inputs", "sequence", "first", "last", "rows", "copy", "shape")
)
_STEPS_AND_BATCH = "latch.steps_and_batch"


def inputs(name: str) -> str:
    """The wrapped graph's name for all T values of the step's input: [T, *its shape, batch axis included]."""
    return _INPUTS + name


def sequence(name: str) -> str:
    """The wrapped graph's name for all T values of what the step returns as `name`: [T, *its shape, batch included]."""
    return _SEQUENCE + name


def first(name: str) -> str:
    """The wrapped graph's name for the state that the step takes as `name`, before the first step."""
    return _FIRST + name


def last(name: str) -> str:
    """The wrapped graph's name for the state that the step takes as `name`, after the last step."""
    return _LAST + name


def wrap(graph: bytes, manifest: Manifest, *, hoist: bool = True, operator: bool = False) -> bytes:
    """Makes the graph of T steps from the graph of one.

    Args:
        graph: model.onnx.
        manifest: names its input, outputs, states and constants.
        hoist: whether nodes may leave the loop; else all of them run T times, on B rows each.
        operator: whether the recurrence is one `GRU`, which takes sequences, so that nothing loops.

    Returns:
        A graph that takes `inputs(input)`, `first(state.input)` for each state and the constants, and returns
        `last(state.input)` for each state and `sequence(name)` for each output and each state's output.

    Raises:
        Exception: of `onnx`, where the step graph does not fit into a loop.
        ValueError: the recurrence is not one operator.
    """
    model = onnx.shape_inference.infer_shapes(graph)  # of bytes: a model would be written out for it and read again
    step, x, states = model.graph, manifest.input.name, manifest.state
    values = {value.name: value for value in (*step.value_info, *step.output, *step.input)}
    wanted = list(dict.fromkeys([tensor.name for tensor in manifest.outputs] + [pair.output for pair in states]))
    rows = rows_of(values, manifest.input) if hoist else set()
    parts = split(step, manifest, rows)
    early, late = ({x} & rows) | made(parts.before), made(parts.after)

    looped = read(parts.loop) | {pair.output for pair in states}
    enter = [name for name in values if name in looped and name in early | {x}] or [x]
    leave = [name for name in wanted if name not in early | late]
    leave += [name for name in values if name in read(parts.after) - early - late - {*leave} - parts.constant]

    reshapes = _Reshapes(values, x)
    nodes = [*parts.fixed]
    if x in read([*parts.before, *parts.after]) or x in early & {*wanted}:
        nodes += reshapes.to_rows(inputs(x), x)
    nodes += _on_rows(parts.before, parts.constant)
    for name in enter:
        nodes += reshapes.to_steps(name, inputs(name)) if name != x else []
    if operator:
        if not is_operator(parts.loop):
            raise ValueError("the recurrence is not one operator")
        (pair,), (sequenced,), (entering,) = states, leave, enter
        nodes += over_time(parts.loop, inputs(entering), first(pair.input), sequence(sequenced), last(pair.input))
    else:
        nodes.append(_loop(parts, values, manifest, enter, leave))
    for name in leave:
        nodes += reshapes.to_rows(sequence(name), name) if name in read(parts.after) else []
    nodes += _on_rows(parts.after, parts.constant)
    for name in wanted:
        nodes += reshapes.to_steps(name, sequence(name)) if name in early | late else []

    whole = helper.make_graph(
        nodes,
        "chunk",
        [
            *(_renamed(values[pair.input], first(pair.input)) for pair in states),
            _stacked(values[x], inputs(x)),
            *(values[constant.name] for constant in manifest.constants),
        ],
        [
            *(_renamed(values[pair.output], last(pair.input)) for pair in states),
            *(_stacked(values[name], sequence(name)) for name in wanted),
        ],
        [*step.initializer, *reshapes.shapes],
    )
    wrapped = helper.make_model(whole, opset_imports=model.opset_import, ir_version=model.ir_version)
    wrapped.functions.extend(model.functions)
    content: bytes = wrapped.SerializeToString()
    onnx.checker.check_model(content)
    return content


def _loop(
    parts: Parts, values: Mapping[str, ValueInfoProto], manifest: Manifest, enter: list[str], leave: list[str]
) -> NodeProto:
    """The `Scan`: states go round; at every step a value of each of `enter` goes in and one of each of `leave` out."""
    own = made(parts.loop)
    copies: list[NodeProto] = []
    results: list[ValueInfoProto] = []
    for name in (*(pair.output for pair in manifest.state), *leave):
        if name in own:  # a result is a node's own output, and one only
            own.remove(name)
            results.append(values[name])
        else:
            copies.append(helper.make_node("Identity", [name], [f"{_COPY}{len(copies)}/{name}"]))
            results.append(_renamed(values[name], copies[-1].output[0]))
    taken = [values[name] for name in (*(pair.input for pair in manifest.state), *enter)]
    return helper.make_node(
        "Scan",
        [*(first(pair.input) for pair in manifest.state), *(inputs(name) for name in enter)],
        [*(last(pair.input) for pair in manifest.state), *(sequence(name) for name in leave)],
        body=helper.make_graph([*parts.loop, *copies], "step", taken, results),
        num_scan_inputs=len(enter),
    )


class _Reshapes:
    """Makes the nodes between [T, B, ...] and rows [T B, ...], and collects the shapes that they need."""

    def __init__(self, values: Mapping[str, ValueInfoProto], x: str) -> None:
        self.shapes: list[TensorProto] = []
        self._values, self._x = values, x
        self._knows_sizes = False

    def to_rows(self, source: str, name: str) -> list[NodeProto]:
        """[T, B, ...] `source` -> the rows of `name`."""
        shape = self._constant(_ROWS + name, [-1, *self._sizes(name)])
        return [helper.make_node("Reshape", [source, shape], [_ROWS + name])]

    def to_steps(self, name: str, target: str) -> list[NodeProto]:
        """The rows of `name` -> [T, B, ...] `target`."""
        nodes = []
        if not self._knows_sizes:
            nodes.append(helper.make_node("Shape", [inputs(self._x)], [_STEPS_AND_BATCH], end=2))
            self._knows_sizes = True
        sizes = self._constant(target, self._sizes(name))
        nodes.append(helper.make_node("Concat", [_STEPS_AND_BATCH, sizes], [sizes + "/all"], axis=0))
        nodes.append(helper.make_node("Reshape", [_ROWS + name, sizes + "/all"], [target]))
        return nodes

    def _sizes(self, name: str) -> list[int]:
        return [size.dim_value for size in self._values[name].type.tensor_type.shape.dim[1:]]

    def _constant(self, name: str, value: list[int]) -> str:
        self.shapes.append(numpy_helper.from_array(np.array(value, np.int64), _SHAPE + name))
        return _SHAPE + name


def _on_rows(nodes: Iterable[NodeProto], constant: set[str]) -> list[NodeProto]:
    """The same nodes outside of the loop."""
    moved = []
    for node in nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        for names in (copy.input, copy.output):
            names[:] = [name if not name or name in constant else _ROWS + name for name in names]
        moved.append(copy)
    return moved


def _renamed(value: ValueInfoProto, name: str) -> ValueInfoProto:
    renamed = ValueInfoProto()
    renamed.CopyFrom(value)
    renamed.name = name
    return renamed


def _stacked(value: ValueInfoProto, name: str) -> ValueInfoProto:
    """The same value for T steps: one more axis, in front."""
    tensor = value.type.tensor_type
    sizes = [size.dim_value if size.HasField("dim_value") else size.dim_param for size in tensor.shape.dim]
    return helper.make_tensor_value_info(name, tensor.elem_type, ["latch.steps", *sizes])
