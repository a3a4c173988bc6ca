"""Finds the model versions under the repository folder and checks that their files are what the manifest says.

Rule: nothing leaves a version's own folder, and no byte is used that its sha256 does not cover. One broken version
is reported beside the others, never instead of them. This module knows files, not ONNX Runtime.
"""

import hashlib
import io
import os
from contextlib import suppress
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

    def __str__(self) -> str:
        """As text that can be told, whatever the folders are called."""
        return "/".join(self).encode("utf-8", "backslashreplace").decode()


# What the system tells of the files of a folder; any write to one of them gives another.
Stamp = tuple[tuple[str | int, ...], ...]


@dataclass(frozen=True)
class ModelFiles:
    """One checked version: its manifest, the bytes of its graph, and its golden vectors.

    `digest` is the sha256 of manifest.json, which has those of the other files: equal digests are the same version.
    """

    manifest: Manifest
    graph: bytes
    golden: dict[str, Array]
    digest: str

    @property
    def key(self) -> ModelKey:
        """Which version it is."""
        return ModelKey(self.manifest.name, self.manifest.version)


@dataclass(frozen=True)
class Loaded:
    """What there is to serve in the repository, and what cannot be."""

    found: list[ModelFiles] = field(default_factory=list)
    broken: dict[ModelKey, LatchError] = field(default_factory=dict)


def load_all(root: Path) -> Loaded:
    """Reads every `<name>/<version>/` under `root`, in order of name and version.

    Raises:
        ManifestInvalid: `root` itself is not a folder.
    """
    result = Loaded()
    for key in _keys(root):
        try:
            result.found.append(load(root / key.name / key.version))
        except LatchError as error:
            result.broken[key] = error
    result.found.sort(key=lambda files: (files.manifest.name, int(files.manifest.version)))
    return result


def stamps(root: Path) -> dict[ModelKey, Stamp]:
    """Every version that there is a folder of, without reading a file.

    Raises:
        ManifestInvalid: `root` itself is not a folder.
        OSError: it cannot be looked into.
    """
    found = {}
    for key in _keys(root):
        try:
            found[key] = _stamp(root / key.name / key.version)
        except (FileNotFoundError, NotADirectoryError):  # gone since
            pass
        except OSError as error:  # its owner's alone, say: `load` tells it
            found[key] = ((str(error),),)
    return found


def load(folder: Path) -> ModelFiles:
    """Reads and checks one version.

    Raises:
        ManifestInvalid: a file is missing, differs from its sha256, lies outside the folder, or breaks the schema.
    """
    try:
        return _load(folder)
    except LatchError:
        raise
    except Exception as error:  # files can be broken in more ways than anybody lists
        raise ManifestInvalid(f"cannot be read: {type(error).__name__}: {error}") from error


def _keys(root: Path) -> list[ModelKey]:
    if not root.is_dir():
        raise ManifestInvalid(f"the model repository {root} is not a folder: set LATCH_MODELS or --models")
    keys = []
    for model in root.iterdir():
        if model.is_dir() and not _hidden(model):
            with suppress(PermissionError):  # the lost+found of a volume, say
                keys += [
                    ModelKey(model.name, path.name) for path in model.iterdir() if path.is_dir() and not _hidden(path)
                ]
    return sorted(keys)


def _stamp(folder: Path) -> Stamp:
    found: list[tuple[str | int, ...]] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                try:
                    status = entry.stat()
                except OSError:  # a link to nowhere, or removed just now
                    found.append((entry.name,))
                else:
                    times = (status.st_mtime_ns, status.st_ctime_ns)
                    found.append((entry.name, status.st_size, *times, status.st_ino))
    return tuple(sorted(found, key=lambda entry: str(entry[0])))


def _load(folder: Path) -> ModelFiles:
    text = _read(folder, "manifest.json")
    manifest = parse_manifest(text)
    key = ModelKey(folder.parent.name, folder.name)
    if key != (manifest.name, manifest.version):
        raise ManifestInvalid(
            f"manifest.json says {manifest.name}/{manifest.version}, but lies in {key}: the folder names the model"
        )
    content = {name: _checked(folder, name, digest) for name, digest in manifest.files.items()}
    try:
        with np.load(io.BytesIO(content["golden.npz"]), allow_pickle=False) as arrays:
            golden = {name: np.asarray(arrays[name]) for name in arrays.files}
    except (ValueError, OSError, BadZipFile) as error:
        raise ManifestInvalid(f"golden.npz cannot be read: {error}") from error
    return ModelFiles(manifest, content["model.onnx"], golden, hashlib.sha256(text).hexdigest())


def _hidden(path: Path) -> bool:
    return path.name.startswith((".", "_"))


def _read(folder: Path, name: str) -> bytes:
    path = folder / name
    if path.resolve().parent != folder.resolve():
        raise ManifestInvalid(f"{name!r} leads outside the folder of its model: files lie beside manifest.json")
    try:
        if not path.is_file() and path.exists():  # who reads a pipe waits for ever
            raise ManifestInvalid(f"{name} is no file")
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
