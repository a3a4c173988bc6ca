"""The image and the compose file: read without Docker, then built and run for real."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from websockets.sync.client import connect

from service.settings import PREFIX, Settings
from tests.packaging.deployments import DOCKER, ROOT, Deployment, deployment, inspect, run, services

BASE = "python:3.11-slim-bookworm"
MANIFESTS = [json.loads(path.read_text()) for path in sorted(ROOT.glob("models/*/*/manifest.json"))]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their arguments, continued lines joined."""
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line and not line.startswith("#")]


def test_both_stages_start_from_the_same_image() -> None:
    """A virtual environment points at its interpreter, so it can only be copied between equal images."""
    stages = [arguments.split()[0] for name, arguments in instructions() if name == "FROM"]
    assert stages == [BASE, BASE]


def test_the_dockerfile_builds_with_any_builder() -> None:
    """No frontend to fetch, no heredoc, no mount, no other image to copy from."""
    text = (ROOT / "Dockerfile").read_text()
    assert "# syntax=" not in text
    assert "<<" not in text
    assert "--mount" not in text
    copied_from = [word for name, arguments in instructions() if name == "COPY" for word in arguments.split()]
    assert [word for word in copied_from if word.startswith("--from=")] == ["--from=build"]


def test_the_lock_is_installed_before_the_source_is_copied() -> None:
    """A change of the code does not install every package again."""
    steps = [f"{name} {arguments}" for name, arguments in instructions()]
    locked = next(number for number, step in enumerate(steps) if "--require-hashes" in step)
    source = next(number for number, step in enumerate(steps) if step.startswith("COPY service"))
    assert locked < source


def test_only_the_service_reaches_the_builder() -> None:
    """Training code, tests, models and the git history stay outside: .dockerignore lets in what it names."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    admitted = {rule[1:] for rule in rules if rule.startswith("!")}
    assert admitted == {
        "pyproject.toml",
        "LICENSE",
        "requirements/cpu.txt",
        "requirements/gpu.txt",
        "models/__init__.py",
        "models/manifest.schema.json",
        "service",
    }
    assert all((ROOT / path).exists() for path in admitted)


def test_compose_keeps_to_what_both_generations_read() -> None:
    """Compose 1.29 and 2 both read the file: no name, include, gpus, start_interval or depends_on.restart."""
    document = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    assert {key for key in document if not key.startswith("x-")} <= {"services", "networks", "volumes"}
    for name, service in services().items():
        assert "gpus" not in service, name
        assert "start_interval" not in service.get("healthcheck", {}), name
        needs = service.get("depends_on", [])
        assert isinstance(needs, list) or all({*each} == {"condition"} for each in needs.values()), name
        assert "image" in service, name


def test_compose_publishes_on_this_machine_only_and_hardens_every_service() -> None:
    """Nobody else reaches a port by default; a taken-over process finds little to write and no privilege."""
    for name, service in services().items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        writable = [volume for volume in service["volumes"] if not volume.endswith(":ro")]
        assert set(writable) <= {"sessions:/data", "redis:/data"}, name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_compose_starts_one_service_where_no_profile_is_named() -> None:
    """Every service has one profile; `.env` names the one that starts without being asked for."""
    chosen = dict(line.split("=") for line in (ROOT / ".env").read_text().splitlines() if not line.startswith("#"))
    profiles = {name: service["profiles"] for name, service in services().items()}
    assert {name for name, own in profiles.items() if own == [chosen["COMPOSE_PROFILES"]]} == {"latch"}
    scale = {name for name, own in profiles.items() if own == ["scale"]}
    assert scale == {"service", "haproxy", "redis", "redis-volume"}
    assert all(len(own) == 1 for own in profiles.values())


def test_compose_publishes_one_port_a_profile() -> None:
    """Replicas cannot share a published port: in `scale`, HAProxy has it, at the address of the single service."""
    published = [(service["profiles"][0], service["ports"]) for service in services().values() if "ports" in service]
    assert sorted(profile for profile, _ in published) == ["gpu", "scale", "single"]
    assert {tuple(ports) for _, ports in published} == {("127.0.0.1:${LATCH_PORT:-8000}:8000",)}


def test_every_setting_that_the_containers_set_is_known() -> None:
    """The service refuses to start on a LATCH_ name that it does not know."""
    known = {PREFIX + field.upper() for field in Settings.model_fields}
    image = " ".join(arguments for name, arguments in instructions() if name == "ENV")
    used = {word.split("=")[0] for word in image.split()} | {
        variable for service in services().values() for variable in service.get("environment", {})
    }
    assert {name for name in used if name.startswith(PREFIX)} <= known


@pytest.fixture(scope="module")
def latch(engine: None) -> Iterator[Deployment]:
    """The service as `docker compose up --build` leaves it, no profile named, taken down again whatever happens."""
    latch = deployment("single")
    try:
        latch.compose("up", "--detach", "--build")
        latch.wait_until_healthy()
        yield latch
    finally:
        latch.compose("down", "--timeout", "2", "--volumes")


@pytest.fixture
def client(latch: Deployment) -> Iterator[httpx.Client]:
    """HTTP through the published port."""
    with httpx.Client(base_url=f"http://127.0.0.1:{latch.port}", timeout=30, trust_env=False) as http:
        yield http


@pytest.mark.docker
def test_the_container_serves_every_model_of_the_repository(client: httpx.Client) -> None:
    """Readiness lists exactly the versions under models/, and nothing is broken."""
    ready = client.get("/health/ready").json()
    served = {(name, version) for name, versions in ready["models"].items() for version in versions}
    assert ready["status"] == "ready"
    assert ready["broken"] == {}
    assert served == {(manifest["name"], manifest["version"]) for manifest in MANIFESTS}
    assert served


@pytest.mark.docker
def test_a_session_goes_on_from_http_to_websocket(latch: Deployment, client: httpx.Client) -> None:
    """Through the published port: a step over HTTP and one over WebSocket give what both in one chunk give."""
    manifest = MANIFESTS[0]
    shape = manifest["input"]["shape"]
    first, second = np.linspace(0, 1, 2 * int(np.prod(shape))).round(3).reshape(2, *shape).tolist()

    def create() -> str:
        answer = client.post("/v1/sessions", json={"model": manifest["name"], "version": manifest["version"]})
        assert answer.status_code == 201, answer.text
        return answer.json()["id"]

    def over_http(session: str, inputs: list[Any]) -> dict[str, Any]:
        answer = client.post(f"/v1/sessions/{session}/steps", json={"inputs": inputs})
        assert answer.status_code == 200, answer.text
        return answer.json()

    session = create()
    parts = [over_http(session, [first])]
    with connect(f"ws://127.0.0.1:{latch.port}/v1/sessions/{session}/stream", proxy=None) as socket_:
        hello = json.loads(socket_.recv(timeout=30))
        socket_.send(json.dumps({"inputs": [second]}))
        parts.append(json.loads(socket_.recv(timeout=30)))
    whole = over_http(create(), [first, second])

    assert hello["step"] == 1
    assert [part["step"] for part in parts] == [1, 2]
    assert {name: [*parts[0]["outputs"][name], *parts[1]["outputs"][name]] for name in whole["outputs"]} == whole[
        "outputs"
    ]


@pytest.mark.docker
def test_the_golden_vectors_hold_inside_the_container(latch: Deployment) -> None:
    """`latch check` in the image gives what was exported, for every model."""
    checked = latch.execute("latch", "check")
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.docker
@pytest.mark.parametrize("module", ["torch", "training", "pip"])
def test_the_image_holds_the_service_alone(latch: Deployment, module: str) -> None:
    """No torch, no training code and no installer can be imported."""
    missing = latch.execute("python", "-c", f"import {module}")
    assert f"No module named '{module}'" in missing.stderr


@pytest.mark.docker
def test_the_process_has_no_privilege(latch: Deployment) -> None:
    """It is not root, has no capability and can gain none."""
    status = dict(line.split(":\t", 1) for line in latch.execute("cat", "/proc/1/status").stdout.splitlines())
    assert status["Uid"].split() == ["10001"] * 4
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"


@pytest.mark.docker
@pytest.mark.parametrize("folder", ["/models", "/opt/latch", "/"])
def test_nothing_can_be_written_beside_tmp_and_the_sessions(latch: Deployment, folder: str) -> None:
    """The models and the image are read-only, even for root."""
    written = latch.execute("touch", f"{folder.rstrip('/')}/written", user="0")
    assert written.returncode != 0
    assert "Read-only file system" in written.stderr
    assert latch.execute("touch", "/tmp/written").returncode == 0  # noqa: S108 - the container's own


@pytest.mark.docker
def test_sessions_outlive_the_container(latch: Deployment, client: httpx.Client) -> None:
    """Killed and made anew on the same volume, the service goes on where the last answer was."""
    manifest = next(manifest for manifest in MANIFESTS if manifest["name"] == "sensors")
    row = [0.5] * manifest["input"]["shape"][0]
    client.put("/v1/sessions/outlives", json={"model": "sensors"}).raise_for_status()
    client.post("/v1/sessions/outlives/steps", json={"inputs": [row], "step": 1}).raise_for_status()
    run(DOCKER, "rm", "--force", latch.container)
    latch.compose("up", "--detach")
    latch.wait_until_healthy()
    second = client.post("/v1/sessions/outlives/steps", json={"inputs": [row], "step": 2}).json()
    client.put("/v1/sessions/afresh", json={"model": "sensors"}).raise_for_status()
    whole = client.post("/v1/sessions/afresh/steps", json={"inputs": [row, row]}).json()
    assert second["outputs"]["y"][0] == whole["outputs"]["y"][1]


@pytest.mark.docker
def test_sigterm_ends_the_service_cleanly(latch: Deployment) -> None:
    """`docker stop` needs no kill: exit code 0 within ten seconds, and the container starts again."""
    container = latch.container
    run(DOCKER, "stop", "--time", "10", container)
    code = inspect(container, "{{.State.ExitCode}}")
    run(DOCKER, "start", container)
    latch.wait_until_healthy()
    assert code == "0"


@pytest.mark.docker
def test_make_image_builds_what_compose_builds(latch: Deployment) -> None:
    """Both ways lead to latch:cpu from the same Dockerfile."""
    run("make", "image", "BUILD_FLAGS=--network host --quiet", environment=latch.environment)
    entry = json.loads(run(DOCKER, "image", "inspect", "latch:cpu"))[0]["Config"]
    assert entry["Cmd"] == ["latch", "serve"]
    assert entry["User"] == "10001"
    assert entry["Healthcheck"]["Test"][0] == "CMD"
