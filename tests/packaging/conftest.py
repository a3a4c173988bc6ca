"""Fixtures of this folder."""

import subprocess

import pytest

from tests.packaging.deployments import DOCKER


@pytest.fixture(scope="session")
def engine() -> None:
    """Skips where no Docker engine answers."""
    try:
        answer = subprocess.run([DOCKER, "version"], capture_output=True, text=True, timeout=30, check=False)
    except OSError as error:
        pytest.skip(f"no Docker client: {error}")
    if answer.returncode != 0:
        pytest.skip(f"no Docker engine: {answer.stderr.strip().splitlines()[-1]}")
