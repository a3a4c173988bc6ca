"""The locked requirements: complete, hashed, free of addresses, and without torch for the service."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
FILES = ["cpu.txt", "gpu.txt", "constraints.txt"]


def pins(name: str) -> dict[str, list[Requirement]]:
    """The pins of one file by package; a package may stand there once for each Python or platform."""
    text = (ROOT / "requirements" / name).read_text().replace("\\\n", " ")
    lines = [
        line.split("--hash")[0].strip() for line in text.splitlines() if line and not line.lstrip().startswith("#")
    ]
    found: dict[str, list[Requirement]] = {}
    for requirement in map(Requirement, lines):
        found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def version(requirement: Requirement) -> Version:
    """The one version that a pin allows."""
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", requirement
    return Version(specifier.version)


@pytest.mark.parametrize("name", FILES)
def test_a_requirements_file_holds_no_address_and_no_path(name: str) -> None:
    """Where packages come from is the machine's business: no URL, no index option, no absolute path."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    options = re.compile(r"://|(?:^|\s)-{1,2}(?!hash=sha256:|require-hashes|r )\w|(?:^|[\s@'\"])/\w")
    assert [line for line in lines if options.search(line)] == []


@pytest.mark.parametrize("runtime", ["cpu", "gpu"])
def test_every_dependency_of_the_service_is_pinned_within_its_range(runtime: str) -> None:
    """What pyproject.toml asks for, the lock of each runtime answers with versions that it allows."""
    locked = pins(f"{runtime}.txt")
    for wanted in map(Requirement, PROJECT["dependencies"] + EXTRAS[runtime]):
        found = locked[canonicalize_name(wanted.name)]
        assert all(wanted.specifier.contains(version(pin)) for pin in found), wanted


@pytest.mark.parametrize("runtime", ["cpu", "gpu"])
def test_every_pin_of_the_service_carries_hashes(runtime: str) -> None:
    """Nothing is installed that was not seen when the lock was made."""
    entries = (ROOT / "requirements" / f"{runtime}.txt").read_text().replace("\\\n", " ").splitlines()
    pinned = [line for line in entries if line and not line.lstrip().startswith("#")]
    assert pinned
    assert [line for line in pinned if not re.search(r"--hash=sha256:[0-9a-f]{64}", line)] == []


@pytest.mark.parametrize("runtime", ["cpu", "gpu"])
def test_the_service_is_locked_without_torch_and_with_one_runtime(runtime: str) -> None:
    """Serving needs no torch, and the two ONNX Runtime packages would overwrite each other."""
    locked = set(pins(f"{runtime}.txt"))
    assert not locked & {"torch", "lightning", "onnxscript"}
    assert {name for name in locked if name.startswith("onnxruntime")} == {
        "onnxruntime" if runtime == "cpu" else "onnxruntime-gpu"
    }


def test_constraints_pin_training_and_tools_within_their_ranges() -> None:
    """`make setup` installs the same versions everywhere; torch is the one that pyproject.toml names."""
    locked = pins("constraints.txt")
    for wanted in map(Requirement, EXTRAS["train"] + EXTRAS["dev"]):
        found = locked[canonicalize_name(wanted.name)]
        assert all(wanted.specifier.contains(version(pin)) for pin in found), wanted


def test_constraints_agree_with_the_lock_of_the_service() -> None:
    """`make test` after `make serve` changes no package that the service runs on."""
    constraints = pins("constraints.txt")
    for name, found in pins("cpu.txt").items():
        assert sorted(map(str, constraints[name])) == sorted(map(str, found)), name
