"""What a benchmark says: rows of goal and measured, as a table in the terminal and in `results.md`.

Rule: a figure without the command, the versions and the machine that gave it is not a figure.
"""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from benchmarks.machine import UNSURE

LIBRARIES = ("onnxruntime", "numpy", "uvicorn", "uvloop", "httptools", "websockets", "orjson", "fastapi", "pydantic")


@dataclass(frozen=True)
class Row:
    """One measured thing: beside what, the goal, the outcome, and whether the one meets the other."""

    what: str
    against: str
    goal: str
    measured: str
    met: bool | None = None
    detail: str = ""

    @property
    def verdict(self) -> str:
        """One word."""
        if self.met is not None and UNSURE in self.detail:
            return "unsure"
        return {True: "met", False: "missed", None: "-"}[self.met]


def at_least(goal: float | None, what: str, against: str, value: float, detail: str = "") -> Row:
    """A row whose value should be high; without a goal it is only told."""
    if goal is None:
        return Row(what, against, "", f"{value:.2f}", None, detail)
    return Row(what, against, f">= {goal:g}", f"{value:.2f}", value >= goal, detail)


def at_most(goal: float, what: str, against: str, value: float, detail: str = "") -> Row:
    """A row whose value should be low."""
    return Row(what, against, f"<= {goal:g}", f"{value:.2f}", value <= goal, detail)


def provenance(libraries: Sequence[str]) -> list[str]:
    """The machine and the versions that figures are of."""
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    return [
        f"- Machine: {_processor()}, {os.cpu_count()} cores, {_memory()} GiB; {platform.platform()}",
        f"- Python {platform.python_version()}, {versions}",
    ]


def markdown(rows: Sequence[Row], command: str, seconds: float) -> str:
    """The page: where it ran, then the table."""
    lines = [
        "# Measured",
        "",
        f"`{command}` on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {seconds / 60:.0f} minutes; one machine, one run. The",
        "server has one core to itself and the load another; contenders take turns. Written by `benchmarks/report.py`.",
        "",
        *provenance(LIBRARIES),
        "",
        "| what | measured against | goal | measured | | how it went |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| {r.what} | {r.against} | {r.goal} | {r.measured} | {r.verdict} | {r.detail} |" for r in rows]
    return "\n".join(lines) + "\n"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _memory() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
