"""What the tests of this folder share: a `docker compose up` of this checkout, and commands that must succeed."""

import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = shutil.which("docker") or "docker"
COMPOSE = [tool] if (tool := shutil.which("docker-compose")) else [DOCKER, "compose"]


@dataclass(frozen=True)
class Deployment:
    """A `docker compose up` of this checkout.

    Attributes:
        project: a name of its own, for containers, volumes and networks.
        options: of every compose command, such as `--profile`.
        port: the published one.
    """

    project: str
    options: tuple[str, ...]
    port: int
    environment: dict[str, str]

    def compose(self, *arguments: str) -> str:
        """Runs compose on the checkout's own file, under the test's project name and port."""
        return run(*COMPOSE, "--project-name", self.project, *self.options, *arguments, environment=self.environment)

    def containers(self, service: str) -> list[str]:
        """The ids of a service's containers that run."""
        return self.compose("ps", "--quiet", service).split()

    @property
    def container(self) -> str:
        """The id of the one that serves alone."""
        return self.containers("latch")[0]

    def execute(self, *command: str, user: str = "10001") -> subprocess.CompletedProcess[str]:
        """A command inside that container, as the user that the service runs as unless told otherwise."""
        arguments = [DOCKER, "exec", "--user", user, self.container, *command]
        return subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)

    def wait_until_healthy(self, container: str | None = None, seconds: float = 90) -> None:
        """Until Docker's own health check passes; where it does not, the log says why."""
        container = container or self.container
        deadline = time.monotonic() + seconds
        while (health := inspect(container, "{{.State.Health.Status}}")) != "healthy":
            if time.monotonic() > deadline or inspect(container, "{{.State.Running}}") == "false":
                pytest.fail(f"the container is {health}:\n{run(DOCKER, 'logs', container)}")
            time.sleep(0.5)


def deployment(kind: str, *options: str, **environment: str) -> Deployment:
    """One with a project name and a port that nobody else has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = os.environ | {"LATCH_PORT": str(port)} | environment
    return Deployment(f"latch-{kind}-{os.getpid()}", options, port, own)


def inspect(container: str, template: str) -> str:
    """One field of what Docker knows of a container."""
    return run(DOCKER, "inspect", "--format", template, container).strip()


def services() -> dict[str, dict[str, Any]]:
    """The compose file's services, anchors and merges resolved."""
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]


def run(*command: str, environment: dict[str, str] | None = None) -> str:
    """Standard output of a command that must succeed; both streams where it does not."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
    return done.stdout
