"""A version of a model as a folder: step graph, manifest, golden vectors, and the checks that its words must pass.

Its one rule: a version appears whole or not at all. It must not know where a graph comes from.
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
from numpy.typing import NDArray

from training.errors import ExportError

Values = dict[str, NDArray[Any]]
Manifest = dict[str, Any]

GOLDEN_SEQUENCES, GOLDEN_STEPS, GOLDEN_SEED = 3, 24, 20141212


def next_version(folder: Path) -> str:
    """One more than the highest version in a model's folder; 1 where there is none."""
    return str(1 + max((int(path.name) for path in folder.glob("*") if path.name.isdecimal()), default=0))


def newest(folder: Path) -> Path | None:
    """The highest version in a model's folder, if there is one."""
    path = folder / str(int(next_version(folder)) - 1)
    return path if path.is_dir() else None


def read_manifest(version: Path) -> Manifest:
    """What a version's folder says of itself; ExportError where that cannot be read."""
    try:
        return json.loads((version / "manifest.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise ExportError(f"{version / 'manifest.json'} cannot be read ({error}): move that folder away") from error


def _schema() -> dict[str, Any]:
    # Not by the package's name: wherever this runs, the user may have a folder `models` of his own.
    path = Path(__file__).parents[1] / "models" / "manifest.schema.json"
    return json.loads(path.read_text("utf-8"))  # type: ignore[no-any-return]


def check_name(name: str, version: str = "1") -> None:
    """ExportError when a model or its version may not be called so: they are folders' names too."""
    allowed = _schema()["properties"]
    for what, called in (("model", name), ("version", version)):
        pattern = allowed["name" if what == "model" else what]["pattern"]
        if not re.search(pattern, called):
            raise ExportError(f"a {what} cannot be called {called!r}: its name must match {pattern}")


def free_version(models: Path, name: str, version: str | None, *, force: bool) -> str:
    """`version`, or the next free one; ExportError when it exists and may not be replaced, or for a wrong name."""
    check_name(name, version or "1")
    version = version or next_version(models / name)
    target = models / name / version
    if target.exists() and not force:
        raise ExportError(f"{target} exists: leave out --version for the next free one, or replace it with --force")
    return version


def check_manifest(manifest: Manifest) -> None:
    """ExportError when `manifest` breaks the schema."""
    try:
        jsonschema.validate(manifest, _schema())
    except jsonschema.ValidationError as error:
        raise ExportError(f"the manifest breaks the contract at {error.json_path}: {error.message}") from error


def error(found: NDArray[Any], expected: NDArray[Any], least: Any = 1.0) -> float:
    """The largest |found - expected|, each over the largest |expected| of its last axis' element, or over `least` where
    that is more: 32-bit floats near zero are as exact as the values that they come from.
    """
    largest = np.abs(expected).max(axis=tuple(range(expected.ndim - 1)), initial=0.0)
    return float((np.abs(found - expected) / np.maximum(least, largest)).max())


def write_version(target: Path, graph: bytes, golden: Values, manifest: Callable[[dict[str, str]], Manifest]) -> Path:
    """Write models/<name>/<version>, in place of one that is there; `manifest` makes its words of the files' sha256.

    Raises what `manifest` raises and ExportError when it breaks the schema; then nothing has changed.
    """
    models = target.parents[1]
    models.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=models))
    try:
        (partial / "model.onnx").write_bytes(graph)
        np.savez(partial / "golden.npz", allow_pickle=False, **golden)
        made = manifest(
            {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(partial.iterdir())}
        )
        check_manifest(made)
        text = json.dumps(made, indent=1, ensure_ascii=False) + "\n"
        (partial / "manifest.json").write_text(text, encoding="utf-8")
        partial.chmod(0o755)  # mkdtemp's folder is private; a served one is not
        target.parent.mkdir(exist_ok=True)
        if target.exists():
            with tempfile.TemporaryDirectory(prefix=".replaced-", dir=models) as old:
                target.rename(Path(old) / target.name)
                partial.replace(target)
        else:
            partial.replace(target)
        return target
    finally:
        shutil.rmtree(partial, ignore_errors=True)
