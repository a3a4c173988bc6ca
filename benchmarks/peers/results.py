"""results.json, which remembers every row with the run that gave it, and results.md, the table made from it."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from peer import HERE

RIGHT = 1e-6
DISTURBED = 0.1  # cores that programs other than the load and the server may use
Row = dict[str, Any]

HEAD = """# Latch beside other servers

Written by `python benchmarks/peers/run.py`; [README.md](README.md) says how each is set up.

- **steps/s**: the server on one core, the load on the other; p50 and p99 in ms of the same rounds.
- **all cores**: steps/s with the server allowed on both, one of which it shares with the load.
- **~**: other programs used more than a tenth of a core, however often it was tried.
- **Latch**: how many times the steps/s of the row Latch does through the same door, from its mean before and after the
  peers in the row's own run. Below 1 the peer is faster.
- **outputs**: of all sessions, compared with a loop of ONNX Runtime: the first 20 steps, and the last of the load.

"""


def update(run: Row, rows: list[Row]) -> None:
    """Replaces the rows that a run measured, drops runs that no row is left of, and writes both files."""
    path = HERE / "results.json"
    saved = json.loads(path.read_text()) if path.exists() else {"runs": {}, "rows": []}
    name = str(max(map(int, saved["runs"]), default=0) + 1)
    machine = (
        f"{os.cpu_count()} cores of {_processor()}, Linux {platform.release()}, Python {platform.python_version()}"
    )
    saved["runs"][name] = run | {"machine": machine, "onnxruntime": version("onnxruntime")}
    new = {(row["peer"], row["door"]): row | {"run": name} for row in rows}
    old = {(row["peer"], row["door"]): row for row in saved["rows"]}
    saved["rows"] = list((old | new).values())
    used = {row["run"] for row in saved["rows"]}
    saved["runs"] = {key: value for key, value in saved["runs"].items() if key in used}
    path.write_text(json.dumps(saved, indent=1) + "\n")
    (HERE / "results.md").write_text(_page(saved))


def _page(saved: Row) -> str:
    lines = ["| server | door | steps/s | p50 | p99 | all cores | Latch | outputs | version | run |"]
    lines += ["|---|---|--:|--:|--:|--:|--:|---|---|--:|"]
    lines += [_line(row, saved["runs"][row["run"]]) for row in saved["rows"]]
    lines.append("")
    for name, run in saved["runs"].items():
        command = " ".join(["python benchmarks/peers/run.py", *run["peers"]])
        lines.append(
            f"Run {name}: {run['date']} UTC, Latch at {run['commit']}, `{command}`; {run['machine']}; ONNX Runtime"
        )
        lines.append(
            f"{run['onnxruntime']}; {run['clients']} clients, {run['seconds']:g} s a door. Latch before and after:"
        )
        lines += [f"- {door}: {', '.join(f'{rate:,.0f}' for rate in rates)}" for door, rates in run["latch"].items()]
        lines += [f"- {peer} did not run: {error}" for peer, error in run["failures"].items()]
        lines.append("")
    return HEAD + "\n".join(lines)


def _line(row: Row, run: Row) -> str:
    one, everywhere = row["one"], row["all"]
    rates = [f"{'~' * (kind['strangers'] > DISTURBED)}{kind['rate']:,.0f}" for kind in (one, everywhere)]
    ratio = "" if row["peer"] == "Latch" else f"{mean(run['latch'][row['door']]) / one['rate']:.1f}"
    off = max(one["off"], everywhere["off"])
    outputs = "bit-equal" if off == 0 else f"within {off:.0e}" if off < RIGHT else f"**WRONG** by {off:.2g}"
    cells = [row["peer"], row["door"], rates[0], f"{one['p50']:.1f}", f"{one['p99']:.1f}", rates[1], ratio, outputs]
    return f"| {' | '.join([*cells, row['version'], row['run']])} |"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
