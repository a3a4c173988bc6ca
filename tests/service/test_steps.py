"""The step table, exhaustively."""

from itertools import product

import pytest

from service.errors import StepConflict
from service.slab import Kept
from service.steps import Decision, decide


def oracle(step: int, kept: Kept | None, first: int | None, digest: bytes) -> str:
    """The table of the design, written as a table."""
    if first is None:
        return "run"
    if first == step + 1:
        return "run"
    if kept is not None and first == kept.first_step:
        return "replay" if digest == kept.digest else "conflict"
    return "conflict"


@pytest.mark.parametrize("step", range(5))
def test_every_case_of_the_table(step: int) -> None:
    """Every step number, kept request and digest gives what the design's table says."""
    kepts = [None] + [Kept(first, b"a", {}) for first in range(1, step + 1)]
    for kept, first, digest in product(kepts, [None, *range(1, 8)], [b"a", b"b"]):
        expected = oracle(step, kept, first, digest)
        try:
            got = {Decision.RUN: "run", Decision.REPLAY: "replay"}[decide(step, kept, first, digest)]
        except StepConflict:
            got = "conflict"
        assert got == expected, (step, kept, first, digest)


@pytest.mark.parametrize(
    ("first", "word"), [(1, "stale"), (3, "other inputs"), (6, "gap")], ids=["stale", "different", "gap"]
)
def test_a_conflict_says_which_kind_it_is(first: int, word: str) -> None:
    """A person reading the error learns whether the step was stale, different or ahead."""
    with pytest.raises(StepConflict, match=rf"{word}.*the next is 5") as caught:
        decide(4, Kept(3, b"a", {}), first, b"b")
    assert caught.value.extras["expected_step"] == 5
