"""What must be true of sessions after faults: the fold of what was acknowledged, and an order that explains a history.

Rule: it shares no code with the service.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load

from tests.service import toys


class Standing(NamedTuple):
    """Where a session stands: its step, and its state tensors as bytes, by name."""

    step: int
    state: dict[str, bytes]


def read_snapshot(data: bytes) -> Standing:
    """What `GET /v1/sessions/{id}/state` gave."""
    tensors = load(data)
    state = {name: value.tobytes() for name, value in tensors.items() if name.startswith("state.")}
    return Standing(int(tensors["position"][0]), state)


class Model:
    """A model of the repository, as an ONNX Runtime loop."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.name: str = self.manifest["name"]
        self.inputs: tuple[int, ...] = tuple(self.manifest["input"]["shape"])
        self.output: str = self.manifest["outputs"][0]["name"]
        self.row_bytes = 4 * int(np.prod(self.manifest["outputs"][0]["shape"]))

    def rows(self, seed: int, steps: int) -> np.ndarray:
        """[T, *shape] of inputs that no other seed gives."""
        return np.random.default_rng(seed).standard_normal((steps, *self.inputs)).astype(np.float32)

    def fold(self, rows: np.ndarray) -> tuple[bytes, Standing]:
        """The packed outputs of all rows [T, *shape] from the initial state on, and where that leads."""
        steps = len(rows)
        if not steps:
            rows = np.zeros((1, *self.inputs), np.float32)
        results = toys.unrolled(self.folder, self.manifest, rows[None])
        state = {name: value[0].tobytes() for name, value in results.items() if name.startswith("state.")}
        if not steps:
            assert not any(pair.get("initial") for pair in self.manifest["state"])
            state = {name: bytes(len(value)) for name, value in state.items()}
            return b"", Standing(0, state)
        return results[f"output.{self.output}"][0].tobytes(), Standing(steps, state)


@dataclass(eq=False)
class Call:
    """One call to a session in a history: what was asked when, and what was answered when.

    Attributes:
        kind: step, rollback, or look (at where it stands).
        called: seconds.
        rows: [T, *shape] of a step; None for others.
        first: the number that it was sent under; None without.
        goal: of a rollback.
        answered: seconds; infinite where nobody knows whether it was done, or will be.
        refused: it was answered that it changed nothing: a conflict, or a step that is not kept.
        step: where the session stood after it, as the answer says.
        reply: the packed outputs of a step.
        state: of a look.
    """

    kind: str
    called: float
    rows: np.ndarray | None = None
    first: int | None = None
    goal: int = 0
    answered: float = inf
    refused: bool = False
    step: int = 0
    reply: bytes = b""
    state: Standing | None = None


@dataclass
class Checker:
    """Looks for an order of calls that explains every answer, and keeps to the time in which they were made.

    The search of Wing and Gong: whichever call could be next is tried, and a set of calls that led to the same place
    before is not tried again. A call without an answer may be done at any time after it was made, or never.
    """

    model: Model
    keep: int
    _folds: dict[tuple[tuple[int, int], ...], tuple[bytes, Standing]] = field(default_factory=dict)

    def explains(self, history: Sequence[Call]) -> bool:
        """Whether there is such an order."""
        calls = sorted(history, key=lambda call: call.called)
        number = {id(call): i for i, call in enumerate(calls)}
        all_answered = sum(1 << i for i, call in enumerate(calls) if call.answered < inf)
        seen = set()
        work = [(0, _Place((), (_Point(0, None),)))]
        while work:
            done, place = work.pop()
            if (done, place) in seen:
                continue
            seen.add((done, place))
            if done & all_answered == all_answered:
                return True
            left = [call for call in calls if not done >> number[id(call)] & 1]
            deadline = min(call.answered for call in left)
            for call in left:
                if call.called > deadline:
                    break
                if (after := self._after(place, call, number[id(call)], calls)) is not None:
                    work.append((done | 1 << number[id(call)], after))
        return False

    def _after(self, place: "_Place", call: Call, number: int, calls: Sequence[Call]) -> "_Place | None":
        """Where the call leads from here; None where its answer contradicts that."""
        unknown, steps = call.answered == inf, len(place.rows)
        if call.kind == "look":
            return place if call.state in (None, self._fold(place, calls)[1]) and call.step == steps else None
        if call.kind == "rollback":
            index = next((i for i, point in reversed([*enumerate(place.points)]) if point.step == call.goal), None)
            if index is None:
                return place if call.refused or unknown else None
            moved = _Place(place.rows[: call.goal], place.points[: index + 1])
            return moved if unknown or (not call.refused and call.step == call.goal) else None
        assert call.rows is not None
        if call.first is not None and call.first != steps + 1:
            last = place.points[-1].call
            if last is not None and calls[last].rows is call.rows and steps - len(call.rows) + 1 == call.first:
                replayed = not call.refused and self._fold(place, calls)[0].endswith(call.reply)
                return place if unknown or (replayed and call.step == steps) else None
            return place if unknown or (call.refused and call.step == steps) else None
        if call.refused:
            return None
        point = _Point(steps + len(call.rows), number)
        rows = place.rows + tuple((number, t) for t in range(len(call.rows)))
        after = _Place(rows, (*place.points, point)[-1 - self.keep :])
        told = call.step == point.step and self._fold(after, calls)[0].endswith(call.reply)
        return after if unknown or told else None

    def _fold(self, place: "_Place", calls: Sequence[Call]) -> tuple[bytes, Standing]:
        found = self._folds.get(place.rows)
        if found is None:
            rows = [calls[number].rows[t] for number, t in place.rows]  # type: ignore[index]
            found = self._folds[place.rows] = self.model.fold(np.array(rows, np.float32))
        return found


class _Point(NamedTuple):
    """Where a request ended, and which one it was."""

    step: int
    call: int | None


class _Place(NamedTuple):
    """Where a session may stand: the rows applied (of which call, which one of it), and where it can be rolled back to;
    the last of those is where it is.
    """

    rows: tuple[tuple[int, int], ...]
    points: tuple[_Point, ...]


def shorten(history: Sequence[Call]) -> str:
    """One line a call, to read."""
    start = min(call.called for call in history)
    lines = []
    for call in sorted(history, key=lambda call: call.called):
        what = (
            f"{call.kind} of {len(call.rows)} as {call.first}" if call.rows is not None else f"{call.kind} {call.goal}"
        )
        end = "?" if call.answered == inf else f"{call.answered - start:.3f}"
        said = "refused at" if call.refused else "->"
        lines.append(f"{call.called - start:.3f} to {end}: {what} {said} {call.step if end != '?' else '?'}")
    return "\n".join(lines)
