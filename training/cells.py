"""The recurrent units, one step each: a table of which terms feed which gates, over four small classes.

Its one rule: state in, state out, nothing kept in `self` but weights. It must not know layers, heads or data.

With s the gate activation, phi the candidate activation and o the elementwise product (Wikipedia, "Gated recurrent
unit"; Cho 2014 arXiv:1406.1078v3 eqs. 5-8 and Chung 2014 arXiv:1412.3555v1 section 3.2 for `gru`; Dey & Salem 2017
arXiv:1701.05923v1 eqs. 4-9 for types 1 to 3; Zhou 2016 arXiv:1603.09420v1 and Heck & Salem 2017 arXiv:1701.03452v1
for the minimal units; Feng 2024 arXiv:2410.01201v1 for `mingru`):

    gate  g  = s(W_g x + U_g h + b_g)                      the table says which of the three terms a unit has
    candidate, reset before: c = phi(W x + U (r o h) + b)          (ONNX linear_before_reset=0)
               reset after:  c = phi(W x + b + r o (U h + b_u))    (cuDNN, PyTorch; b_u is n parameters more)
    blend write: h' = (1-z) o h + z o c        keep: h' = z o h + (1-z) o c
    mgu*: one gate f is both z and r           gru3, mgu3: the gates are s(b), constant once trained
    lstm: i, f, o gates; c' = f o c + i o phi(W x + U h + b); h' = o o phi(c')
    rnn:  h' = phi(W x + U h + b)              mingru: z = s(W_z x + b_z), c = W x + b; no U at all

A step is split in three so that a sequence pays once for what does not depend on time: `fuse` lays the weights side
by side (and folds constant gates away), `project` is the input's product for any number of rows, `step` the rest.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.errors import ConfigError

State = tuple[Tensor, ...]
Fused = dict[str, Tensor]
Activation = Callable[[Tensor], Tensor]

GATE_ACTIVATIONS: dict[str, Activation] = {"sigmoid": torch.sigmoid, "hardsigmoid": functional.hardsigmoid}
CANDIDATE_ACTIVATIONS: dict[str, Activation] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "identity": lambda value: value,
    "hardtanh": functional.hardtanh,
    "softsign": functional.softsign,
}
BLENDS = ("write", "keep")
RESETS = ("before", "after")


def pick(what: str, name: str | None, allowed: tuple[str, ...], default: str | None) -> str | None:
    """`name`, or the unit's own `default` where none is given; `default` None means that the unit has no such thing."""
    if name is None:
        return default
    if default is None:
        raise ConfigError(f"{what} {name!r} was given to a unit that has none: leave it out")
    if name not in allowed:
        raise ConfigError(f"unknown {what} {name!r}: choose one of {', '.join(allowed)}")
    return name


class Cell(nn.Module):
    """The weights of one unit of the table and its resolved conventions; subclasses are the equations.

    Weights are [rows, columns] as in the papers: w_gates [G H, I], u_gates [G H, H], b_gates [G H], w [H, I],
    u [H, H], b [H], b_u [H]; a term that the unit does not have is None. G is the number of gates.
    """

    states: tuple[str, ...] = ("h",)

    def __init__(
        self,
        name: str,
        input_size: int,
        hidden_size: int,
        *,
        blend: str | None = None,
        reset: str | None = None,
        gate_activation: str | None = None,
        candidate_activation: str | None = None,
    ) -> None:
        super().__init__()
        if input_size < 1 or hidden_size < 1:
            raise ConfigError(f"sizes must be at least 1, not input {input_size} and hidden {hidden_size}")
        self.name, self.unit = name, UNITS[name]
        self.input_size, self.hidden_size = input_size, hidden_size
        unit = self.unit
        self.blend = pick("blend", blend, BLENDS, "write" if unit.blends else None)
        self.reset = pick("reset", reset, RESETS, "before" if unit.resets else None)
        gate = "sigmoid" if unit.gates else None
        self.gate_activation = pick("gate activation", gate_activation, tuple(GATE_ACTIVATIONS), gate)
        candidate = pick(
            "candidate activation", candidate_activation, tuple(CANDIDATE_ACTIVATIONS), unit.candidate_activation
        )
        self.candidate_activation = str(candidate)
        rows = len(unit.gates) * hidden_size

        def weight(present: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(*shape)) if present else None

        self.w_gates = weight("x" in unit.gate_terms, rows, input_size)
        self.u_gates = weight("h" in unit.gate_terms, rows, hidden_size)
        self.b_gates = weight("b" in unit.gate_terms, rows)
        self.w = nn.Parameter(torch.empty(hidden_size, input_size))
        self.u = weight("h" in unit.candidate_terms, hidden_size, hidden_size)
        self.b = nn.Parameter(torch.empty(hidden_size))
        self.b_u = weight(self.reset == "after", hidden_size)
        self._initialise()

    def _initialise(self) -> None:
        """W uniform by Glorot, every H x H block orthogonal, biases within +-1/sqrt(H) as in PyTorch."""
        for name, parameter in self.named_parameters():
            if name.startswith("u"):
                for block in parameter.data.chunk(len(parameter) // self.hidden_size):
                    nn.init.orthogonal_(block)
            elif parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.uniform_(parameter, -1 / math.sqrt(self.hidden_size), 1 / math.sqrt(self.hidden_size))

    @property
    def gates(self) -> tuple[str, ...]:
        """Names of the gate activations that `step` returns; none where they are constant."""
        return () if self.unit.gate_terms == "b" else self.unit.gates

    def s(self, value: Tensor) -> Tensor:
        """The gate activation: any map into [0, 1]."""
        return GATE_ACTIVATIONS[str(self.gate_activation)](value)

    def phi(self, value: Tensor) -> Tensor:
        """The candidate activation."""
        return CANDIDATE_ACTIVATIONS[self.candidate_activation](value)

    def mix(self, z: Tensor, h: Tensor, c: Tensor) -> Tensor:
        """The blend of old state and candidate, in its three-node form."""
        return h + z * (c - h) if self.blend == "write" else c + z * (h - c)

    def fuse(self) -> Fused:
        """The weights as `project` and `step` read them: blocks side by side, transposed to [in, out]."""
        if self.w_gates is None or self.b_gates is None:
            fused = {"w": self.w.T, "b": self.b}
        else:
            fused = {"w": torch.cat((self.w_gates, self.w)).T, "b": torch.cat((self.b_gates, self.b))}
        if self.u is not None:
            fused["u"] = self.u.T
        return fused

    def project(self, fused: Fused, x: Tensor) -> Tensor:
        """The part of a step that needs no state: x [rows, I] -> [rows, blocks H], for any number of rows."""
        return torch.addmm(fused["b"], x, fused["w"])

    def step(self, fused: Fused, projected: Tensor, state: State) -> tuple[State, State]:
        """One step: (`project`'s rows [B, blocks H], state [B, H] each) -> (next state, gate activations [B, H])."""
        raise NotImplementedError

    def forward(self, x: Tensor, state: State) -> tuple[State, State]:
        """One whole step from raw weights: x [B, I] -> (next state, gate activations)."""
        fused = self.fuse()
        return self.step(fused, self.project(fused, x), state)


class GatedCell(Cell):
    """`gru` to `gru3` (gates z, r) and `mgu` to `mgu3` (one gate f for both)."""

    u: nn.Parameter
    u_gates: nn.Parameter  # absent where the gates are constant, and then not read

    def fuse(self) -> Fused:
        """Constant gates are evaluated and r is folded into U, so that such a step is one H x H product.

        Where x feeds the gates their bias is in its product; otherwise it goes with h's. With reset after, all
        recurrent products are of h itself: they are one.
        """
        if self.unit.gate_terms == "b" and self.b_gates is not None:
            gates = self.s(self.b_gates).chunk(len(self.unit.gates))
            z, r = gates[0], gates[-1]
            u = self.u * r if self.reset == "before" else self.u * r[:, None]
            b = self.b if self.b_u is None else self.b + r * self.b_u
            return {"w": self.w.T, "b": b, "u": u.T, "z": z}
        fused = super().fuse()
        bias: Tensor | None = self.b_gates if self.w_gates is None else None
        if self.b_u is not None:
            bias = self.u_gates.new_zeros(len(self.u_gates)) if bias is None else bias
            return fused | {"u": torch.cat((self.u_gates, self.u)).T, "b_u": torch.cat((bias, self.b_u))}
        fused["u_gates"] = self.u_gates.T
        return fused if bias is None else fused | {"b_gates": bias}

    def step(self, fused: Fused, projected: Tensor, state: State) -> tuple[State, State]:
        """Module docstring, `gate`, `candidate` and `blend`."""
        (h,) = state
        if "z" in fused:
            c = self.phi(torch.addmm(projected, h, fused["u"]))
            return (self.mix(fused["z"], h, c),), ()
        blocks = (len(self.unit.gates) * self.hidden_size, self.hidden_size)
        from_x: Tensor | None = None
        if self.w_gates is not None:
            from_x, projected = projected.split_with_sizes(blocks, dim=-1)
        if "b_u" in fused:
            from_h, recurrent = torch.addmm(fused["b_u"], h, fused["u"]).split_with_sizes(blocks, dim=-1)
            gates = self._gates(from_h if from_x is None else from_x + from_h)
            c = self.phi(projected + gates[-1] * recurrent)
        else:
            bias = fused.get("b_gates") if from_x is None else from_x
            gates = self._gates(h @ fused["u_gates"] if bias is None else torch.addmm(bias, h, fused["u_gates"]))
            c = self.phi(torch.addmm(projected, gates[-1] * h, fused["u"]))
        return (self.mix(gates[0], h, c),), gates

    def _gates(self, value: Tensor) -> State:
        """(z, r) or (f,): one activation over the fused blocks, then the split."""
        value = self.s(value)
        return (value,) if len(self.unit.gates) == 1 else value.chunk(len(self.unit.gates), dim=-1)


class LstmCell(Cell):
    """`lstm` without peepholes (Chung 2014 section 3.1, without V; the blocks are i, f, o and the candidate)."""

    states = ("h", "c")
    u: nn.Parameter
    u_gates: nn.Parameter

    def fuse(self) -> Fused:
        """Gates and candidate are products of h itself: one."""
        return super().fuse() | {"u": torch.cat((self.u_gates, self.u)).T}

    def step(self, fused: Fused, projected: Tensor, state: State) -> tuple[State, State]:
        """Module docstring, `lstm`."""
        h, c = state
        value = torch.addmm(projected, h, fused["u"])
        gates, candidate = value.split_with_sizes((3 * self.hidden_size, self.hidden_size), dim=-1)
        i, f, o = self.s(gates).chunk(3, dim=-1)
        c = f * c + i * self.phi(candidate)
        return (o * self.phi(c), c), (i, f, o)


class RnnCell(Cell):
    """`rnn`: the unit without gates that the others are compared with."""

    def step(self, fused: Fused, projected: Tensor, state: State) -> tuple[State, State]:
        """Module docstring, `rnn`."""
        return (self.phi(torch.addmm(projected, state[0], fused["u"])),), ()


class MinGruCell(Cell):
    """`mingru`: gate and candidate see the input only, so the state is a linear recurrence."""

    def step(self, fused: Fused, projected: Tensor, state: State) -> tuple[State, State]:
        """Module docstring, `mingru`."""
        gate, candidate = projected.chunk(2, dim=-1)
        z = self.s(gate)
        return (self.mix(z, state[0], self.phi(candidate)),), (z,)


@dataclass(frozen=True)
class Unit:
    """A row of the table: terms are letters of x (W x), h (U h) and b (b)."""

    family: type[Cell]
    title: str
    gates: tuple[str, ...]
    gate_terms: str
    candidate_terms: str = "xhb"
    candidate_activation: str = "tanh"
    blends: bool = True
    resets: bool = True


UNITS: dict[str, Unit] = {
    "gru": Unit(GatedCell, "fully gated unit", ("z", "r"), "xhb"),
    "gru1": Unit(GatedCell, "GRU type 1", ("z", "r"), "hb"),
    "gru2": Unit(GatedCell, "GRU type 2", ("z", "r"), "h"),
    "gru3": Unit(GatedCell, "GRU type 3", ("z", "r"), "b"),
    "mgu": Unit(GatedCell, "minimal gated unit", ("f",), "xhb"),
    "mgu1": Unit(GatedCell, "minimal gated unit 1", ("f",), "hb"),
    "mgu2": Unit(GatedCell, "minimal gated unit 2", ("f",), "h"),
    "mgu3": Unit(GatedCell, "minimal gated unit 3", ("f",), "b"),
    "lstm": Unit(LstmCell, "long short-term memory", ("i", "f", "o"), "xhb", blends=False, resets=False),
    "rnn": Unit(RnnCell, "tanh unit", (), "", blends=False, resets=False),
    "mingru": Unit(MinGruCell, "minGRU", ("z",), "xb", "xb", "identity", resets=False),
}


def make_cell(name: str, input_size: int, hidden_size: int, **conventions: str | None) -> Cell:
    """The unit called `name`; conventions (blend, reset, gate_activation, candidate_activation) default to its paper's.

    Raises ConfigError for an unknown name or a convention that the unit does not have.
    """
    if name not in UNITS:
        raise ConfigError(f"unknown unit {name!r}: choose one of {', '.join(UNITS)}")
    return UNITS[name].family(name, input_size, hidden_size, **conventions)
