"""The whole model: sequence against steps, heads, normalisation, layers, learned initial state."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.cells import UNITS
from training.config import HEADS, ModelConfig
from training.errors import ConfigError
from training.model import RecurrentModel


def make(cell: str = "gru", head: str = "gaussian", **settings: object) -> RecurrentModel:
    """A small model with a normalisation that is not the identity, in evaluation mode."""
    torch.manual_seed(3)
    model = RecurrentModel(ModelConfig(cell, 4, 3, head, hidden=5, standardise=True, **settings))  # type: ignore[arg-type]
    model.x_mean, model.x_std = torch.tensor([1.0, -2, 3, 0]), torch.tensor([2.0, 1, 0.5, 3])
    model.y_mean, model.y_std = torch.tensor([10.0, 20, 30]), torch.tensor([1.0, 2, 3])
    return model.eval()


def unrolled(model: RecurrentModel, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """`forward` by hand: one step after the other."""
    state, raws = model.init_state(len(x)), []
    for now in x.unbind(1):
        raw, _, state = model.step(now, state)
        raws.append(raw)
    return torch.stack(raws, dim=1), state


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(list(UNITS)), st.integers(1, 3), st.integers(1, 6), st.integers(1, 12), st.booleans())
def test_a_sequence_is_its_steps_unrolled(cell: str, layers: int, batch: int, steps: int, learned: bool) -> None:
    """Values and final states agree for every unit, depth and size, also from a learned initial state."""
    model = make(cell, layers=layers, learned_initial_state=learned).double()
    for value in model.initial:
        torch.nn.init.normal_(value)
    x = torch.randn(batch, steps, 4, dtype=torch.float64)
    raw, state = model(x)
    expected, expected_state = unrolled(model, x)
    torch.testing.assert_close(raw, expected)
    torch.testing.assert_close(state, expected_state)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("settings", [{"skip": True}, {"layers": 2}], ids=["skip", "layers"])
def test_the_predicted_steps_alone_are_those_of_the_whole(head: str, settings: dict[str, object]) -> None:
    """Head values, losses and every gradient, where the steps that are asked for stand anywhere in the rows."""
    model, x = make(head=head, **settings).double(), torch.randn(3, 7, 4, dtype=torch.float64)
    target = torch.randint(3, (3, 7)) if head == "categorical" else torch.rand(3, 7, 3, dtype=torch.float64)
    predicted = torch.rand(3, 7) < 0.4
    found = []
    for raw, losses in (
        ((whole := model(x)[0])[predicted], model.loss(whole, target)[predicted]),
        ((asked := model(x, predicted=predicted)[0]), model.loss(asked, target[predicted])),
    ):
        model.zero_grad()
        losses.sum().backward()
        found.append([raw, losses, *(value.grad for value in model.parameters())])
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("cell", UNITS)
def test_a_sequence_may_be_cut_anywhere(cell: str) -> None:
    """Feeding the state of the first part to the second gives the whole: nothing is hidden in the model."""
    model, x = make(cell, layers=2), torch.randn(2, 9, 4)
    whole, end = model(x)
    first, middle = model(x[:, :4])
    second, last = model(x[:, 4:], middle)
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole)
    torch.testing.assert_close(last, end)


def test_stacked_layers_are_their_cells_in_order() -> None:
    """Layer two reads layer one's h; states are named h1 and h2."""
    model = make(layers=2)
    first, second = model.layers
    x, state = torch.randn(3, 4), model.init_state(3)
    (below,), _ = first((x - model.x_mean) / model.x_std, state[:1])
    (above,), _ = second(below, state[1:])
    raw, gates, after = model.step(x, state)
    assert model.state_names == ["h1", "h2"]
    assert model.gate_names == ["z1", "r1", "z2", "r2"]
    assert len(gates) == 4
    torch.testing.assert_close(after, (below, above))
    torch.testing.assert_close(raw, model.head(above))


def test_dropout_is_between_layers_and_only_in_training() -> None:
    """Two training passes differ with two layers, not with one; evaluation never does."""
    x = torch.randn(2, 6, 4)
    deep, flat = make(layers=2, dropout=0.5), make(layers=1, dropout=0.5)
    torch.testing.assert_close(deep(x)[0], deep(x)[0])
    assert not torch.equal(deep.train()(x)[0], deep(x)[0])
    assert torch.equal(flat.train()(x)[0], flat(x)[0])


@pytest.mark.parametrize("name", ["input_dropout", "head_dropout", "recurrent_dropout"])
@pytest.mark.parametrize("cell", ["gru", "gru3", "mgu2", "lstm"])
def test_dropouts_are_of_training_alone(name: str, cell: str) -> None:
    """Off, they draw nothing and change no bit; on, two training passes differ and evaluation is as without."""
    x, plain, dropping = torch.randn(2, 6, 4), make(cell), make(cell, **{name: 0.5})
    expected, before = plain(x)[0], torch.get_rng_state()
    assert torch.equal(plain.train()(x)[0], expected)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(dropping(x)[0], expected)
    dropping.train()
    assert not torch.equal(dropping(x)[0], dropping(x)[0])
    assert torch.equal(dropping.eval()(x)[0], expected)


def test_a_sequence_drops_the_same_units_at_all_steps() -> None:
    """The head sees zeros or twice the values, in the same places from the first step to the last; rows differ."""
    model = make(head_dropout=0.5).train()
    kept = model._drop_features(torch.ones(7, 16, 5), 0.5)
    assert {*kept.unique().tolist()} == {0.0, 2.0}
    assert torch.equal(kept, kept[:1].expand_as(kept))
    assert len(kept[0].unique(dim=0)) > 1


def test_weights_that_are_dropped_get_no_gradient() -> None:
    """Of U about half is missing in a pass, in the values and in the gradients; W and biases are all there."""
    model = make(recurrent_dropout=0.5).train()
    model(torch.randn(3, 6, 4))[0].sum().backward()
    (cell,) = model.layers
    for weight in (cell.u, cell.u_gates):
        assert weight is not None
        assert weight.grad is not None
        assert 0.2 < (weight.grad == 0).float().mean() < 0.8
    assert cell.w.grad is not None
    assert (cell.w.grad != 0).all()


@pytest.mark.parametrize("head", HEADS)
def test_a_skip_adds_the_inputs_own_product(head: str) -> None:
    """The head values are those without it plus V times the encoded input, over sequences as over steps."""
    model, x = make(head=head, skip=True), torch.randn(2, 6, 4)
    torch.testing.assert_close(model(x)[0], unrolled(model, x)[0])
    assert model.skip is not None
    found, v = model(x)[0], model.skip.weight.detach().clone()
    torch.nn.init.zeros_(model.skip.weight)
    torch.testing.assert_close(found, model(x)[0] + (x - model.x_mean) / model.x_std @ v.T)


def test_a_learned_initial_state_is_trained() -> None:
    """Every state, the LSTM's c too, gets a gradient; without it the state is zero."""
    model = make("lstm", learned_initial_state=True)
    raw, _ = model(torch.randn(2, 3, 4))
    raw.sum().backward()
    assert len(model.initial) == 2
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in model.initial)
    assert not any(value.any() for value in make("lstm").init_state(2))


@pytest.mark.parametrize("head", HEADS)
def test_predictions_are_in_the_clients_units(head: str) -> None:
    """Probabilities lie in [0, 1] (categorical: and sum to one); values are denormalised; a spread is positive."""
    model = make(head=head)
    raw = 5 * torch.randn(7, model.head.out_features)
    y, *spread = model.predict(raw)
    if head in ("bernoulli", "categorical"):
        assert ((y >= 0) & (y <= 1)).all()
    if head == "categorical":
        torch.testing.assert_close(y.sum(-1), torch.ones(7))
    if head in ("gaussian", "regression"):
        torch.testing.assert_close(y, raw[:, :3] * torch.tensor([1.0, 2, 3]) + torch.tensor([10.0, 20, 30]))
    assert len(spread) == (head == "gaussian")
    assert all((value > 0).all() for value in spread)


@pytest.mark.parametrize("head", ["gaussian", "regression"])
def test_a_residual_head_of_zeros_says_as_now(head: str) -> None:
    """Outputs are the named inputs, in the data's units; the spread is the usual change."""
    model = make(head=head, residual=(3, 0, 2))
    columns, change = [3, 0, 2], torch.tensor([0.5, 0.25, 2.0])
    model.change = change
    model.x_mean[columns], model.x_std[columns] = model.y_mean, model.y_std
    x = torch.randn(2, 6, 4)
    torch.testing.assert_close(model(x)[0], unrolled(model, x)[0])
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
    y, *spread = model.predict(model(x)[0])
    torch.testing.assert_close(y, x[..., columns])
    if spread:
        torch.testing.assert_close(spread[0], ((change + 1e-3) * model.y_std).expand_as(y))


def test_a_residual_needs_a_column_for_every_output() -> None:
    """Two columns for three outputs, or inputs that are not standardised."""
    with pytest.raises(ConfigError, match=r"residual must be an input column for each of 3 outputs, not \(0, 1\)"):
        make(residual=(0, 1))
    with pytest.raises(ConfigError, match="residual must be an input column"):
        ModelConfig("gru", 4, 3, "gaussian", residual=(0, 1, 2))


def test_losses_are_the_negative_log_likelihoods_by_hand() -> None:
    """Bernoulli, categorical and Gaussian losses in nats against NumPy; regression is the squared standard error."""
    rng = np.random.default_rng(0)
    raw, notes = rng.normal(size=(2, 5, 3)), rng.integers(0, 2, size=(2, 5, 3)).astype(float)
    p = 1 / (1 + np.exp(-raw))
    expected = -(notes * np.log(p) + (1 - notes) * np.log(1 - p)).sum(-1)
    found = make(head="bernoulli").loss(torch.tensor(raw), torch.tensor(notes))
    np.testing.assert_allclose(found, expected, rtol=1e-9)

    ids = rng.integers(0, 3, size=(2, 5))
    logs = raw - np.log(np.exp(raw).sum(-1, keepdims=True))
    found = make(head="categorical").loss(torch.tensor(raw), torch.tensor(ids))
    np.testing.assert_allclose(found, -np.take_along_axis(logs, ids[..., None], -1)[..., 0], rtol=1e-9)

    values = rng.normal(size=(2, 5, 3)) * [1, 2, 3] + [10, 20, 30]
    standard, std = (values - [10, 20, 30]) / [1, 2, 3], np.exp(raw) + 1e-3
    expected = (0.5 * ((standard - raw) / std) ** 2 + np.log(std) + 0.5 * np.log(2 * np.pi)).sum(-1)
    found = make().loss(torch.tensor(np.concatenate((raw, raw), -1)), torch.tensor(values))
    np.testing.assert_allclose(found, expected, rtol=1e-6)

    found = make(head="regression").loss(torch.tensor(raw), torch.tensor(values))
    np.testing.assert_allclose(found, ((standard - raw) ** 2).mean(-1), rtol=1e-6)


def test_the_loss_of_a_mixture_is_that_of_the_weighted_densities() -> None:
    """Three Gaussians over three outputs, the densities added up in NumPy."""
    rng = np.random.default_rng(1)
    logits, mean, spread = rng.normal(size=(2, 5, 3)), *rng.normal(size=(2, 2, 5, 3, 3))
    values = rng.normal(size=(2, 5, 3)) * [1, 2, 3] + [10, 20, 30]
    standard, std = ((values - [10, 20, 30]) / [1, 2, 3])[..., None, :], np.exp(spread) + 1e-3
    densities = np.exp(-0.5 * ((standard - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log((weights * densities.prod(-1)).sum(-1))
    raw = torch.tensor(np.concatenate((logits, mean.reshape(2, 5, 9), spread.reshape(2, 5, 9)), -1))
    model = make(components=3)
    assert raw.shape[-1] == model.head.out_features
    np.testing.assert_allclose(model.loss(raw, torch.tensor(values)), expected, rtol=1e-6)


def test_of_a_mixture_mean_and_deviation_are_given() -> None:
    """Those of two well-known Gaussians: weights 1/4 and 3/4 at -1 and 1, deviations 1/2; in the data's units."""
    model = RecurrentModel(ModelConfig("gru", 4, 1, "gaussian", hidden=5, components=2))
    model.y_mean, model.y_std = torch.tensor([10.0]), torch.tensor([2.0])
    deviation = float(np.log(0.5 - 1e-3))
    mean, std = model.predict(torch.tensor([[0.0, float(np.log(3)), -1, 1, deviation, deviation]]))
    torch.testing.assert_close(mean, torch.tensor([[10 + 2 * 0.5]]))
    torch.testing.assert_close(std, torch.tensor([[2 * (0.25 + 0.75) ** 0.5]]))


def test_ids_are_embedded() -> None:
    """An int64 input of no features is a row of the embedding."""
    model = RecurrentModel(ModelConfig("gru", 4, 9, "categorical", hidden=5, vocabulary=9)).eval()
    ids = torch.tensor([[3, 8, 0]])
    assert model.embedding is not None
    torch.testing.assert_close(model.encode(ids), model.embedding.weight[ids])
    raw, _ = model(ids)
    torch.testing.assert_close(raw, unrolled(model, ids)[0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"head": "softmax"}, "unknown head 'softmax'"),
        ({"hidden": 0}, "hidden must be at least 1, not 0"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"vocabulary": 1}, "vocabulary must be at least 2"),
        ({"components": 2}, "components are those of a gaussian head without residual: they must be 1, not 2"),
    ],
)
def test_impossible_models_are_refused(settings: dict[str, object], words: str) -> None:
    """The message names the bad value."""
    with pytest.raises(ConfigError, match=words):
        ModelConfig(**({"cell": "gru", "input_size": 3, "output_size": 3, "head": "bernoulli"} | settings))  # type: ignore[arg-type]


def test_a_share_is_what_is_dropped() -> None:
    """Not what is kept: a fifth, between layers, of features and of U."""
    torch.manual_seed(0)
    model = RecurrentModel(
        ModelConfig("gru", 40, 3, "regression", hidden=40, layers=2, dropout=0.2, recurrent_dropout=0.2)
    ).train()
    ones = torch.ones(2, 100, 40)
    u = model._drop_recurrence(model.layers[0]).u
    assert u is not None
    for dropped in (model._drop_features(ones, 0.2), model.dropout(ones), u):
        assert (dropped == 0).float().mean().item() == pytest.approx(0.2, abs=0.05)
