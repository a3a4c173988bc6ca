"""A whole model: normalise, embed or pass on, stacked cells, head.

Its one rule: `forward` over a sequence is the same function as `step` unrolled. It must not know data sets,
optimisers or files.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from training import kernels
from training.cells import Cell, Fused, State, make_cell
from training.config import ModelConfig

# Keeps a Gaussian's density finite when a target is predicted exactly (in units of the target's own deviation).
SMALLEST_STD = 1e-3


def positive(raw: Tensor) -> Tensor:
    """A standard deviation from any number.

    By exp, because ONNX Runtime's Elu and Softplus round a row differently in different batches and Exp does not.
    """
    return torch.exp(raw) + SMALLEST_STD


def _bernoulli(raw: Tensor, target: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(raw, target, reduction="none").sum(-1)


def _categorical(raw: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(raw.movedim(-1, 1), target, reduction="none")


def _gaussian(raw: Tensor, target: Tensor) -> Tensor:
    mean, spread = raw.chunk(2, dim=-1)
    return functional.gaussian_nll_loss(mean, target, positive(spread).square(), full=True, reduction="none").sum(-1)


def _split_mixture(raw: Tensor, components: int) -> tuple[Tensor, Tensor, Tensor]:
    """Head values -> the logit [..., M], mean and deviation [..., M, O] of each component."""
    logits, values = raw.split_with_sizes((components, raw.shape[-1] - components), dim=-1)
    mean, spread = values.reshape(*values.shape[:-1], 2, components, -1).unbind(-3)
    return logits, mean, positive(spread)


def _mixture(raw: Tensor, target: Tensor, components: int) -> Tensor:
    """Bishop 1994 (NCRG/94/004) eq. 23 and 29, with a deviation for each output."""
    logits, mean, std = _split_mixture(raw, components)
    target = target.unsqueeze(-2).expand_as(mean)
    each = functional.gaussian_nll_loss(mean, target, std.square(), full=True, reduction="none").sum(-1)
    return -torch.logsumexp(logits.log_softmax(-1) - each, dim=-1)


def _regression(raw: Tensor, target: Tensor) -> Tensor:
    return functional.mse_loss(raw, target, reduction="none").mean(-1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bernoulli": _bernoulli,
    "categorical": _categorical,
    "gaussian": _gaussian,
    "regression": _regression,
}


def count(module: nn.Module) -> int:
    """How many numbers of it are trained."""
    return sum(value.numel() for value in module.parameters())


def head_size(config: ModelConfig) -> int:
    """R, how many values a head gives: a gaussian one a mean and a spread of each output, for each component."""
    if config.head != "gaussian":
        return config.output_size
    values = 2 * config.output_size
    return values if config.components == 1 else config.components * (1 + values)


class RecurrentModel(nn.Module):
    """x [B, T, I] float32 (or [B, T] int64 ids) and a state -> head values [B, T, R] and the next state.

    A state is a flat tuple of [B, H] tensors, layer by layer (an LSTM has h and c for each).
    """

    x_mean: Tensor
    x_std: Tensor
    y_mean: Tensor
    y_std: Tensor
    change: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        conventions = {
            name: getattr(config, name) for name in ("blend", "reset", "gate_activation", "candidate_activation")
        }
        sizes = [config.input_size] + [config.hidden] * (config.layers - 1)
        self.cells = nn.ModuleList(make_cell(config.cell, size, config.hidden, **conventions) for size in sizes)
        self.embedding = None if config.vocabulary is None else nn.Embedding(config.vocabulary, config.input_size)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.hidden, head_size(config))
        self.skip = nn.Linear(config.input_size, head_size(config), bias=False) if config.skip else None
        self.initial = nn.ParameterList(
            nn.Parameter(torch.zeros(config.hidden)) for _ in self.state_names if config.learned_initial_state
        )
        for side, size in (("x", config.input_size), ("y", config.output_size)):
            self.register_buffer(f"{side}_mean", torch.zeros(size))
            self.register_buffer(f"{side}_std", torch.ones(size))
        if config.residual:
            self.register_buffer("change", torch.ones(config.output_size))

    @property
    def layers(self) -> list[Cell]:
        """The cells, first to last (a ModuleList forgets their type)."""
        return list(cast("Iterable[Cell]", self.cells))

    def _named(self, parts: str) -> list[str]:
        """Names of a cell's `states` or `gates` over all layers; numbered only when there are several layers."""
        return [
            f"{name}{layer}" if len(self.cells) > 1 else name
            for layer, cell in enumerate(self.layers, start=1)
            for name in getattr(cell, parts)
        ]

    @property
    def state_names(self) -> list[str]:
        """The names h (and c), or h1, h2, ... when stacked."""
        return self._named("states")

    @property
    def gate_names(self) -> list[str]:
        """The gate activations that `step` returns, in order."""
        return self._named("gates")

    def init_state(self, batch: int) -> State:
        """The state before the first step, [batch, H] each: zeros, or the learned h_0."""
        if len(self.initial) > 0:
            return tuple(value.expand(batch, -1) for value in self.initial)
        return tuple(self.head.weight.new_zeros(batch, self.config.hidden) for _ in self.state_names)

    def fuse(self) -> list[Fused]:
        """The weights of every layer as its cell's `step` reads them."""
        return [cell.fuse() for cell in self.layers]

    def encode(self, x: Tensor) -> Tensor:
        """Raw values [..., I] (or ids [...]) -> what the first cell sees [..., I]."""
        if self.embedding is not None:
            return functional.embedding(x, self.embedding.weight)
        return (x - self.x_mean) / self.x_std if self.config.standardise else x

    def decode(self, value: Tensor, encoded: Tensor) -> Tensor:
        """The last layer's h [..., H] and what the first cell saw [..., I] -> head values [..., R].

        With `residual` the head gives changes in units of the usual change, so that a head of zeros says "as now".
        """
        raw: Tensor = self.head(value)
        if self.skip is not None:
            raw = raw + self.skip(encoded)
        if not self.config.residual:
            return raw
        last = encoded[..., self.config.residual]
        if self.config.head == "regression":
            return last + raw * self.change
        change, spread = raw.chunk(2, dim=-1)
        return torch.cat((last + change * self.change, spread + self.change.log()), dim=-1)

    def _drop_features(self, value: Tensor, share: float) -> Tensor:
        """In training [T, B, F] without a `share` of the features, the same ones at all steps of a sequence."""
        if not (self.training and share):
            return value
        return value * functional.dropout(torch.ones_like(value[:1]), share)

    def _drop_recurrence(self, cell: Cell) -> Cell:
        """In training the cell without some of U: its own weights, and what is left of those beside them."""
        share = self.config.recurrent_dropout
        if not (self.training and share):
            return cell
        dropped, left = copy.copy(cell), dict[str, Any](cell._parameters)
        left |= {name: functional.dropout(value, share) for name, value in left.items() if name in ("u", "u_gates")}
        dropped._parameters = left
        return dropped

    def forward(self, x: Tensor, state: State | None = None, predicted: Tensor | None = None) -> tuple[Tensor, State]:
        """A whole sequence, layer by layer; with `predicted` [B, T] the head values of its N steps alone, [N, R]."""
        config, encoded = self.config, self.encode(x.transpose(0, 1))
        value = self._drop_features(encoded, config.input_dropout)
        state = self.init_state(len(x)) if state is None else state
        after: list[Tensor] = []
        width = len(state) // len(self.cells)
        for layer, cell in enumerate(self.layers):
            value, last = kernels.run(self._drop_recurrence(cell), value, state[layer * width : (layer + 1) * width])
            after.extend(last)
            if layer + 1 < len(self.cells):
                value = self.dropout(value)
        value = self._drop_features(value, config.head_dropout)
        if predicted is None:
            return self.decode(value.transpose(0, 1), encoded.transpose(0, 1)), tuple(after)
        row, step = predicted.nonzero(as_tuple=True)
        return self.decode(value[step, row], encoded[step, row]), tuple(after)

    def step(self, x: Tensor, state: State, fused: list[Fused] | None = None) -> tuple[Tensor, list[Tensor], State]:
        """One step in evaluation: x [B, I] -> (head values [B, R], gate activations, next state)."""
        value = encoded = self.encode(x)
        gates: list[Tensor] = []
        after: list[Tensor] = []
        width = len(state) // len(self.cells)
        for layer, (cell, weights) in enumerate(zip(self.layers, fused or self.fuse(), strict=True)):
            current = state[layer * width : (layer + 1) * width]
            current, opened = cell.step(weights, cell.project(weights, value), current)
            value = current[0]
            gates.extend(opened)
            after.extend(current)
        return self.decode(value, encoded), gates, tuple(after)

    def predict(self, raw: Tensor) -> tuple[Tensor, ...]:
        """Head values -> what a client gets: probabilities, or values in the data's units.

        Of a gaussian head mean and deviation, those of the whole mixture where it has components.
        """
        if self.config.head == "bernoulli":
            return (torch.sigmoid(raw),)
        if self.config.head == "categorical":
            return (torch.softmax(raw, dim=-1),)
        if self.config.head == "regression":
            return (raw * self.y_std + self.y_mean,)
        if self.config.components == 1:
            mean, spread = raw.chunk(2, dim=-1)
            std = positive(spread)
        else:
            logits, means, stds = _split_mixture(raw, self.config.components)
            weights = logits.softmax(-1).unsqueeze(-1)
            mean = (weights * means).sum(-2)
            std = (weights * (stds.square() + (means - mean.unsqueeze(-2)).square())).sum(-2).sqrt()
        return (mean * self.y_std + self.y_mean, std * self.y_std)

    def loss(self, raw: Tensor, target: Tensor) -> Tensor:
        """[B, T], or [N], from head values [..., R] and targets [..., O] (categorical: ids).

        Nats for the first three heads (gaussian: of the standardised target), mean squared standardised error for
        regression. Nothing here knows which steps are padding: the caller asks for the predicted ones.
        """
        if self.config.head in ("gaussian", "regression"):
            target = (target - self.y_mean) / self.y_std
        if self.config.components > 1:
            return _mixture(raw, target, self.config.components)
        return LOSSES[self.config.head](raw, target)
