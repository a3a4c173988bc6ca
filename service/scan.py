"""Wraps a step graph in an ONNX `Scan` (opset 9 and later), so that T steps of a chunk are one run of the runtime.

Rule: the body is the step graph itself, node for node, so the wrapped graph gives the bits of T single steps; whoever
uses it checks that (`engine` does, on the golden vectors). It knows ONNX, not ONNX Runtime.
"""

from collections.abc import Iterable, Mapping

import onnx
from onnx import ValueInfoProto, helper

from service.manifest import Manifest

# Names inside and outside of the loop must differ, and no exporter writes these.
_SEQUENCE, _FIRST, _LAST = "latch.sequence/", "latch.first/", "latch.last/"


def sequence(name: str) -> str:
    """The wrapped graph's name for all T values of the step's tensor `name`: [T, *its shape, batch axis included]."""
    return _SEQUENCE + name


def first(name: str) -> str:
    """The wrapped graph's name for a state as it is before the first step."""
    return _FIRST + name


def last(name: str) -> str:
    """The wrapped graph's name for a state as it is after the last step."""
    return _LAST + name


def wrap(graph: bytes, manifest: Manifest) -> bytes:
    """Makes the graph of T steps from the graph of one.

    Args:
        graph: model.onnx.
        manifest: names its input, outputs, states and constants.

    Returns:
        A graph that takes `sequence(input)`, `first(state.input)` for each state and the constants, and returns
        `sequence(t)` for each output and each state's output, and `last(state.output)` for each state.

    Raises:
        ValueError: the result is no valid ONNX (`onnx.checker`), because the step graph does not fit into a loop.
    """
    model = onnx.load_model_from_string(graph)
    step = model.graph
    inputs = {value.name: value for value in step.input}
    outputs = {value.name: value for value in step.output}
    x, states = manifest.input.name, manifest.state
    each = [tensor.name for tensor in manifest.outputs] + [pair.output for pair in states]

    body = helper.make_graph(
        [*step.node, *(helper.make_node("Identity", [pair.output], [sequence(pair.output)]) for pair in states)],
        step.name or "step",
        [*(inputs[pair.input] for pair in states), inputs[x]],
        [
            *(outputs[pair.output] for pair in states),
            *(outputs[tensor.name] for tensor in manifest.outputs),
            *(_renamed(outputs[pair.output], sequence(pair.output)) for pair in states),
        ],
        value_info=_inner(step.value_info, inputs, outputs),
    )
    firsts = [_renamed(inputs[pair.input], first(pair.input)) for pair in states]
    lasts = [_renamed(outputs[pair.output], last(pair.output)) for pair in states]
    xs, ys = _stacked(inputs[x]), [_stacked(outputs[name]) for name in each]
    loop = helper.make_node(
        "Scan",
        [value.name for value in (*firsts, xs)],
        [value.name for value in (*lasts, *ys)],
        body=body,
        num_scan_inputs=1,
    )
    constants = [inputs[constant.name] for constant in manifest.constants]
    # The weights stay outside of the loop: its body reads them from there.
    whole = helper.make_graph([loop], "chunk", [*firsts, xs, *constants], [*lasts, *ys], list(step.initializer))
    wrapped = helper.make_model(whole, opset_imports=model.opset_import, ir_version=model.ir_version)
    wrapped.functions.extend(model.functions)
    onnx.checker.check_model(wrapped)
    content: bytes = wrapped.SerializeToString()
    return content


def _inner(
    values: Iterable[ValueInfoProto], inputs: Mapping[str, ValueInfoProto], outputs: Mapping[str, ValueInfoProto]
) -> list[ValueInfoProto]:
    return [value for value in values if value.name not in inputs and value.name not in outputs]


def _renamed(value: ValueInfoProto, name: str) -> ValueInfoProto:
    renamed = ValueInfoProto()
    renamed.CopyFrom(value)
    renamed.name = name
    return renamed


def _stacked(value: ValueInfoProto) -> ValueInfoProto:
    """The same value for T steps: one more axis, in front."""
    tensor = value.type.tensor_type
    sizes = [size.dim_value if size.HasField("dim_value") else size.dim_param for size in tensor.shape.dim]
    return helper.make_tensor_value_info(sequence(value.name), tensor.elem_type, ["latch.steps", *sizes])
