"""`python -m benchmarks`: runs benchmarks, shows a row as soon as it is measured, and writes the page.

Rule: it runs and prints; every benchmark is a module with `run(quick)`, which yields rows.
"""

import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.machine import CORES
from benchmarks.report import Row, markdown

NAMES = (
    "doors",
    "bulk",
    "latency",
    "mixed",
    "units",
    "batch",
    "chunks",
    "cold",
    "memory",
    "stores",
    "durable",
    "profile",
)
BROKE_OFF = "broke off"
PAGE = Path(__file__).with_name("results.md")
COLOURS = {"met": "green", "missed": "red", "unsure": "yellow", "-": "dim"}
console = Console(highlight=False, soft_wrap=True)


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Any of {', '.join(NAMES)}; all when absent.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Short rounds: to see that it works, not to quote.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the page here; a full run of all writes results.md.")] = None,
) -> None:
    """Measure the service beside bare echoes on the same server, and beside ONNX Runtime alone.

    Every figure is a ratio from one run on one machine, so it needs two quiet cores and about a quarter of an hour.

    Examples: python -m benchmarks          python -m benchmarks doors bulk --quick
    """
    unknown = sorted(set(names or ()) - set(NAMES))
    if unknown:
        raise typer.BadParameter(f"no benchmark {', '.join(unknown)}: there are {', '.join(NAMES)}")
    if len(CORES) < 2:
        raise typer.BadParameter("one core: the server and the load need one each")
    start, rows = time.perf_counter(), list[Row]()
    for name in names or NAMES:
        module = import_module(f"benchmarks.{name}")
        console.rule(f"{name}: {str(module.__doc__).splitlines()[0]}", align="left", style="dim")
        for row in _guarded(module.run(quick), name):
            rows.append(row)
            colour = COLOURS[row.verdict]
            console.print(f"[{colour}]{row.measured:>10} {row.goal:>8}[/]  {row.what} [dim]/ {row.against}[/]")
            if row.detail:
                console.print(f"{'':21}[dim]{row.detail}[/]")
    broke = [row for row in rows if row.measured == BROKE_OFF]
    page = out or (None if names or quick or broke else PAGE)  # the page that is there is worth more than half a one
    if page is not None:
        command = " ".join(["python -m benchmarks", *sys.argv[1:]])
        page.write_text(markdown(rows, command, time.perf_counter() - start))
        console.print(f"wrote {page}")
    if broke:
        console.print(f"{', '.join(row.what for row in broke)} broke off; see above", style="red")
        raise typer.Exit(1)


def _guarded(rows: Iterator[Row], name: str) -> Iterator[Row]:
    """The rows; a benchmark that breaks off says so in the table, and the others still run."""
    try:
        yield from rows
    except Exception as error:  # noqa: BLE001 - an hour's rows must not go with it
        console.print_exception(show_locals=False)
        yield Row(name, "", "", BROKE_OFF, False, str(error).replace("|", "/"))


if __name__ == "__main__":
    cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    cli.command()(main)
    cli()
