"""The contract as types, and what it refuses."""

import json
import math
from copy import deepcopy
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.errors import ManifestInvalid
from service.manifest import parse_manifest


@pytest.fixture
def document(repository: Path) -> Any:
    """A valid manifest as JSON, with every kind of field in it."""
    return json.loads((repository / "counter" / "1" / "manifest.json").read_text())


def parse(document: Any) -> Any:
    """Through the bytes, as from a file."""
    return parse_manifest(json.dumps(document).encode())


def test_a_valid_manifest_becomes_types(document: Any) -> None:
    """Tensors, state pairs, constants and sizes are what the JSON says."""
    manifest = parse(document)
    assert manifest.input.name == "id"
    assert [pair.batch_axis for pair in manifest.state] == [1, 0]
    assert manifest.state[0].initial_value().tolist() == [0.5]
    assert manifest.state[1].initial_value().tolist() == [0]
    assert manifest.constants[0].array().tolist() == 2
    assert manifest.state_bytes == 4 + 8
    assert manifest.replies == {"y": "y", "total": "total_next", "steps": "steps_next"}


def test_whole_numbers_are_not_rounded(document: Any) -> None:
    """Those beyond 2**53 pass through no float."""
    document["constants"][0]["value"] = [2**53 + 1]
    document["state"][1]["initial"] = [2**62 + 1]
    manifest = parse(document)
    assert (manifest.constants[0].array().dtype, manifest.constants[0].array().item()) == (np.int64, 2**53 + 1)
    assert manifest.state[1].initial_value().tolist() == [2**62 + 1]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["manifest_version"], 2, r"\$\.manifest_version"),
        (["name"], "../evil", r"\$\.name"),
        (["version"], "1.0", r"\$\.version"),
        (["input", "dtype"], "float16", r"\$\.input\.dtype"),
        (["input", "shape"], [-1], r"\$\.input\.shape\[0\]"),
        (["outputs"], [], r"\$\.outputs"),
        (["state"], [], r"\$\.state"),
        (["files"], {"model.onnx": "0" * 64, "golden.npz": "0" * 64, "../x": "0" * 64}, r"\$\.files"),
        (["files", "model.onnx"], "abc", r"model\.onnx"),
        (["surprise"], 1, "surprise"),
        (["input", "batch_axis"], 1, "batch_axis 1 of id"),
        (["state", 0, "initial"], [1.0, 2.0], "total has 2 values"),
        (["constants", 0, "value"], [], "stride has 0 values"),
        (["state", 0, "name"], "y", "names y twice"),
    ],
)
def test_a_broken_manifest_says_where(document: Any, path: list[Any], value: Any, message: str) -> None:
    """Each breach of the contract is refused with the place of it."""
    broken = target = deepcopy(document)
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    parse(document)
    with pytest.raises(ManifestInvalid, match=message):
        parse(broken)


@pytest.mark.parametrize("field", ["name", "files", "golden", "state", "input"])
def test_a_missing_field_is_named(document: Any, field: str) -> None:
    """Leaving out a required field says which."""
    del document[field]
    with pytest.raises(ManifestInvalid, match=field):
        parse(document)


def test_what_no_page_could_show_is_refused(document: Any) -> None:
    """Free-form fields are told as they are; a number that JSON does not have would let any golden vector pass."""
    document["training"] = reduce(lambda inner, _: {"in": inner}, range(100), {})
    with pytest.raises(ManifestInvalid, match=r"nested 10. deep, more than 64"):
        parse(document)
    document["training"] = {}
    document["golden"]["tolerance"] = math.inf
    with pytest.raises(ManifestInvalid, match="Infinity is no number"):
        parse(document)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[]", b"null"])
def test_what_is_no_manifest_at_all_is_refused(text: bytes) -> None:
    """Neither broken JSON nor JSON of another kind gets through."""
    with pytest.raises(ManifestInvalid):
        parse_manifest(text)
