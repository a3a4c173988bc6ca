"""Every unit against its equations, its framework twin and its folding into the ONNX GRU op."""

import itertools
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from tests.training.oracle import oracle_step, oracle_weights
from training.cells import CANDIDATE_ACTIVATIONS, GATE_ACTIVATIONS, UNITS, Cell, make_cell
from training.errors import ConfigError

sizes = st.integers(1, 12)
RESETTING = [name for name, unit in UNITS.items() if unit.resets]


def conventions(name: str) -> list[dict[str, str | None]]:
    """Every combination of conventions that unit `name` has."""
    unit = UNITS[name]
    axes = (
        ("write", "keep") if unit.blends else (None,),
        ("before", "after") if unit.resets else (None,),
        tuple(GATE_ACTIVATIONS) if unit.gates else (None,),
        tuple(CANDIDATE_ACTIVATIONS),
    )
    keys = ("blend", "reset", "gate_activation", "candidate_activation")
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*axes)]


def random_cell(name: str, inputs: int, hidden: int, **chosen: str | None) -> Cell:
    """A float64 cell whose weights, biases too, are far from any special value."""
    torch.manual_seed(7)
    cell = make_cell(name, inputs, hidden, **chosen).double()
    for parameter in cell.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return cell


def random_state(cell: Cell, batch: int) -> tuple[torch.Tensor, ...]:
    """A state that no unit would call zero."""
    return tuple(torch.randn(batch, cell.hidden_size, dtype=torch.float64) for _ in cell.states)


@pytest.mark.parametrize("name", UNITS)
def test_step_is_the_papers_equations(name: str) -> None:
    """Eight steps of every combination of conventions equal the float64 oracle, gates included."""
    for chosen in conventions(name):
        cell = random_cell(name, 3, 4, **chosen)
        weights, state = oracle_weights(cell), random_state(cell, 2)
        expected = tuple(value.numpy() for value in state)
        for x in torch.randn(8, 2, 3, dtype=torch.float64):
            state, gates = cell(x, state)
            expected, expected_gates = oracle_step(name, weights, x.numpy(), expected, **chosen)  # type: ignore[arg-type]
            for found, wanted in zip(state, expected, strict=True):
                np.testing.assert_allclose(found.detach(), wanted, rtol=1e-12, atol=1e-12, err_msg=str(chosen))
            if gates:  # constant gates are not returned
                np.testing.assert_allclose(
                    torch.stack(gates).detach(), np.stack(expected_gates), rtol=1e-12, atol=1e-12
                )


@pytest.mark.parametrize("name", UNITS)
def test_gates_stay_between_zero_and_one(name: str) -> None:
    """Whatever the weights, a gate activation is in [0, 1]."""
    for gate in GATE_ACTIVATIONS if UNITS[name].gates else ():
        cell = random_cell(name, 3, 4, gate_activation=gate)
        _, gates = cell(100 * torch.randn(5, 3, dtype=torch.float64), random_state(cell, 5))
        assert len(gates) == len(cell.gates)
        assert all(((value >= 0) & (value <= 1)).all() for value in gates)


@pytest.mark.parametrize(("name", "chosen"), [("gru", {"blend": "keep", "reset": "after"}), ("lstm", {}), ("rnn", {})])
def test_unit_equals_the_frameworks_own(name: str, chosen: dict[str, str]) -> None:
    """`gru` (keep, after), `lstm` and `rnn` equal torch.nn's with copied weights."""
    cell = random_cell(name, 5, 6, **chosen)
    twin = {"gru": torch.nn.GRU, "lstm": torch.nn.LSTM, "rnn": torch.nn.RNN}[name](5, 6, batch_first=True).double()
    weights = {key: torch.from_numpy(value) for key, value in oracle_weights(cell).items()}
    # torch's blocks are r, z, n and i, f, g, o.
    blocks = {"gru": ("_r", "_z", ""), "lstm": ("_i", "_f", "", "_o"), "rnn": ("",)}[name]
    zero = torch.zeros(6, dtype=torch.float64)
    second = [weights["b_u"] if name == "gru" and block == "" else zero for block in blocks]
    with torch.no_grad():
        twin.weight_ih_l0.copy_(torch.cat([weights[f"w{block}"] for block in blocks]))
        twin.weight_hh_l0.copy_(torch.cat([weights[f"u{block}"] for block in blocks]))
        twin.bias_ih_l0.copy_(torch.cat([weights[f"b{block}"] for block in blocks]))
        twin.bias_hh_l0.copy_(torch.cat(second))
        x = torch.randn(3, 20, 5, dtype=torch.float64)
        expected, _ = twin(x)
        state = tuple(torch.zeros(3, 6, dtype=torch.float64) for _ in cell.states)
        for step in range(20):
            state, _ = cell(x[:, step], state)
            torch.testing.assert_close(state[0], expected[:, step], rtol=1e-12, atol=1e-12)


def gru_op(cell: Cell, batch: int, steps: int) -> onnxruntime.InferenceSession:
    """The cell folded into one ONNX GRU op (blocks z, r, h; blend keep)."""
    weights, hidden = oracle_weights(cell), cell.hidden_size
    z, r = ("_z", "_r") if cell.name.startswith("gru") else ("_f", "_f")
    sign = -1.0 if cell.blend == "write" else 1.0  # s(-v) = 1 - s(v) turns write into keep

    def stack(kind: str, *shape: int) -> np.ndarray[Any, Any]:
        absent = np.zeros(shape)
        blocks = (sign * weights.get(kind + z, absent), weights.get(kind + r, absent), weights.get(kind, absent))
        return np.concatenate(blocks)[None]

    u_bias = np.concatenate((np.zeros(2 * hidden), weights.get("b_u", np.zeros(hidden))))[None]
    initialisers = {
        "W": stack("w", hidden, cell.input_size),
        "R": stack("u", hidden, hidden),
        "B": np.concatenate((stack("b", hidden), u_bias), axis=1),
    }
    node = helper.make_node(
        "GRU",
        ["X", "W", "R", "B", "", "H"],
        ["", "Y"],
        hidden_size=hidden,
        linear_before_reset=int(cell.reset == "after"),
    )
    graph = helper.make_graph(
        [node],
        "folded",
        [
            helper.make_tensor_value_info("X", TensorProto.FLOAT, [steps, batch, cell.input_size]),
            helper.make_tensor_value_info("H", TensorProto.FLOAT, [1, batch, hidden]),
        ],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [1, batch, hidden])],
        [onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in initialisers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("reset", ["before", "after"])
@pytest.mark.parametrize("blend", ["write", "keep"])
@pytest.mark.parametrize("name", RESETTING)
def test_unit_equals_its_folding_into_the_onnx_gru_op(name: str, blend: str, reset: str) -> None:
    """Units gru to gru3 and mgu to mgu3 are what ONNX Runtime's GRU op computes with zeroed, tied or negated blocks."""
    cell = random_cell(name, 5, 6, blend=blend, reset=reset)
    x, state = torch.randn(10, 3, 5, dtype=torch.float64), random_state(cell, 3)
    feeds = {"X": x.float().numpy(), "H": state[0][None].float().numpy()}
    (expected,) = gru_op(cell, 3, 10).run(["Y"], feeds)
    for now in x:
        state, _ = cell(now, state)
    np.testing.assert_allclose(state[0].detach(), expected[0], rtol=1e-5, atol=1e-5)


FORMULAS = {  # the table of the models' specification; a = mn + n^2 + n
    "gru": lambda m, n, a: 3 * a,
    "gru1": lambda m, n, a: 3 * a - 2 * m * n,
    "gru2": lambda m, n, a: 3 * a - 2 * m * n - 2 * n,
    "gru3": lambda m, n, a: 3 * a - 2 * m * n - 2 * n * n,
    "mgu": lambda m, n, a: 2 * a,
    "mgu1": lambda m, n, a: 2 * a - m * n,
    "mgu2": lambda m, n, a: 2 * a - m * n - n,
    "mgu3": lambda m, n, a: 2 * a - m * n - n * n,
    "lstm": lambda m, n, a: 4 * a,
    "rnn": lambda m, n, a: a,
    "mingru": lambda m, n, a: 2 * (m * n + n),
}


@settings(deadline=None)
@given(st.sampled_from(list(UNITS)), sizes, sizes)
def test_parameters_are_counted_by_the_papers_formulas(name: str, m: int, n: int) -> None:
    """The formula and the tensors themselves agree; reset=after has n more."""
    expected = FORMULAS[name](m, n, m * n + n * n + n)
    assert sum(value.numel() for value in make_cell(name, m, n).parameters()) == expected
    if UNITS[name].resets:
        after = make_cell(name, m, n, reset="after")
        assert sum(value.numel() for value in after.parameters()) == expected + n


@pytest.mark.parametrize("name", UNITS)
def test_gradients_are_right(name: str) -> None:
    """Gradcheck in float64 over input, state and every weight, for both resets."""
    for reset in ("before", "after") if UNITS[name].resets else (None,):
        cell = random_cell(name, 2, 3, reset=reset)
        names = [key for key, _ in cell.named_parameters()]
        state = tuple(value.requires_grad_() for value in random_state(cell, 2))
        x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)

        def outputs(x: torch.Tensor, *rest: torch.Tensor, cell: Cell = cell, names: list[str] = names) -> Any:
            count = len(cell.states)
            state, weights = rest[:count], dict(zip(names, rest[count:], strict=True))
            return torch.func.functional_call(cell, weights, (x, state))[0]

        assert torch.autograd.gradcheck(outputs, (x, *state, *cell.parameters()))


@settings(deadline=None)
@given(st.sampled_from(list(UNITS)), sizes, sizes, sizes)
def test_any_size_steps(name: str, batch: int, m: int, n: int) -> None:
    """State goes in and comes out with the same shape, and a row's result does not depend on its neighbours."""
    cell = random_cell(name, m, n)
    x, state = torch.randn(batch, m, dtype=torch.float64), random_state(cell, batch)
    after, _ = cell(x, state)
    assert [value.shape for value in after] == [value.shape for value in state]
    alone, _ = cell(x[:1], tuple(value[:1] for value in state))
    torch.testing.assert_close(alone[0], after[0][:1])


@pytest.mark.parametrize(
    ("name", "chosen", "words"),
    [
        ("gur", {}, "unknown unit 'gur'"),
        ("gru", {"blend": "mix"}, "unknown blend 'mix'"),
        ("lstm", {"blend": "keep"}, "unit that has none"),
        ("mingru", {"reset": "after"}, "unit that has none"),
        ("gru", {"gate_activation": "tanh"}, "unknown gate activation 'tanh'"),
        ("rnn", {"candidate_activation": "swish"}, "unknown candidate activation 'swish'"),
    ],
)
def test_impossible_units_are_refused(name: str, chosen: dict[str, str], words: str) -> None:
    """The message names the bad value."""
    with pytest.raises(ConfigError, match=words):
        make_cell(name, 2, 3, **chosen)


def test_sizes_below_one_are_refused() -> None:
    """A unit needs an input and a state."""
    with pytest.raises(ConfigError, match="hidden 0"):
        make_cell("gru", 3, 0)


@pytest.mark.parametrize("name", UNITS)
def test_first_weights_are_as_described(name: str) -> None:
    """W is uniform by Glorot, every block of U orthogonal, and a bias is at most 1/sqrt(H)."""
    torch.manual_seed(1)
    cell = make_cell(name, 30, 40, **({"reset": "after"} if UNITS[name].resets else {}))
    for key, value in cell.named_parameters():
        found = value.detach()
        if value.dim() == 1:
            assert 0.8 / 40**0.5 < found.abs().max() <= 1 / 40**0.5, key
        elif key.startswith("u"):
            for block in found.split(40):
                torch.testing.assert_close(block @ block.T, torch.eye(40), rtol=0, atol=1e-5)
        else:
            bound = (6 / (len(found) + 30)) ** 0.5
            assert 0.95 * bound < found.abs().max() <= bound, key
            assert found.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
