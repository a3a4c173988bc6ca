"""The units over whole sequences against their own steps unrolled: values, gradients, loops of both kinds, fallback."""

import logging
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.training.test_cells import conventions, random_cell, random_state
from training import kernels, loops, native
from training.cells import CANDIDATE_ACTIVATIONS, GATE_ACTIVATIONS, UNITS, Cell, State
from training.errors import ConfigError
from training.loops import ACTIVATIONS

LOOPS = [
    loops,
    pytest.param(native, marks=pytest.mark.skipif(native.library() is None, reason="native.cpp cannot be compiled")),
]
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
both = pytest.mark.parametrize("by", LOOPS, ids=lambda module: module.__name__)
units = pytest.mark.parametrize("name", UNITS)


def unrolled(cell: Cell, x: Tensor, state: State) -> tuple[Tensor, State]:
    """What `kernels.run` promises, one step after the other."""
    hs = []
    for now in x:
        state, _ = cell(now, state)
        hs.append(state[0])
    return torch.stack(hs), state


def inputs(cell: Cell, steps: int, batch: int) -> tuple[Tensor, State]:
    """A sequence and a first state that ask for gradients."""
    x = torch.randn(steps, batch, cell.input_size, dtype=torch.float64)
    return x.requires_grad_(), tuple(value.requires_grad_() for value in random_state(cell, batch))


def gradients(cell: Cell, x: Tensor, state: State, h: Tensor, last: State, mask: Tensor) -> list[Tensor]:
    """Of a loss over the steps of `mask` [T, B] and the last state, by x, the first state and every weight."""
    weights = torch.linspace(-1, 2, cell.hidden_size, dtype=x.dtype, device=x.device)
    loss = (h[mask] * weights).square().sum() + sum(((k + 2) * value).sin().sum() for k, value in enumerate(last))
    return list(torch.autograd.grad(loss, (x, *state, *cell.parameters())))


@both
@units
def test_a_sequence_is_the_cell_unrolled(name: str, by: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, last states and all gradients, in float64, for any sizes, conventions and mask of counted steps."""
    # The gradient of torch's own holds 1/6 in single precision.
    monkeypatch.setitem(GATE_ACTIVATIONS, "hardsigmoid", lambda value: (value / 6 + 0.5).clamp(0, 1))

    @settings(deadline=None, max_examples=40)
    @given(
        st.sampled_from(conventions(name)), *[st.integers(1, top) for top in (4, 20, 11, 11)], st.integers(0, 2**32 - 1)
    )
    def holds(chosen: dict[str, str | None], m: int, n: int, batch: int, steps: int, seed: int) -> None:
        cell = random_cell(name, m, n, **chosen)
        torch.manual_seed(seed)
        for parameter in cell.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        x, state = inputs(cell, steps, batch)
        mask = torch.rand(steps, batch) < 0.7
        found, expected = kernels.run(cell, x, state, by), unrolled(cell, x, state)
        torch.testing.assert_close(found, expected, **CLOSE)
        wanted = gradients(cell, x, state, *expected, mask)
        torch.testing.assert_close(gradients(cell, x, state, *found, mask), wanted, **CLOSE)

    holds()


@both
@units
def test_gradients_are_right(name: str, by: ModuleType) -> None:
    """Gradcheck in float64 over the sequence, the first state and every weight, for all blends and resets."""
    for chosen in conventions(name):
        if chosen["gate_activation"] == "hardsigmoid" or chosen["candidate_activation"] != "tanh":
            continue
        cell = random_cell(name, 2, 3, **chosen)
        keys = [key for key, _ in cell.named_parameters()]
        x, state = inputs(cell, 4, 2)

        def outputs(x: Tensor, *rest: Tensor, cell: Cell = cell, keys: list[str] = keys) -> Any:
            count = len(cell.states)

            class Run(torch.nn.Module):
                def __init__(self) -> None:
                    super().__init__()
                    self.cell = cell

                def forward(self) -> Any:
                    h, last = kernels.run(self.cell, x, rest[:count], by)
                    return h, *last

            weights = {f"cell.{key}": value for key, value in zip(keys, rest[count:], strict=True)}
            return torch.func.functional_call(Run(), weights, ())

        assert torch.autograd.gradcheck(outputs, (x, *state, *cell.parameters()))


@both
@pytest.mark.parametrize("name", ["gru", "gru3", "lstm", "mingru"])
def test_what_a_cell_does_not_take_is_refused(name: str, by: ModuleType) -> None:
    """A state of another size or type would have the library read and write beyond it."""
    cell = random_cell(name, 3, 46).float()
    x, state = torch.randn(5, 8, cell.input_size), tuple(value.float() for value in random_state(cell, 8))
    for bad in (
        tuple(value.double() for value in state),
        tuple(value[:1] for value in state),
        tuple(torch.cat([value] * 9) for value in state),
        tuple(value[:, 1:] for value in state),
    ):
        with pytest.raises(ValueError, match="a state is"):
            kernels.run(cell, x, bad, by)
    with pytest.raises(ValueError, match=r"the input is torch\.float64"):
        kernels.run(cell, x.double(), state, by)


@both
@pytest.mark.parametrize("name", ["gru", "gru3", "lstm", "mingru"])
def test_under_autocast_a_sequence_is_computed_in_the_type_of_the_weights(name: str, by: ModuleType) -> None:
    """The same values and gradients as without, where what comes before has made the input a smaller type."""
    cell = random_cell(name, 3, 46).float()
    x, state = torch.randn(5, 8, cell.input_size).bfloat16(), tuple(v.float() for v in random_state(cell, 8))
    found = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            h, _ = kernels.run(cell, x if enabled else x.float(), state, by)
            found.append([h, *torch.autograd.grad(h.square().sum(), [*cell.parameters()], allow_unused=True)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@both
@units
def test_gradients_pass_a_cut(name: str, by: ModuleType) -> None:
    """Two parts of a sequence, the state handed from one to the other, give the gradients of the whole."""
    cell = random_cell(name, 3, 5)
    x, state = inputs(cell, 9, 4)
    mask = torch.ones(9, 4, dtype=torch.bool)
    first, middle = kernels.run(cell, x[:4], state, by)
    second, last = kernels.run(cell, x[4:], middle, by)
    whole = gradients(cell, x, state, *kernels.run(cell, x, state, by), mask)
    torch.testing.assert_close(gradients(cell, x, state, torch.cat((first, second)), last, mask), whole, **CLOSE)


@both
@units
def test_long_sequences_go_in_parts(name: str, by: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut by their size into parts of any number of steps, they give what they give as a whole."""
    cell = random_cell(name, 3, 5)
    x, state = inputs(cell, 11, 4)
    mask = torch.ones(11, 4, dtype=torch.bool)
    whole = kernels.run(cell, x, state, by)
    expected = gradients(cell, x, state, *whole, mask)
    for size in (1, 2_000, 4_000):
        monkeypatch.setattr(kernels, "PART", size)
        parts = kernels.run(cell, x, state, by)
        torch.testing.assert_close(parts, whole, **CLOSE)
        torch.testing.assert_close(gradients(cell, x, state, *parts, mask), expected, **CLOSE)


@both
@units
def test_a_second_backward_finds_the_same(name: str, by: ModuleType) -> None:
    """Nothing that the backward pass reads is used up by it; gradients of gradients are refused."""
    cell = random_cell(name, 3, 5)
    x, state = inputs(cell, 6, 2)
    h, _ = kernels.run(cell, x, state, by)
    first, again = (torch.autograd.grad(h.sum(), list(cell.parameters()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    (slope,) = torch.autograd.grad(h.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.sum().backward()


@both
@units
def test_rows_do_not_touch_each_other(name: str, by: ModuleType) -> None:
    """A number that is none shows in its own row from its step on, and nowhere else; a batch may be empty."""
    cell = random_cell(name, 3, 5)
    x, state = inputs(cell, 6, 4)
    x.data[2, 1] = torch.nan
    with torch.no_grad():
        h, _ = kernels.run(cell, x, state, by)
        empty, (last, *_) = kernels.run(cell, x[:, :0], tuple(value[:0] for value in state), by)
    spoiled = h.isnan()
    assert spoiled[2:, 1].all()
    assert not spoiled[:2].any()
    assert not spoiled[:, [0, 2, 3]].any()
    assert empty.shape == (6, 0, 5)
    assert last.shape == (0, 5)


@both
@units
def test_float32_is_float64_to_rounding(name: str, by: ModuleType) -> None:
    """After 50 steps an h of single precision is within 1e-5 of the same weights' h in double precision."""
    cell = random_cell(name, 8, 40)
    for parameter in cell.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, state = inputs(cell, 50, 9)
    expected, _ = kernels.run(cell, x, state, by)
    found, _ = kernels.run(cell.float(), x.float(), tuple(value.float() for value in state), by)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_both_loops_know_every_activation() -> None:
    """The table of the kernels is that of the cells."""
    assert set(ACTIVATIONS) == set(GATE_ACTIVATIONS) | set(CANDIDATE_ACTIVATIONS)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", CANDIDATE_ACTIVATIONS)
def test_activations_are_exact_everywhere(activation: str, dtype: torch.dtype, by: ModuleType) -> None:
    """From the smallest number to infinity, the value of one step is torch's own to four roundings, relatively."""
    cell = random_cell("rnn", 1, 1, candidate_activation=activation).to(dtype)
    for parameter in cell.parameters():
        torch.nn.init.constant_(parameter, 0)
    torch.nn.init.constant_(cell.w, 1)
    sizes = torch.logspace(-30, 30, 4001, dtype=dtype)
    x = torch.cat((-sizes, torch.tensor([-torch.inf, 0, torch.inf], dtype=dtype), sizes))
    if activation in ("relu", "identity", "softsign"):
        x = x[x.isfinite()]
    with torch.no_grad():
        (h,), _ = kernels.run(cell, x[None, :, None], (torch.zeros(len(x), 1, dtype=dtype),), by)
    expected = CANDIDATE_ACTIVATIONS[activation](x)
    torch.testing.assert_close(h[:, 0], expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """The library not looked for yet, and an empty cache."""
    monkeypatch.setattr(native.pooch, "os_cache", lambda _: tmp_path)
    native.library.cache_clear()
    yield monkeypatch
    native.library.cache_clear()


@pytest.mark.skipif(native.library() is None, reason="native.cpp cannot be compiled")
def test_threads_change_no_bit() -> None:
    """Rows are shared out among threads, sums are not."""
    cell = random_cell("gru", 8, 24).float()
    x, state = torch.randn(12, 37, 8), (torch.randn(37, 24),)
    found = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            h, _ = kernels.run(cell, x, state, native)
            found.append(h)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in pairwise(found))


@pytest.mark.skipif(native.library() is None, reason="native.cpp cannot be compiled")
def test_the_library_is_compiled_once(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One file in the cache, which the next process opens as it is; nothing half made is left."""
    assert native.library() is not None
    (built,) = tmp_path.iterdir()
    before = built.stat().st_mtime_ns
    native.library.cache_clear()
    assert native.library() is not None
    assert [path.stat().st_mtime_ns for path in tmp_path.iterdir()] == [before]


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_torch_does_the_work(
    compiler: str, fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once, and sequences run; `LATCH_KERNELS=native` makes it an error."""
    fresh.setenv("CXX", compiler)
    with caplog.at_level(logging.WARNING):
        assert not native.serves(torch.zeros(1))
        assert not native.serves(torch.zeros(1))
    assert [record.getMessage()[:39] for record in caplog.records] == ["training runs in plain torch, which is "]
    cell = random_cell("gru", 2, 3)
    x, state = inputs(cell, 3, 2)
    torch.testing.assert_close(kernels.run(cell, x, state), unrolled(cell, x, state), **CLOSE)
    native.library.cache_clear()
    fresh.setenv("LATCH_KERNELS", "native")
    with pytest.raises(ConfigError, match=r"native\.cpp cannot be compiled"):
        native.serves(torch.zeros(1))


def test_plain_torch_can_be_asked_for(fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """`LATCH_KERNELS=torch` compiles nothing and says nothing; an unknown word is refused."""
    fresh.setenv("LATCH_KERNELS", "torch")
    assert not native.serves(torch.zeros(1))
    assert caplog.records == []
    native.library.cache_clear()
    fresh.setenv("LATCH_KERNELS", "fast")
    with pytest.raises(ConfigError, match="LATCH_KERNELS is 'fast': choose one of auto, native, torch"):
        native.serves(torch.zeros(1))


def test_other_types_are_left_to_torch() -> None:
    """bfloat16 has no native loop."""
    assert not native.serves(torch.zeros(1, dtype=torch.bfloat16))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@units
def test_a_sequence_on_cuda_is_the_cell_unrolled(name: str) -> None:
    """Values, last states and all gradients in float64 on the device."""
    cell = random_cell(name, 4, 7).cuda()
    x, state = inputs(cell, 9, 5)
    x, state = x.detach().cuda().requires_grad_(), tuple(value.detach().cuda().requires_grad_() for value in state)
    mask = torch.ones(9, 5, dtype=torch.bool, device="cuda")
    found, expected = kernels.run(cell, x, state), unrolled(cell, x, state)
    torch.testing.assert_close(found, expected, **CLOSE)
    wanted = gradients(cell, x, state, *expected, mask)
    torch.testing.assert_close(gradients(cell, x, state, *found, mask), wanted, **CLOSE)


@both
@units
@pytest.mark.parametrize("threads", [1, 3])
def test_a_batch_may_be_larger_than_a_block(name: str, threads: int, by: ModuleType) -> None:
    """Rows beyond the first 32 of a thread, too, have their own states, carries and gradients."""
    for reset in ("before", "after") if UNITS[name].resets else (None,):
        cell = random_cell(name, 3, 5, reset=reset)
        x, state = inputs(cell, 4, 75)
        mask = torch.rand(4, 75) < 0.7
        try:
            torch.set_num_threads(threads)
            found = kernels.run(cell, x, state, by)
            mine = gradients(cell, x, state, *found, mask)
        finally:
            torch.set_num_threads(1)
        expected = unrolled(cell, x, state)
        torch.testing.assert_close(found, expected, **CLOSE)
        torch.testing.assert_close(mine, gradients(cell, x, state, *expected, mask), **CLOSE)


@both
@units
def test_a_gradient_that_others_read_stays_as_it_was(name: str, by: ModuleType) -> None:
    """The gradient of a sum is one tensor for all its terms."""
    cells = [random_cell(name, 3, 5), random_cell(name, 3, 5)]
    x, state = inputs(cells[0], 4, 3)
    for one in cells:
        (alone,) = torch.autograd.grad(kernels.run(one, x, state, by)[0].sin().sum(), x)
        doubled = kernels.run(one, x, state, by)[0], kernels.run(one, x, state, by)[0]
        weights = (doubled[0].detach().cos()).requires_grad_()
        (both_of_them,) = torch.autograd.grad(((doubled[0] + doubled[1]) * weights).sum(), x)
        torch.testing.assert_close(both_of_them, 2 * alone, **CLOSE)
