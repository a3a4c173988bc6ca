"""The command line, as a process, the way a person runs it."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from service.settings import PREFIX, Settings
from tests.service import toys

LATCH = [sys.executable, "-m", "service"]


def latch(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; a wide terminal, so that tables are not folded."""
    return subprocess.run(
        [*LATCH, *map(str, arguments)],
        env=os.environ | {"COLUMNS": "200"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("command", ["serve", "check", "models", "settings", "demo"])
def test_help_teaches_every_command(command: str) -> None:
    """Each command is in the overview and has a page of its own."""
    assert command in latch("--help").stdout
    page = latch(command, "--help")
    assert page.returncode == 0
    assert "Usage" in page.stdout


def test_a_start_waits_for_no_library_that_a_server_does_not_use() -> None:
    """Clients, and the stores that were not asked for: each takes as long to import as a model to load."""
    heavy = ["httpx", "redis", "sqlite3", "service.client"]
    found = subprocess.run(
        [sys.executable, "-c", f"import sys, service.__main__; print([m for m in {heavy} if m in sys.modules])"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == "[]\n"


def test_serve_listens_says_where_and_stops_on_sigterm(repository: Path) -> None:
    """On a free port it prints its address; the address answers; SIGTERM ends it with 0."""
    command = [*LATCH, "serve", "--port", "0", "--models", str(repository), "--device", "cpu", "--store", "memory://"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = re.search(r"http://\S+", process.stdout.readline())
            assert url is not None
            assert httpx.get(url[0] + "/health/ready").json()["status"] == "ready"
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()


def test_check_passes_on_good_models_and_names_the_bad_one(tmp_path: Path) -> None:
    """Exit 0 with every golden error shown; after damage exit 1 with the reason."""
    toys.save_leaky(tmp_path)
    folder = toys.save_counter(tmp_path)
    good = latch("check", "--models", tmp_path)
    assert (good.returncode, "toy/1" in good.stdout, "counter/1" in good.stdout) == (0, True, True)
    assert good.stdout.count(" yes ") == 2  # bit-exact
    (folder / "model.onnx").write_bytes(b"")
    bad = latch("check", LATCH_MODELS=str(tmp_path))
    assert bad.returncode == 1
    assert "broken: counter/1: model.onnx has sha256" in bad.stdout
    assert "toy/1" in bad.stdout


def test_check_of_nothing_is_no_success(tmp_path: Path) -> None:
    """An empty repository is not a checked one."""
    empty = latch("check", "--models", tmp_path)
    assert (empty.returncode, "no model in" in empty.stdout) == (1, True)


def test_models_lists_the_shipped_ones() -> None:
    """Unit, sizes and score of each, from the manifests."""
    listed = latch("models", "--models", Path(__file__).parents[2] / "models")
    assert listed.returncode == 0
    assert re.search(r"chorales-gru/1 .* gru .* 46 .* nll 8\.\d+ nats/frame", listed.stdout)


def test_settings_lists_every_one_with_its_value() -> None:
    """All names, and the value that the environment gives."""
    listed = latch("settings", LATCH_MAX_QUEUE="4711", LATCH_STORE_URL="redis://me:se/cr@et@host")
    for name in Settings.model_fields:
        assert PREFIX + name.upper() in listed.stdout
    assert "4711" in listed.stdout
    assert "redis://...@host" in listed.stdout
    assert "me:" not in listed.stdout


def test_a_taken_port_is_named(repository: Path) -> None:
    """Before any model is loaded, with what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        failed = latch("serve", "--port", str(port), "--models", repository)
    assert failed.returncode == 2
    assert f"latch: cannot listen on 127.0.0.1:{port}: Address already in use" in failed.stderr
    assert "--port" in failed.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "word"),
    [
        (("check",), {"LATCH_MODLES": "x"}, "LATCH_MODLES"),
        (("serve", "--port", "99999"), {}, "LATCH_PORT"),
        (("serve", "--models", "/nowhere"), {}, "/nowhere"),
        (("serve", "--store", "floppy://a"), {}, "floppy"),
        (("serve", "--device", "abacus"), {}, "LATCH_DEVICE"),
        (("serve", "--host", "256.1.2.3"), {}, "256.1.2.3"),
        (("serve", "--host", "a..b"), {}, "a..b"),
        (("demo", "--url", "http://127.0.0.1:9"), {}, "latch serve"),
        (("demo",), {"LATCH_PORT": "9"}, "http://127.0.0.1:9 "),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    repository: Path, arguments: tuple[str, ...], environment: dict[str, str], word: str
) -> None:
    """No traceback: what was wrong, by name, on standard error."""
    failed = latch(*arguments, **({"LATCH_MODELS": str(repository)} | environment))
    assert failed.returncode == 2
    assert failed.stderr.startswith("latch: ")
    assert failed.stderr.count("\n") == 1
    assert word in failed.stderr
