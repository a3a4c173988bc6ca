"""A run folder: `run.json` (what was asked and what came out), `last.safetensors`, `best.safetensors`, `logs/`.

Its one rule: a file is replaced whole or not at all, and everything that must agree is in one file, so a kill at any
moment leaves a folder to resume from. No pickle. It must not know Lightning or how a model is trained.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.config import DataInfo, ModelConfig, TrainConfig, option
from training.errors import CheckpointError
from training.model import RecurrentModel

if sys.platform != "win32":
    import fcntl

Tensors = dict[str, Tensor]


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Makes `folder` and holds it; CheckpointError where another process does, or this one already.

    The system lets go of it when the process ends, however it ends; no file is left behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":  # which has no such lock
        yield
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(opened)
        raise CheckpointError(
            f"another latch-train is at work in {folder}: wait for its end, or choose another --run"
        ) from None
    except OSError:  # a file system without locks, where nothing can be told
        pass
    try:
        yield
    finally:
        os.close(opened)


def replace(path: Path, text: str) -> None:
    """Write `text` to `path` in one stroke."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def save_tensors(path: Path, tensors: Tensors, meta: dict[str, Any]) -> None:
    """Tensors and their JSON meta as one safetensors file, in one stroke; CheckpointError where the disk refuses it."""
    partial = path.with_name(path.name + ".tmp")
    # safetensors refuses tensors that share memory; a state may.
    whole = {name: value.contiguous().clone() for name, value in tensors.items()}
    try:
        save_file(whole, partial, {"meta": json.dumps(meta)})
        partial.replace(path)
    except (SafetensorError, OSError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path} cannot be written ({error}): make room on its disk, or choose another --run"
        ) from error


def load_tensors(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """What `save_tensors` wrote; CheckpointError when the file is absent, truncated or something else."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: fit the run for at least one whole epoch first")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["meta"])  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a readable checkpoint ({error}): delete the run's folder and fit again"
        ) from error


def named(data: Mapping[str, Any], *settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was asked, by the names of the options that say it; and what of the data no option says."""
    own = data["own"]
    asked = {option(own.get("kind", name) if name == "path" else name): own[name] for name in own if name != "kind"}
    told = {f"data {name}": value for name, value in data.items() if name != "own"}
    return [asked | told, *({option(name): value for name, value in each.items()} for each in settings)]


def changes(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> Iterator[tuple[str, Any, Any]]:
    """Each name whose value differs, with both values."""
    for then, later in zip(before, now, strict=True):
        for name in then | later:
            if then.get(name) != later.get(name):
                yield name, then.get(name), later.get(name)


def flatten_optimiser(optimiser: torch.optim.Optimizer) -> Tensors:
    """The optimiser's tensors under names like `optimiser.3.exp_avg`; its settings are the run's, not the file's."""
    return {
        f"optimiser.{index}.{name}": value
        for index, slot in optimiser.state_dict()["state"].items()
        for name, value in slot.items()
    }


def restore_optimiser(optimiser: torch.optim.Optimizer, tensors: Tensors) -> None:
    """The inverse of `flatten_optimiser`."""
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "optimiser":
            index, name = rest.split(".")
            slots.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({"state": slots, "param_groups": optimiser.state_dict()["param_groups"]})


def split_off(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors under `prefix.`, without it."""
    return {key.removeprefix(f"{prefix}."): value for key, value in tensors.items() if key.startswith(f"{prefix}.")}


@dataclass(frozen=True)
class Run:
    """What `run.json` holds; `result` is None until the run has finished."""

    data: DataInfo
    model: ModelConfig
    train: TrainConfig
    libraries: dict[str, str]
    result: dict[str, Any] | None = None

    def save(self, folder: Path) -> None:
        """Write `run.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        replace(folder / "run.json", json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Run":
        """Read `run.json`; CheckpointError when it is absent or not one."""
        path = folder / "run.json"
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist: {folder} is not the folder of a run")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            pairs = {side: tuple((name, unit) for name, unit in found["data"][side]) for side in ("inputs", "outputs")}
            return cls(
                DataInfo(**(found["data"] | pairs)),
                ModelConfig(**(found["model"] | {"residual": tuple(found["model"].get("residual", ()))})),
                TrainConfig(**found["train"]),
                found["libraries"],
                found["result"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not a run's description ({error}): choose another folder") from error

    def same_as(self, other: "Run") -> None:
        """CheckpointError naming the first setting in which `other` asks for another run; limits may differ."""
        mine, theirs = (named(asdict(run.data), asdict(run.model), asdict(run.train)) for run in (self, other))
        for name, before, now in changes(mine, theirs):
            if name not in map(option, self.train.limits):
                raise CheckpointError(
                    f"the folder holds a run with {name}={before!r}, not {now!r}: "
                    f"choose another --run, or delete the folder to start over"
                )

    def best_model(self, folder: Path) -> tuple[RecurrentModel, int]:
        """The model with its best weights so far, in evaluation mode, and the epoch that they are of."""
        model = RecurrentModel(self.model)
        tensors, meta = load_tensors(folder / "best.safetensors")
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise CheckpointError(f"{folder / 'best.safetensors'} does not fit run.json: {error}") from error
        return model.eval(), meta["epoch"]
