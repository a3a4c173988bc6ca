"""A recurrence that is the ONNX operator `GRU` needs no loop: the operator takes sequences itself.

Rule: the operator of the T-step graph is the step graph's own, weights and attributes; only its time axis grows from
one step to T. It knows ONNX, not ONNX Runtime.
"""

from collections.abc import Sequence

from onnx import NodeProto, helper

_OWN = "latch.operator/"


def is_operator(loop: Sequence[NodeProto]) -> bool:
    """Whether x [B, I] and h [B, H] get another axis, pass the operator, and h loses it again."""
    return sorted(node.op_type for node in loop) == ["GRU", "Squeeze", "Unsqueeze", "Unsqueeze"]


def over_time(loop: Sequence[NodeProto], inputs: str, first: str, sequence: str, last: str) -> list[NodeProto]:
    """The nodes that do in one go what the step's recurrence does T times.

    Args:
        loop: the step's recurrence, which is an operator.
        inputs: what x of all steps is called, [T, B, I].
        first: what h before the first step is called, [B, H].
        sequence: what h after each step is to be called, [T, B, H].
        last: what h after the last step is to be called, [B, H].
    """
    operator = NodeProto()
    operator.CopyFrom(next(node for node in loop if node.op_type == "GRU"))
    operator.input[0], operator.input[5] = inputs, _OWN + "h"
    operator.output[:] = [_OWN + "all", _OWN + "last"]
    # [1, B, H] and [T, 1, B, H]: the axis of the operator's directions, of which there is one.
    return [
        helper.make_node("Constant", [], [_OWN + "0"], value_ints=[0]),
        helper.make_node("Constant", [], [_OWN + "1"], value_ints=[1]),
        helper.make_node("Unsqueeze", [first, _OWN + "0"], [_OWN + "h"]),
        operator,
        helper.make_node("Squeeze", [_OWN + "all", _OWN + "1"], [sequence]),
        helper.make_node("Squeeze", [_OWN + "last", _OWN + "0"], [last]),
    ]
