"""The Makefile: what each target would do, seen without installing anything."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = [
    "help", "serve", "check", "demo", "setup", "test", "faults", "lint", "bench", "bench-training", "train", "image",
    "lock", "clean",
]  # fmt: skip
MAKE = shutil.which("make") or "make"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What `make` reads, in a folder without an environment."""
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs make as a user would: nothing of a make that runs these tests is inherited."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run([MAKE, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def install(checkout: Path, *stamps: str) -> None:
    """Pretends that an installation has just ended."""
    for name in ("bin/pip", *stamps):
        path = checkout / ".venv" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_help_names_every_target(checkout: Path) -> None:
    """`make` alone says what can be made, one line a target."""
    shown = make(checkout)
    assert shown.returncode == 0
    assert re.findall(r"^  make ([a-z-]+) ", shown.stdout, re.MULTILINE) == TARGETS


def test_serve_installs_the_locked_service_and_nothing_else(checkout: Path) -> None:
    """A fresh `make serve` takes hashed packages and the service itself: neither torch nor tools."""
    plan = make(checkout, "--dry-run", "serve").stdout
    assert "--require-hashes --requirement requirements/cpu.txt" in plan
    assert "--no-deps --editable ." in plan
    assert plan.rstrip().endswith("latch serve")
    assert "train" not in plan
    assert "constraints" not in plan


def test_an_installed_service_starts_at_once(checkout: Path) -> None:
    """The second `make serve` installs nothing."""
    install(checkout, ".service-installed")
    assert make(checkout, "--dry-run", "serve").stdout.split() == ["exec", ".venv/bin/latch", "serve"]


@pytest.mark.parametrize("changed", ["requirements/cpu.txt", "pyproject.toml"])
def test_a_changed_requirement_is_installed_before_serving(checkout: Path, changed: str) -> None:
    """After a pull that changes the lock or the project, `make serve` brings the environment up to date."""
    install(checkout, ".service-installed")
    later = time.time() + 5
    os.utime(checkout / changed, (later, later))
    assert "--require-hashes" in make(checkout, "--dry-run", "serve").stdout


def test_everything_installed_means_that_test_only_tests(checkout: Path) -> None:
    """`make test` goes straight to pytest once all is installed, and hands ARGS on."""
    install(checkout, ".service-installed", ".all-installed")
    assert make(checkout, "--dry-run", "test", "ARGS=-k batch").stdout.strip() == ".venv/bin/python -m pytest -k batch"


def test_an_old_python_is_refused_with_a_way_out(checkout: Path) -> None:
    """A Python before 3.11 is named in one sentence, with what to type instead, and nothing is made."""
    old = checkout / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    refused = make(checkout, "serve", f"PYTHON={old}")
    assert refused.returncode != 0
    assert f"Latch needs Python 3.11 or newer, and '{old}' is not" in refused.stderr
    assert "make PYTHON=python3.12 serve" in refused.stderr
    assert not (checkout / ".venv").exists()


def test_a_python_without_venv_is_refused_with_a_way_out(checkout: Path) -> None:
    """Debian's Python lacks venv until it is installed: the message names the package."""
    bare = checkout / "python3.11"
    bare.write_text('#!/bin/sh\n[ "$1" = -c ]\n')
    bare.chmod(0o755)
    refused = make(checkout, "serve", f"PYTHON={bare}")
    assert refused.returncode != 0
    assert "apt install python3-venv" in refused.stderr
