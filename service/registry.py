"""Finds the model versions under the repository folder and checks that their files are what the manifest says.

Rule: nothing leaves a version's own folder, and no byte is used that its sha256 does not cover. One broken version
is reported beside the others, never instead of them. This module knows files, not ONNX Runtime.
"""

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

from service.errors import LatchError, ManifestInvalid
from service.manifest import Array, Manifest, parse_manifest


class ModelKey(NamedTuple):
    """Name and version; versions are whole numbers and sort as such."""

    name: str
    version: str


@dataclass(frozen=True)
class ModelFiles:
    """One checked version: its manifest, the bytes of its graph, and its golden vectors."""

    manifest: Manifest
    graph: bytes
    golden: dict[str, Array]


@dataclass(frozen=True)
class Scan:
    """What one look at the repository found."""

    found: list[ModelFiles] = field(default_factory=list)
    broken: dict[ModelKey, LatchError] = field(default_factory=dict)


def scan(root: Path) -> Scan:
    """Reads every `<name>/<version>/` under `root`, in order of name and version.

    Raises:
        ManifestInvalid: `root` itself is not a folder.
    """
    if not root.is_dir():
        raise ManifestInvalid(f"the model repository {root} is not a folder: set LATCH_MODELS or --models")
    result = Scan()
    for folder in sorted(path for path in root.glob("*/*") if path.is_dir() and not _hidden(path)):
        key = ModelKey(folder.parent.name, folder.name)
        try:
            result.found.append(load(folder))
        except LatchError as error:
            result.broken[key] = error
        except Exception as error:  # noqa: BLE001 - files can be broken in more ways than anybody lists
            result.broken[key] = ManifestInvalid(f"cannot be read: {type(error).__name__}: {error}")
    result.found.sort(key=lambda files: (files.manifest.name, int(files.manifest.version)))
    return result


def load(folder: Path) -> ModelFiles:
    """Reads and checks one version.

    Raises:
        ManifestInvalid: a file is missing, differs from its sha256, lies outside the folder, or breaks the schema.
    """
    manifest = parse_manifest(_read(folder, "manifest.json"))
    if (manifest.name, manifest.version) != (folder.parent.name, folder.name):
        raise ManifestInvalid(
            f"manifest.json says {manifest.name}/{manifest.version}, but lies in {folder.parent.name}/{folder.name}: "
            "the folder names the model"
        )
    content = {name: _checked(folder, name, digest) for name, digest in manifest.files.items()}
    try:
        with np.load(io.BytesIO(content["golden.npz"]), allow_pickle=False) as arrays:
            golden = {name: np.asarray(arrays[name]) for name in arrays.files}
    except (ValueError, OSError, BadZipFile) as error:
        raise ManifestInvalid(f"golden.npz cannot be read: {error}") from error
    return ModelFiles(manifest, content["model.onnx"], golden)


def _hidden(path: Path) -> bool:
    return path.name.startswith((".", "_")) or path.parent.name.startswith((".", "_"))


def _read(folder: Path, name: str) -> bytes:
    path = folder / name
    if path.resolve().parent != folder.resolve():
        raise ManifestInvalid(f"{name!r} leads outside the folder of its model: files lie beside manifest.json")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ManifestInvalid(f"{name} cannot be read: {error.strerror}") from error


def _checked(folder: Path, name: str, digest: str) -> bytes:
    content = _read(folder, name)
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise ManifestInvalid(
            f"{name} has sha256 {found}, the manifest says {digest}: the file was changed or cut short; "
            "export the model again"
        )
    return content
