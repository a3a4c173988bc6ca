"""The fully gated unit lowered to the ONNX operator `GRU`: one node for its step, and for whole sequences of them.

Its one rule: the equations are the cell's own, which the parity check compares it with. The operator gives no gate
activations and other bits than the primitives, so a model has one lowering, for every number of steps. The variants
have none: folded into the operator they would store and multiply the zeros that they are there to save.
"""

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset20 as op
from torch import Tensor, nn

from training.cells import Cell
from training.errors import ExportError
from training.model import RecurrentModel


@torch.library.custom_op("latch::gru", mutates_args=())
def _gru(x: Tensor, h: Tensor, w: Tensor, r: Tensor, b: Tensor, reset_after: int) -> Tensor:
    """Stands for the operator in a graph that is exported, and is never run."""
    raise NotImplementedError


@_gru.register_fake
def _(x: Tensor, h: Tensor, w: Tensor, r: Tensor, b: Tensor, reset_after: int) -> Tensor:
    return torch.empty_like(h)


def _onnx_gru(x: Any, h: Any, w: Any, r: Any, b: Any, reset_after: int) -> Any:
    """The same in ONNX; x and h get the operator's axis of time, h its axis of directions, of which there is one."""
    time: Any = [0]
    _, last = op.GRU(
        op.Unsqueeze(x, time),
        w,
        r,
        b,
        None,
        op.Unsqueeze(h, time),
        hidden_size=r.shape[-1],
        linear_before_reset=reset_after,
    )
    return op.Squeeze(last, time)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.latch.gru.default: _onnx_gru}


class OperatorGraph(nn.Module):
    """The model's `step` with its cell as the operator: (x, *state) -> (outputs, next state).

    Raises ExportError for a model that is more or other than one `gru` with the operator's own activations.
    """

    def __init__(self, model: RecurrentModel) -> None:
        super().__init__()
        cell = model.layers[0]
        if len(model.layers) > 1 or cell.name != "gru":
            raise ExportError("only one layer of `gru` is an operator: export this model as primitives")
        if (cell.gate_activation, cell.candidate_activation) != ("sigmoid", "tanh"):
            raise ExportError("the operator's activations are sigmoid and tanh: export this model as primitives")
        self.model, self.reset_after = model, int(cell.reset == "after")
        with torch.no_grad():
            self.weights = operator_weights(cell)

    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Flat, because a graph has no structure."""
        encoded = self.model.encode(x)
        h = torch.ops.latch.gru(encoded, *state, *self.weights, self.reset_after)
        return (*self.model.predict(self.model.decode(h, encoded)), h)


def operator_weights(cell: Cell) -> tuple[Tensor, Tensor, Tensor]:
    """W [1, 3 H, I], R [1, 3 H, H] and B [1, 6 H] with the operator's blocks z, r, candidate.

    The operator blends as `keep`; negating the block of z makes that `write`, because s(-v) = 1 - s(v).
    """
    size = cell.hidden_size
    sign = torch.ones(3 * size)
    if cell.blend == "write":
        sign[:size] = -1
    w, r, b = (torch.cat((getattr(cell, f"{kind}_gates"), getattr(cell, kind))).detach() for kind in ("w", "u", "b"))
    b_r = torch.zeros(3 * size)
    if cell.b_u is not None:
        b_r[2 * size :] = cell.b_u.detach()
    return (sign[:, None] * w)[None], (sign[:, None] * r)[None], torch.cat((sign * b, b_r))[None]
