"""The README is run and compared: its sessions as a reader would type them, its tables with the code."""

import inspect
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from service import errors
from service.metrics import Metrics
from service.settings import PREFIX, Settings
from tests.service.conftest import Server, serving

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def block(kind: str, after: str = "") -> str:
    """The first fenced block of a kind, after some text."""
    found = re.search(rf"```{kind}\n(.*?)```", README[README.index(after) :], re.DOTALL)
    assert found is not None, f"no {kind} block after {after!r}"
    return found[1]


def table(name: str) -> list[str]:
    """The rows of the table under a marker, without its head."""
    found = re.search(rf"<!-- table: {name} -->\n\n(.*?)\n\n", README, re.DOTALL)
    assert found is not None, f"no table {name}"
    return found[1].splitlines()[2:]


@pytest.fixture(scope="module")
def shipped() -> Iterator[Server]:
    """What `make serve` starts, on another port."""
    with serving(ROOT / "models") as server:
        yield server


def close(got: Any, expected: Any) -> bool:
    """Equal but for times and for the last digits, which another processor may give otherwise."""
    if expected == "...":
        return isinstance(got, str)
    if isinstance(expected, dict):
        return set(got) == set(expected) and all(close(got[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(got) == len(expected) and all(map(close, got, expected))
    if isinstance(expected, float):
        return math.isclose(got, expected, rel_tol=1e-4)
    return bool(got == expected)


def test_the_sessions_do_what_the_readme_says(shipped: Server) -> None:
    """Each curl command gives the line that is printed for it, and the Python session goes on where it ended."""
    commands = block("sh", "<!-- tested: sh -->").strip().splitlines()
    expected = block("json").strip().splitlines()
    for command, line in zip(commands, expected, strict=True):
        here = command.replace("http://127.0.0.1:8000", shipped.url)
        run = subprocess.run(["bash", "-c", here], capture_output=True, text=True, check=True, timeout=30)
        assert close(json.loads(run.stdout), json.loads(line)), run.stdout
    for name in ("client", "python", "group", "binary"):
        marker = f"<!-- tested: {name} -->"
        program = block("python", marker).replace("//127.0.0.1:8000", shipped.url.removeprefix("http:"))
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
        assert run.stdout == block("text", marker)


def test_sessions_last_as_the_readme_says(tmp_path: Path) -> None:
    """The service is killed between the calls, and started again on the same file."""
    commands = block("sh", "<!-- tested: lasting -->").strip().splitlines()
    expected = iter(block("json", "<!-- tested: lasting -->").strip().splitlines())
    environment = {"LATCH_STORE_URL": f"sqlite:///{tmp_path}/sessions.db", "LATCH_KEEP_STEPS": "8"}
    process = None
    try:
        for command in commands:
            if process is None:
                process, url = serve(environment)
            if command.startswith("kill -9"):
                process.kill()
                process.communicate()
                process = None
                continue
            here = command.replace("http://127.0.0.1:8000", url)
            run = subprocess.run(
                ["bash", "-c", here], capture_output=True, text=True, check=True, timeout=30, cwd=tmp_path
            )
            if run.stdout:
                assert close(json.loads(run.stdout), json.loads(next(expected))), run.stdout
    finally:
        if process is not None:
            process.kill()
            process.communicate()
    assert next(expected, None) is None


def serve(environment: dict[str, str]) -> tuple[subprocess.Popen[str], str]:
    """`latch serve` as a process of its own, on a free port, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "service", "serve", "--port", "0"],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    found = re.search(r"http://[0-9.:]+", process.stdout.readline())
    assert found is not None
    return process, found[0]


def test_every_setting_is_in_the_table() -> None:
    """Names, defaults and meanings, in the order of the code."""
    rows = [
        f"| `{PREFIX}{name.upper()}` | `{field.default}` | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    assert table("settings") == rows


def test_every_metric_is_in_the_table() -> None:
    """Names as Prometheus has them, labels and meanings, in the order of the code."""
    rows = []
    for instrument in vars(Metrics(CollectorRegistry())).values():
        if isinstance(instrument, CollectorRegistry):
            continue
        [family] = instrument.describe()
        labels = getattr(instrument, "_labels", None) or getattr(instrument, "_labelnames", ())
        name = family.name + ("_total" if family.type == "counter" else "")
        rows.append(f"| `{name}` | {', '.join(labels)} | {family.documentation} |")
    assert table("metrics") == rows


def test_a_graph_made_elsewhere_is_adopted_as_the_readme_says(tmp_path: Path) -> None:
    """The program exports it, the command makes a version of it, and the service serves that."""
    marker = "<!-- tested: adopted -->"
    command = shlex.split(block("sh", marker), comments=True)
    for arguments in (["-c", block("python", marker)], ["-m", "training", *command[1:]]):
        run = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert run.returncode == 0, run.stderr
    with serving(tmp_path / "models") as server:
        assert server.http.put("/v1/sessions/a", json={"model": "mine"}).status_code == 201
        reply = server.http.post("/v1/sessions/a/steps", json={"inputs": [[1, 2, 3, 4, 5]]}).json()
        assert (len(reply["outputs"]["y"][0]), reply["step"]) == (2, 1)


def test_every_error_a_client_can_meet_is_in_the_table() -> None:
    """Code, status, close code, whether to retry, and what it means, in the order of the code."""
    rows = []
    for kind in vars(errors).values():
        if not (inspect.isclass(kind) and issubclass(kind, errors.LatchError)) or kind is errors.LatchError:
            continue
        meaning = " ".join((kind.__doc__ or "").split())
        if "Raised at" in meaning:
            continue
        retry = "yes" if kind.retryable else ""
        rows.append(f"| `{kind.code}` | {kind.http_status} | {kind.ws_close or ''} | {retry} | {meaning} |")
    assert table("errors") == rows


def test_every_shipped_unit_is_in_the_table() -> None:
    """Sizes and scores are those of the manifests."""
    rows = {row.split("|")[1].strip(" `"): row for row in table("units")}
    manifests = [json.loads(path.read_text()) for path in sorted((ROOT / "models").glob("chorales-*/1/manifest.json"))]
    assert set(rows) == {manifest["name"] for manifest in manifests}
    for manifest in manifests:
        unit = manifest["unit"]
        score = next(m["value"] for m in manifest["metrics"] if (m["name"], m["split"]) == ("nll", "test"))
        cells = [cell.strip() for cell in rows[manifest["name"]].split("|")[-4:-1]]
        assert cells == [str(unit["hidden_size"]), f"{unit['parameters']:,}", f"{score:.2f}"], manifest["name"]


def test_every_link_leads_somewhere() -> None:
    """Files that the README points at exist, and headings in them."""
    for target in re.findall(r"\]\(([^):]+)\)", README):
        name, _, anchor = target.partition("#")
        text = (ROOT / name).read_text() if anchor and name else README
        assert (ROOT / name).exists(), target
        heads = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in re.findall(r"(?m)^#+ (.+)$", text)]
        assert not anchor or anchor in heads, target
