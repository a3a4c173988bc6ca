"""The user's own data by kind, and the same data again for a run that was made of it.

Its one rule: what a run folder keeps of a file is where it lies, what was asked of it and its sha256; a file that has
changed since is another data set. It must not know units or training.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from training.config import DataInfo, option
from training.data import arrays, forecast, text, wav
from training.data.sequences import DataSet
from training.errors import DataError


@dataclass(frozen=True)
class Kind:
    """How one kind of file is loaded, the dataclass of what may be asked of it, and how to train on it unless told."""

    options: type[Any]
    load: Callable[[Path, Any], DataSet]
    settings: dict[str, Any]


# A CSV is short and drifts, and what is learned of it by heart does not come back: hence its L2 penalty.
KINDS: dict[str, Kind] = {
    "csv": Kind(forecast.Options, forecast.load, {"weight_decay": 3e-3}),
    "text": Kind(text.Options, text.load, {"weight_decay": 0.0, "batch_size": 32, "hidden": 128, "patience": 3}),
    "npz": Kind(arrays.Options, arrays.load, {}),
    "wav": Kind(wav.Options, wav.load, {"batch_size": 32, "patience": 8}),
}


def load(kind: str, path: Path, **options: Any) -> DataSet:
    """The data set in `path`, with what loads it again in `info.own`; DataError when the file is not right."""
    known = {field.name for field in fields(KINDS[kind].options)}
    for name in options:
        if name not in known:
            raise DataError(f"{option(name)} says nothing about a --{kind}: leave it out")
    path = path.expanduser().resolve()
    asked = KINDS[kind].options(**{key: tuple(v) if isinstance(v, list) else v for key, v in options.items()})
    found = KINDS[kind].load(path, asked)
    # As JSON gives it back, so that a run and the same run read from its folder are equal.
    own = json.loads(json.dumps({"kind": kind, "path": str(path), **asdict(asked)}))
    return replace(found, info=replace(found.info, own=own))


def again(info: DataInfo) -> DataSet:
    """The data set that `info` was made of; DataError when its file is gone or has changed."""
    found = load(**(info.own | {"path": Path(info.own["path"])}))
    if found.info.sha256 != info.sha256:
        raise DataError(
            f"{info.own['path']} has changed since the run was made of it (sha256 {found.info.sha256}, then "
            f"{info.sha256}): put the old file back, or fit a new run"
        )
    return found
