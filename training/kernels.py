"""The units over whole sequences, with hand-written gradients: what a cell's `step` unrolled computes, in less time.

Its one rule: equal to the unrolled cell, values and every gradient (tested in float64); `cells.py` has the equations.
All steps' inputs are one product, which the activations then overwrite; the loop over time (`native` on the CPU where
there is a compiler, `loops` elsewhere) leaves the gradient of every step's sums in one buffer; and the gradient of a
weight is one product with that buffer. Gradients of gradients are not offered. It must not know models or training.
"""

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional

from training import loops, native
from training.cells import Cell, GatedCell, LstmCell, MinGruCell, State
from training.loops import Form

Gradients = tuple[Tensor | None, ...]
B = TypeVar("B", bound=Callable[..., Any])
# On the CPU a sequence is cut where the sums of its steps fill this many bytes. Then a part's gradient is still in the
# cache when the weights' is made of it, and its memory serves the next part: fresh memory costs more than the sums.
PART = 2**22


def _project(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """[T, B, rows of b] = W x + b, where w may hold the last rows of W only: the others are 0."""
    steps, batch = x.shape[:2]
    rows = x.flatten(0, 1)
    if len(w) == len(b):
        a = torch.addmm(b, rows, w.T)
    else:
        a = b.expand(len(rows), -1).clone()
        a[:, -len(w) :].addmm_(rows, w.T)
    return a.view(steps, batch, len(b))


def _project_backward(wanted: bool, d: Tensor, x: Tensor, w: Tensor) -> Gradients:
    """The gradients of x (where wanted), w and b from that of `_project`'s result."""
    flat = d.flatten(0, 1)
    fed = flat[:, -len(w) :]
    # In this order, because for a few inputs MKL takes eight times as long in the other.
    d_w = (x.flatten(0, 1).T @ fed).T
    return (fed @ w).view_as(x) if wanted else None, d_w, flat.sum(0)


def _states(first: Tensor, steps: int) -> Tensor:
    """An empty [T+1, B, H] that begins with the first state."""
    h = first.new_empty(steps + 1, *first.shape)
    h[0] = first
    return h


def _own(gradient: Tensor) -> Tensor:
    """A dense copy, which a loop may use up."""
    return gradient.clone(memory_format=torch.contiguous_format)


def _without_autocast(backward: B) -> B:
    """What was computed in the type of the weights has gradients in it, wherever `backward` is called."""

    @wraps(backward)
    def inner(ctx: Any, *grads: Tensor) -> Gradients:
        with torch.autocast(grads[0].device.type, enabled=False):
            return cast("Gradients", backward(ctx, *grads))

    return cast("B", inner)


class _Gated(Function):
    """`gru` to `gru2` and `mgu` to `mgu2`: one block of w, b and u for each gate, then the candidate's."""

    @staticmethod
    def forward(
        ctx: Any, form: Form, by: ModuleType, x: Tensor, w: Tensor, b: Tensor, u: Tensor, b_u: Tensor | None, h: Tensor
    ) -> tuple[Tensor]:
        a, h = _project(x, w, b), _states(h, len(x))
        e = torch.empty_like(h[1:])
        by.gated_forward(form, a, h, e, u, b_u)
        ctx.form, ctx.by = form, by
        ctx.save_for_backward(x, w, u, a, h, e)
        return (h[1:],)

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        x, w, u, a, h, e = ctx.saved_tensors
        units = h.shape[-1]
        d, d_candidate = torch.empty_like(a), torch.empty_like(e) if ctx.form.after else None
        d_h = ctx.by.gated_backward(ctx.form, _own(grad), a, h, e, u, d, d_candidate)
        flat, old = d.flatten(0, 1), h[:-1].flatten(0, 1)
        if d_candidate is None:
            d_u, d_b_u = torch.empty_like(u), None
            torch.mm(flat[:, :-units].T, old, out=d_u[:-units])
            torch.mm(flat[:, -units:].T, e.flatten(0, 1), out=d_u[-units:])
        else:
            d_u, d_b_u = flat.T @ old, flat[:, -units:].sum(0)
            d = torch.cat((d[..., :-units], d_candidate), dim=-1)
        return None, None, *_project_backward(ctx.needs_input_grad[2], d, x, w), d_u, d_b_u, d_h


class _Folded(Function):
    """`gru3`, `mgu3` (constant gate z) and `rnn` (none): one product of h a step."""

    @staticmethod
    def forward(
        ctx: Any, form: Form, by: ModuleType, x: Tensor, w: Tensor, b: Tensor, u: Tensor, z: Tensor | None, h: Tensor
    ) -> tuple[Tensor]:
        a, h = _project(x, w, b), _states(h, len(x))
        by.folded_forward(form, a, h, u, z)
        ctx.form, ctx.by = form, by
        ctx.save_for_backward(x, w, u, z, a, h)
        return (h[1:],)

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        x, w, u, z, a, h = ctx.saved_tensors
        old, d, grad = h[:-1], torch.empty_like(a), _own(grad)
        d_h = ctx.by.folded_backward(ctx.form, grad, a, u, z, d)
        d_u = d.flatten(0, 1).T @ old.flatten(0, 1)
        d_z = None if z is None else grad.mul_(old - a if ctx.form.keep else a - old).sum((0, 1))
        return None, None, *_project_backward(ctx.needs_input_grad[2], d, x, w), d_u, d_z, d_h


class _Lstm(Function):
    """`lstm`: every h and the last c."""

    @staticmethod
    def forward(
        ctx: Any, form: Form, by: ModuleType, x: Tensor, w: Tensor, b: Tensor, u: Tensor, _: None, h: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor]:
        a, h, c = _project(x, w, b), _states(h, len(x)), _states(c, len(x))
        p = torch.empty_like(h[1:])
        by.lstm_forward(form, a, h, c, p, u)
        ctx.form, ctx.by = form, by
        ctx.save_for_backward(x, w, u, a, h, c, p)
        return h[1:], c[-1].clone()

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, grad: Tensor, grad_c: Tensor) -> Gradients:
        x, w, u, a, h, c, p = ctx.saved_tensors
        d = torch.empty_like(a)
        d_h, d_c = ctx.by.lstm_backward(ctx.form, _own(grad), _own(grad_c), a, c, p, u, d)
        d_u = d.flatten(0, 1).T @ h[:-1].flatten(0, 1)
        return None, None, *_project_backward(ctx.needs_input_grad[2], d, x, w), d_u, None, d_h, d_c


class _Scan(Function):
    """`mingru`: no product of h at all."""

    @staticmethod
    def forward(
        ctx: Any, form: Form, by: ModuleType, x: Tensor, w: Tensor, b: Tensor, _u: None, _z: None, h: Tensor
    ) -> tuple[Tensor]:
        a, h = _project(x, w, b), _states(h, len(x))
        by.scan_forward(form, a, h)
        ctx.form, ctx.by = form, by
        ctx.save_for_backward(x, w, a, h)
        return (h[1:],)

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        x, w, a, h = ctx.saved_tensors
        d = torch.empty_like(a)
        d_h = ctx.by.scan_backward(ctx.form, _own(grad), a, h, d)
        return None, None, *_project_backward(ctx.needs_input_grad[2], d, x, w), None, None, d_h


def _function(cell: Cell) -> type[Function]:
    if isinstance(cell, LstmCell):
        return _Lstm
    if isinstance(cell, MinGruCell):
        return _Scan
    return _Gated if cell.gates else _Folded


def _weights(cell: Cell) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(w [rows, I], b [rows], u [rows, H], b_u or z [H]), with a block of rows for each gate, then the candidate's.

    `w` has the last block alone where x does not feed the gates. Constant gates are folded away, all but z.
    """
    if isinstance(cell, GatedCell) and cell.gates:
        b_gates = cell.b.new_zeros(len(cell.u_gates)) if cell.b_gates is None else cell.b_gates
        w = cell.w if cell.w_gates is None else torch.cat((cell.w_gates, cell.w))
        return w, torch.cat((b_gates, cell.b)), torch.cat((cell.u_gates, cell.u)), cell.b_u
    fused = cell.fuse()
    return fused["w"].T, fused["b"], fused["u"].T.contiguous() if "u" in fused else None, fused.get("z")


def run(cell: Cell, x: Tensor, state: State, by: ModuleType | None = None) -> tuple[Tensor, State]:
    """`cell.step` over all of x: [T, B, I], T at least 1, and the state [B, H] -> every h [T, B, H], the last state.

    `by` is whose loop runs: `native` where it can, unless given. ValueError for a state or an input that is not of the
    shape, the type or on the device that the cell takes. Under autocast it computes in the type of the weights.
    """
    weight = next(cell.parameters())
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return run(cell, x.to(weight.dtype), tuple(value.to(weight.dtype) for value in state), by)
    for what, value in (("the input", x), *(("a state", value) for value in state)):
        if (value.dtype, value.device) != (weight.dtype, weight.device):
            raise ValueError(f"{what} is {value.dtype} on {value.device}, the cell {weight.dtype} on {weight.device}")
    for value in state:
        if value.shape != (x.shape[1], cell.hidden_size):
            raise ValueError(f"a state is {[*value.shape]}: {x.shape[1]} rows need [{x.shape[1]}, {cell.hidden_size}]")
    by, units = by or (native if native.serves(x) else loops), cell.hidden_size
    extra = -units % (native.LINE // x.element_size()) if by is native else 0

    def pad(value: Tensor | None, *, square: bool = False) -> Tensor | None:
        """`value` with units of weight 0 after each block of rows, and after the columns where they are units too."""
        if value is None or not extra:
            return value
        sides = (0, extra if square else 0) * (value.dim() - 1) + (0, extra)
        return functional.pad(value.view(-1, units, *value.shape[1:]), sides).flatten(0, 1)

    conventions = (cell.blend == "keep", cell.reset == "after")
    form = Form(len(cell.unit.gates), *conventions, cell.gate_activation or "sigmoid", cell.candidate_activation)
    w, b, u, vector = _weights(cell)
    first = [functional.pad(value, (0, extra)) for value in state]
    weights = (pad(w), pad(b), pad(u, square=True), pad(vector))
    function, parts, last = _function(cell), [], first
    step = x.shape[1] * len(b) * x.element_size()
    for part in torch.split(x.contiguous(), len(x) if x.is_cuda or not step else max(1, PART // step)):
        h, *others = function.apply(form, by, part, *weights, *last)  # type: ignore[no-untyped-call]
        parts.append(h)
        last = [h[-1], *others]
    h = parts[0] if len(parts) == 1 else torch.cat(parts)
    return h[..., :units], tuple(value[:, :units] for value in last)
