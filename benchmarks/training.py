"""`python -m benchmarks.training`: sequences forwards and backwards beside torch's own recurrent layers.

Rule: a ratio is of two times taken in the same round, in turns, on the same input; the table holds medians of rounds.
"""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.report import provenance
from training import kernels, loops, native
from training.cells import UNITS, make_cell

PAGE = Path(__file__).with_name("training.md")
GOALS = {"gru": 0.80, "mgu": 0.60, "gru3": 0.40, "mgu3": 0.40}
SCAN_GOAL = 10.0
SIZES = ((88, 46), (28, 100), (128, 128))  # chorales, rows of MNIST, IMDB
LENGTHS, BATCHES = (28, 100, 500), (32, 128)
DISTURBED = 1.5  # of a row, where its slowest round of nn.GRU took so many times its fastest
CALL = 0.02  # seconds that a round gives a contender at least
console = Console(highlight=False, soft_wrap=True)
Times = Mapping[str, list[float]]


@dataclass(frozen=True)
class Shape:
    """m inputs, n units, T steps, B sequences."""

    m: int
    n: int
    steps: int
    batch: int

    def input(self) -> torch.Tensor:
        """[T, B, m]."""
        return torch.randn(self.steps, self.batch, self.m)

    @property
    def cells(self) -> list[str]:
        """The first columns of a row."""
        return [f"{self.m}/{self.n}", str(self.steps), str(self.batch)]


def framework(name: str, shape: Shape) -> Callable[[], None]:
    """`torch.nn.GRU`, `LSTM` or `RNN`, once forwards and backwards."""
    layer, x = getattr(torch.nn, name)(shape.m, shape.n), shape.input()

    def once() -> None:
        layer(x)[0].sum().backward()

    return once


def ours(name: str, shape: Shape, by: ModuleType = native) -> Callable[[], None]:
    """A unit's kernel, with the gradients of all its weights, as those of torch's own."""
    cell, x = make_cell(name, shape.m, shape.n), shape.input()
    state = tuple(torch.zeros(shape.batch, shape.n) for _ in cell.states)

    def once() -> None:
        kernels.run(cell, x, state, by)[0].sum().backward()

    return once


def take_turns(contenders: Mapping[str, Callable[[], None]], rounds: int, clock: Callable[[], float]) -> Times:
    """Seconds a call, for each contender and round, after one call to warm up."""
    calls = {}
    for name, once in contenders.items():
        once()
        start = time.perf_counter()
        once()
        calls[name] = 1 + int(CALL / (time.perf_counter() - start))
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, once in contenders.items():
            start = clock()
            for _ in range(calls[name]):
                once()
            taken[name].append((clock() - start) / calls[name])
    return taken


def ratio(times: Times, name: str, against: str) -> float:
    """The median over the rounds of one time by the other."""
    return median(one / other for one, other in zip(times[name], times[against], strict=True))


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown."""
    return ["", *(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))]


def against_gru(
    shapes: list[Shape], units: list[str], rounds: int, clock: Callable[[], float], by: ModuleType = native
) -> list[str]:
    """Times by that of `nn.GRU`; a goal that was missed is marked, and a row whose rounds of `nn.GRU` lie far apart."""
    rows = []
    for shape in shapes:
        times = take_turns(
            {"nn.GRU": framework("GRU", shape)} | {name: ours(name, shape, by) for name in units}, rounds, clock
        )
        base = times["nn.GRU"]
        disturbed = " (disturbed)" if max(base) > DISTURBED * min(base) else ""
        row = [*shape.cells, f"{1e3 * median(base):.1f}{disturbed}"]
        for name in units:
            found = ratio(times, name, "nn.GRU")
            row.append(f"{found:.2f}" + (" (missed)" if found > GOALS.get(name, 9.0) else ""))
        rows.append(row)
        console.print("  ".join(row))
    return table(["m/n", "T", "B", "nn.GRU, ms", *(f"`{name}`" for name in units)], rows)


def against_twins(shapes: list[Shape], rounds: int, clock: Callable[[], float]) -> list[str]:
    """`lstm` and `rnn` beside their own."""
    rows = []
    for shape in shapes:
        times = take_turns(
            {name: framework(name, shape) for name in ("LSTM", "RNN")}
            | {name: ours(name, shape) for name in ("lstm", "rnn")},
            rounds,
            clock,
        )
        rows.append([*shape.cells, f"{ratio(times, 'lstm', 'LSTM'):.2f}", f"{ratio(times, 'rnn', 'RNN'):.2f}"])
        console.print("  ".join(rows[-1]))
    return table(["m/n", "T", "B", "`lstm` by nn.LSTM", "`rnn` by nn.RNN"], rows)


def scans(shapes: list[Shape], rounds: int, clock: Callable[[], float]) -> list[str]:
    """How many times faster than a GRU `mingru` is, by either loop; a goal that was missed is marked."""
    rows = []
    for shape in shapes:
        times = take_turns(
            {
                "nn.GRU": framework("GRU", shape),
                "gru": ours("gru", shape),
                "gru in torch": ours("gru", shape, loops),
                "native": ours("mingru", shape),
                "torch": ours("mingru", shape, loops),
            },
            rounds,
            clock,
        )
        pairs = [("nn.GRU", "native"), ("gru", "native"), ("nn.GRU", "torch"), ("gru in torch", "torch")]
        row = [*shape.cells, f"{1e3 * median(times['native']):.1f}"]
        faster = [1 / ratio(times, fast, slow) for slow, fast in pairs]
        row += [f"{faster[0]:.1f}" + (" (missed)" if faster[0] < SCAN_GOAL else "")]
        row += [f"{each:.1f}" for each in faster[1:]]
        rows.append(row)
        console.print("  ".join(row))
    head = ["m/n", "T", "B", "`mingru`, ms", "nn.GRU by it", "our `gru` by it"]
    return table([*head, "in torch: nn.GRU by it", "our `gru` by it"], rows)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Few small shapes: to see that it works.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the page here; a full run writes training.md.")] = None,
) -> None:
    """Measure the kernels of training beside `torch.nn.GRU`, in some minutes."""
    if native.library() is None:
        raise typer.BadParameter("native.cpp cannot be compiled here (see the warning above)")
    start, rounds = time.perf_counter(), 2 if quick else 7
    lengths = LENGTHS[:1] if quick else LENGTHS
    shapes = [Shape(m, n, steps, batch) for m, n in SIZES for steps in lengths for batch in BATCHES]
    some = [shape for shape in shapes if shape.steps == lengths[len(lengths) // 2]]
    long = 64 if quick else 4096
    own = time.process_time  # one thread's own time, whatever else the machine does
    rest = [name for name in UNITS if name not in GOALS and name not in ("lstm", "rnn")]
    torch.set_num_threads(1)
    page = [
        "# Training, measured",
        "",
        f"`{' '.join(['python -m benchmarks.training', *sys.argv[1:]])}` on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.",
        "One layer over T steps of B sequences of float32, m inputs and n units, forwards and backwards (all weights'",
        f"gradients, not the input's). Contenders take turns on the same machine; medians of {rounds} rounds.",
        "",
        *provenance(("torch", "numpy")),
        "",
        "## Time, by that of `torch.nn.GRU`",
        "",
        f"One thread, processor time. Goals: {', '.join(f'`{name}` {goal}' for name, goal in GOALS.items())}.",
        *against_gru(shapes, list(GOALS), rounds, own),
        "",
        "The other units:",
        *against_gru(some, rest, rounds, own),
        *against_twins(some, rounds, own),
        "",
        "Without a compiler (`LATCH_KERNELS=torch`):",
        *against_gru(some, list(GOALS), rounds, own, loops),
        "",
        f"## `mingru` over {long} steps",
        "",
        f"Times faster than a GRU; goal {SCAN_GOAL:g} for nn.GRU by it. One thread, processor time.",
        *scans([Shape(m, n, long, 32) for m, n in ((2, 128), *SIZES)], 2 if quick else 3, own),
    ]
    torch.set_num_threads(2)
    page += [
        "",
        "## Two threads",
        "",
        "Time on the clock: torch's threads wait for each other at every step, so others' work shows.",
        *against_gru(some, list(GOALS), rounds, time.perf_counter),
    ]
    page += ["", f"It took {(time.perf_counter() - start) / 60:.0f} minutes. Written by `benchmarks/training.py`."]
    target = out or (None if quick else PAGE)
    if target is not None:
        target.write_text("\n".join(page) + "\n")
        console.print(f"wrote {target}")


if __name__ == "__main__":
    cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    cli.command()(main)
    cli()
