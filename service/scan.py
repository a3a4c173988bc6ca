"""Wraps a step graph in an ONNX `Scan` (opset 9 and later), so that T steps of a chunk are one run of the runtime.

Rule: the body is the step graph itself, node for node, so the wrapped graph gives the bits of T single steps; whoever
uses it checks that (`engine` does, on the golden vectors). It knows ONNX, not ONNX Runtime.
"""

import onnx
from onnx import ValueInfoProto, helper

from service.manifest import Manifest

# Names inside and outside of the loop must differ, and no exporter writes these.
_INPUTS, _SEQUENCE, _FIRST, _NEXT, _LAST = (
    f"latch.{part}/" for part in ("inputs", "sequence", "first", "next", "last")
)


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


def wrap(graph: bytes, manifest: Manifest) -> bytes:
    """Makes the graph of T steps from the graph of one.

    Args:
        graph: model.onnx.
        manifest: names its input, outputs, states and constants.

    Returns:
        A graph that takes `inputs(input)`, `first(state.input)` for each state and the constants, and returns
        `last(state.input)` for each state and `sequence(name)` for each output and each state's output.

    Raises:
        Exception: of `onnx`, where the step graph does not fit into a loop.
    """
    model = onnx.load_model_from_string(graph)
    step = model.graph
    taken = {value.name: value for value in step.input}
    given = {value.name: value for value in step.output}
    x, states = manifest.input.name, manifest.state
    each = list(dict.fromkeys([tensor.name for tensor in manifest.outputs] + [pair.output for pair in states]))

    # What a step hands on gets a name of its own: the same value may be an output, two states, or an input unchanged.
    copies = [helper.make_node("Identity", [pair.output], [_NEXT + pair.input]) for pair in states]
    copies += [helper.make_node("Identity", [name], [sequence(name)]) for name in each]
    body = helper.make_graph(
        [*step.node, *copies],
        step.name or "step",
        [*(taken[pair.input] for pair in states), taken[x]],
        [
            *(_renamed(given[pair.output], _NEXT + pair.input) for pair in states),
            *(_renamed(given[name], sequence(name)) for name in each),
        ],
        value_info=[value for value in step.value_info if value.name not in taken],
    )
    firsts = [_renamed(taken[pair.input], first(pair.input)) for pair in states]
    lasts = [_renamed(given[pair.output], last(pair.input)) for pair in states]
    xs, ys = _stacked(taken[x], inputs(x)), [_stacked(given[name], sequence(name)) for name in each]
    loop = helper.make_node(
        "Scan",
        [value.name for value in (*firsts, xs)],
        [value.name for value in (*lasts, *ys)],
        body=body,
        num_scan_inputs=1,
    )
    constants = [taken[constant.name] for constant in manifest.constants]
    # The weights stay outside of the loop: its body reads them from there.
    whole = helper.make_graph([loop], "chunk", [*firsts, xs, *constants], [*lasts, *ys], list(step.initializer))
    wrapped = helper.make_model(whole, opset_imports=model.opset_import, ir_version=model.ir_version)
    wrapped.functions.extend(model.functions)
    onnx.checker.check_model(wrapped)
    content: bytes = wrapped.SerializeToString()
    return content


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
