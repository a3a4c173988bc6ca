"""The units in float64 NumPy, each gate written out from the papers' equations; knows nothing of the torch code.

Parameters come as a dict of arrays: w_g, u_g, b_g for a gate g, and w, u, b (and b_u) for the candidate.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = dict[str, Array]

ACTIVATIONS: dict[str, Any] = {
    "sigmoid": lambda v: 1 / (1 + np.exp(-v)),
    "hardsigmoid": lambda v: np.clip(v / 6 + 0.5, 0, 1),
    "tanh": np.tanh,
    "relu": lambda v: np.maximum(v, 0),
    "identity": lambda v: v,
    "hardtanh": lambda v: np.clip(v, -1, 1),
    "softsign": lambda v: v / (1 + np.abs(v)),
}


def oracle_step(
    cell: str,
    weights: Weights,
    x: Array,
    state: tuple[Array, ...],
    *,
    blend: str | None = "write",
    reset: str | None = "before",
    gate_activation: str | None = "sigmoid",
    candidate_activation: str = "tanh",
) -> tuple[tuple[Array, ...], list[Array]]:
    """One step of `cell`: x [B, I], state [B, H] each -> (next state, gates [B, H] in the table's order)."""
    p, h = weights, state[0]
    s, phi = ACTIVATIONS[gate_activation or "sigmoid"], ACTIVATIONS[candidate_activation]

    def from_x(name: str) -> Array:
        return x @ p[f"w{name}"].T

    def from_h(name: str, value: Array = h) -> Array:
        return value @ p[f"u{name}"].T

    if cell == "rnn":
        return (phi(from_x("") + from_h("") + p["b"]),), []
    if cell == "lstm":
        i = s(from_x("_i") + from_h("_i") + p["b_i"])
        f = s(from_x("_f") + from_h("_f") + p["b_f"])
        o = s(from_x("_o") + from_h("_o") + p["b_o"])
        memory = f * state[1] + i * phi(from_x("") + from_h("") + p["b"])
        return (o * phi(memory), memory), [i, f, o]

    def gate(name: str) -> Array:
        kind = cell[-1] if cell[-1] in "123" else "full"
        if kind == "full":
            return s(from_x(name) + from_h(name) + p[f"b{name}"])
        if kind == "1":
            return s(from_h(name) + p[f"b{name}"])
        if kind == "2":
            return s(from_h(name))
        return np.broadcast_to(s(p[f"b{name}"]), h.shape)

    if cell == "mingru":
        gates = [s(from_x("_z") + p["b_z"])]
        c = phi(from_x("") + p["b"])
    else:
        gates = [gate("_z"), gate("_r")] if cell.startswith("gru") else [gate("_f")]
        r = gates[-1]
        if reset == "before":
            c = phi(from_x("") + from_h("", r * h) + p["b"])
        else:
            c = phi(from_x("") + p["b"] + r * (from_h("") + p["b_u"]))
    z = gates[0]
    return (((1 - z) * h + z * c) if blend == "write" else (z * h + (1 - z) * c),), gates


def oracle_weights(cell: Any) -> Weights:
    """A torch cell's parameters, block by block, under the names above."""
    found: Weights = {}
    for name, value in cell.named_parameters():
        array = value.detach().double().numpy()
        if name.endswith("_gates"):
            for gate, block in zip(cell.unit.gates, np.split(array, len(cell.unit.gates)), strict=True):
                found[f"{name[0]}_{gate}"] = block
        else:
            found[name] = array
    return found
