"""The loops over time of the units, forwards and backwards, in plain torch: any device, any floating type.

Its one rule: it is handed every buffer, writes in place, and does per step only what depends on the step before.
It must not know cells, weight gradients or autograd. `native.cpp` keeps the same contract on the CPU, faster.

Shapes: T steps, B rows, H units, G gates; all buffers are time-major. `a` [T, B, (G+1) H] comes with everything that
does not depend on the state (W x + b of each block, the candidate's last) and leaves with the activations; `h`
[T+1, B, H] comes with the first state in h[0]; `u` is [(G+1) H, H], a block of rows for each block of `a`. Backwards,
`grad` [T, B, H] is the gradient of h[1:] and is used up, `d` takes the gradients of what `a` came with, and the
gradient of the first state is returned.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Activation:
    """An activation in place, and its derivative as a function of its own value."""

    apply: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


ACTIVATIONS: dict[str, Activation] = {  # native.cpp counts them in this order
    "sigmoid": Activation(Tensor.sigmoid_, lambda y: y * (1 - y)),
    "hardsigmoid": Activation(
        lambda v: functional.hardsigmoid(v, inplace=True), lambda y: ((y > 0) & (y < 1)).to(y.dtype) / 6
    ),
    "tanh": Activation(Tensor.tanh_, lambda y: 1 - y * y),
    "relu": Activation(Tensor.relu_, lambda y: (y > 0).to(y.dtype)),
    "identity": Activation(lambda v: v, torch.ones_like),
    "hardtanh": Activation(lambda v: v.clamp_(-1, 1), lambda y: (y.abs() < 1).to(y.dtype)),
    "softsign": Activation(lambda v: v.div_(1 + v.abs()), lambda y: (1 - y.abs()).square()),
}


@dataclass(frozen=True)
class Form:
    """What a loop must know of a cell: gates is G; keep and after are its conventions; s and phi its activations."""

    gates: int
    keep: bool
    after: bool
    s: str
    phi: str


def _mix(form: Form, z: Tensor, h: Tensor, c: Tensor, out: Tensor) -> None:
    torch.lerp(*((c, h) if form.keep else (h, c)), z, out=out)


def _shares(form: Form, z: Tensor) -> tuple[Tensor, Tensor]:
    """How much of a new state's gradient goes to the old state and to the candidate."""
    return (z, 1 - z) if form.keep else (1 - z, z)


def gated_forward(form: Form, a: Tensor, h: Tensor, e: Tensor, u: Tensor, b_u: Tensor | None) -> None:
    """`gru` to `gru2`, `mgu` to `mgu2`; `e` [T, B, H] takes r o h, or U h + b_u with reset after."""
    s, phi, units = ACTIVATIONS[form.s].apply, ACTIVATIONS[form.phi].apply, h.shape[-1]
    u_gates, u_candidate = u[:-units].T, u[-units:].T
    blocks = (form.gates * units, units)
    for now, old, new, extra in zip(a, h, h[1:], e, strict=False):
        gates, c = now.split_with_sizes(blocks, dim=-1)
        s(torch.addmm(gates, old, u_gates, out=gates))
        z, r = gates[:, :units], gates[:, -units:]
        if b_u is None:
            torch.addmm(c, torch.mul(r, old, out=extra), u_candidate, out=c)
        else:
            c.addcmul_(r, torch.addmm(b_u, old, u_candidate, out=extra))
        phi(c)
        _mix(form, z, old, c, new)


def gated_backward(
    form: Form, grad: Tensor, a: Tensor, h: Tensor, e: Tensor, u: Tensor, d: Tensor, d_candidate: Tensor | None
) -> Tensor:
    """With reset after, d's last block is the gradient of U h + b_u, and `d_candidate` [T, B, H] that of W x + b."""
    units = h.shape[-1]
    old = h[:-1]
    z, r, c = a[..., :units], a[..., -2 * units : -units], a[..., -units:]
    to_h, to_c = _shares(form, z)
    to_c = to_c * ACTIVATIONS[form.phi].slope(c)
    to_z = (old - c if form.keep else c - old) * ACTIVATIONS[form.s].slope(z)
    to_r = (e if form.after else old) * ACTIVATIONS[form.s].slope(r)
    u_gates, u_candidate = u[:-units], u[-units:]
    carry = torch.zeros_like(h[0])
    for t in reversed(range(len(d))):
        g, d_gates, d_c = grad[t].add_(carry), d[t, :, :-units], d[t, :, -units:]
        torch.mul(g, to_h[t], out=carry)
        torch.mul(g, to_z[t], out=d_gates[:, :units])
        if d_candidate is not None:
            d_r = torch.mul(g, to_c[t], out=d_candidate[t])
            torch.mul(d_r, r[t], out=d_c)
        else:
            torch.mul(g, to_c[t], out=d_c)
            d_r = d_c @ u_candidate
            carry.addcmul_(d_r, r[t])
        if form.gates == 1:
            d_gates.addcmul_(d_r, to_r[t])
        else:
            torch.mul(d_r, to_r[t], out=d_gates[:, units:])
        torch.addmm(carry, *((d[t], u) if form.after else (d_gates, u_gates)), out=carry)
    return carry


def folded_forward(form: Form, a: Tensor, h: Tensor, u: Tensor, z: Tensor | None) -> None:
    """`gru3` and `mgu3` with their constant gate z [H] and r folded into `u`; `rnn` with none."""
    phi = ACTIVATIONS[form.phi].apply
    for now, old, new in zip(a, h, h[1:], strict=False):
        c = phi(torch.addmm(now, old, u.T, out=now))
        if z is None:
            new.copy_(c)
        else:
            _mix(form, z, old, c, new)


def folded_backward(form: Form, grad: Tensor, a: Tensor, u: Tensor, z: Tensor | None, d: Tensor) -> Tensor:
    """`grad` leaves with the whole gradient of h[1:], later steps included."""
    to_h, to_c = (None, 1) if z is None else _shares(form, z)
    to_c = to_c * ACTIVATIONS[form.phi].slope(a)
    carry = torch.zeros_like(grad[0])
    for t in reversed(range(len(d))):
        g = grad[t].add_(carry)
        torch.mul(g, to_c[t], out=d[t])
        if to_h is None:
            torch.mm(d[t], u, out=carry)
        else:
            torch.addmm(torch.mul(g, to_h, out=carry), d[t], u, out=carry)
    return carry


def lstm_forward(form: Form, a: Tensor, h: Tensor, c: Tensor, p: Tensor, u: Tensor) -> None:
    """`c` [T+1, B, H] is the second state, `p` [T, B, H] takes phi of it; the blocks are i, f, o and the candidate."""
    s, phi, units = ACTIVATIONS[form.s].apply, ACTIVATIONS[form.phi].apply, h.shape[-1]
    for t, now in enumerate(a):
        torch.addmm(now, h[t], u.T, out=now)
        s(now[:, : 3 * units])
        i, f, o, candidate = now.chunk(4, dim=-1)
        torch.mul(f, c[t], out=c[t + 1]).addcmul_(i, phi(candidate))
        torch.mul(o, phi(p[t].copy_(c[t + 1])), out=h[t + 1])


def lstm_backward(
    form: Form, grad: Tensor, grad_c: Tensor, a: Tensor, c: Tensor, p: Tensor, u: Tensor, d: Tensor
) -> tuple[Tensor, Tensor]:
    """`grad_c` [B, H] is the gradient of the last c, and used up; both first states' gradients are returned."""
    i, f, o, candidate = a.chunk(4, dim=-1)
    s, phi = ACTIVATIONS[form.s].slope, ACTIVATIONS[form.phi].slope
    to_c, to_o = o * phi(p), p * s(o)
    to_gates = torch.cat((candidate * s(i), c[:-1] * s(f)), dim=-1)
    to_candidate = i * phi(candidate)
    carry, carry_c = torch.zeros_like(grad_c), grad_c
    for t in reversed(range(len(d))):
        g = grad[t].add_(carry)
        carry_c.addcmul_(g, to_c[t])
        d_i, d_f, d_o, d_candidate = d[t].chunk(4, dim=-1)
        to_i, to_f = to_gates[t].chunk(2, dim=-1)
        torch.mul(carry_c, to_i, out=d_i)
        torch.mul(carry_c, to_f, out=d_f)
        torch.mul(g, to_o[t], out=d_o)
        torch.mul(carry_c, to_candidate[t], out=d_candidate)
        carry_c.mul_(f[t])
        torch.mm(d[t], u, out=carry)
    return carry, carry_c


def _scan(keep: Tensor, add: Tensor, first: Tensor) -> Tensor:
    """All states of state = keep o state + add, [T, B, H] each, in 2 sqrt(T) rounds of large operations.

    The steps are cut into chunks. Every chunk is run from zero, all of them at once, and then told, one after the
    other, with what state it begins.
    """
    steps = len(add)
    length = math.isqrt(steps - 1) + 1
    pad = (0, 0, 0, 0, 0, -steps % length)
    chunks = (-(-steps // length), length, *first.shape)
    keep, add = functional.pad(keep, pad).reshape(chunks).clone(), functional.pad(add, pad).reshape(chunks).clone()
    for step in range(1, length):
        add[:, step].addcmul_(keep[:, step], add[:, step - 1])
        keep[:, step].mul_(keep[:, step - 1])
    for product, total in zip(keep, add, strict=True):
        first = total.addcmul_(product, first)[-1]
    return add.flatten(0, 1)[:steps]


def scan_forward(form: Form, a: Tensor, h: Tensor) -> None:
    """`mingru`: both blocks of `a` are known for all steps, so that the state is a linear recurrence."""
    z, c = a.chunk(2, dim=-1)
    to_h, to_c = _shares(form, ACTIVATIONS[form.s].apply(z))
    h[1:] = _scan(to_h, to_c * ACTIVATIONS[form.phi].apply(c), h[0])


def scan_backward(form: Form, grad: Tensor, a: Tensor, h: Tensor, d: Tensor) -> Tensor:
    """The same recurrence from the last step to the first."""
    z, c = a.chunk(2, dim=-1)
    to_h, to_c = _shares(form, z)
    later = torch.cat((to_h[1:], torch.zeros_like(to_h[:1]))).flip(0)
    g = _scan(later, grad.flip(0), torch.zeros_like(h[0])).flip(0)
    d_z, d_c = d.chunk(2, dim=-1)
    old = h[:-1]
    torch.mul(g * (old - c if form.keep else c - old), ACTIVATIONS[form.s].slope(z), out=d_z)
    torch.mul(g * to_c, ACTIVATIONS[form.phi].slope(c), out=d_c)
    return g[0] * to_h[0]
