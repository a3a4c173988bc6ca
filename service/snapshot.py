"""A slot outside the slab: where a session stands as bytes, to be stored, moved to another machine, or forked.

The bytes are a safetensors file that any library of that format reads: `position` (step, first step of the last
request; int64), `digest` (16 bytes of that request), `reply` (its packed rows; absent where they were too large to
keep), `state.<name>` for each state tensor, and `xxh3`, the XXH3-128 of the whole file with these 16 bytes as zeros.
The metadata names the format, its version, the model, and the sha256 of its graph.

Rule: bytes to values and back. It knows neither stores nor sessions. Packing is on the path of every step where
sessions are stored, so a batch is packed with a few array operations.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec
import numpy as np
import orjson
from numpy.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.numpy import load, save
from xxhash import xxh3_128_digest

from service.errors import InvalidInput, SnapshotInvalid, SnapshotMismatch
from service.manifest import Array, StatePair
from service.slab import Commits, Kept, Slot, StateSlab
from service.wire.native import nested

FORMAT, VERSION = "latch-snapshot", 1
_STATE = "state."
_HASH = "xxh3"
_MAX_HEADER = 2**20  # bytes; more tensors than any model has would keep the loop busy
_LAST_STEP = 2**53  # the numbers that JSON has for sure; from here a store has room for more steps than there will be


class Snapshot(NamedTuple):
    """Where a session stood: its step, its last request, and one [*shape] a state pair."""

    step: int
    kept: Kept | None
    state: list[Array]

    def commits(self, slot: Slot) -> tuple[Commits, list[Array]]:
        """What has a slot stand there: the arguments of `StateSlab.commit`."""
        kept = self.kept or Kept(0, bytes(16), None)
        row = Commits([slot], [self.step], [kept.first_step], [kept.digest], [kept.reply])
        return row, [values[None] for values in self.state]


def snapshot(slab: StateSlab, slot: Slot) -> Snapshot:
    """Where a slot stands."""
    return Snapshot(slab.step(slot), slab.kept(slot), [rows[0] for rows in slab.gather([slot])])


class _Layout(NamedTuple):
    """The file of a reply size: its bytes with all values zero, those before the values, and where these stand."""

    template: Array
    header: bytes
    places: dict[str, slice]


class SnapshotCodec:
    """Packs and unpacks the snapshots of one model version.

    Args:
        model: name/version.
        sha256: of its graph.
        pairs: its state tensors.
        keep_reply_bytes: largest reply that is kept, here and of other services' snapshots.
    """

    def __init__(self, model: str, sha256: str, pairs: Sequence[StatePair], *, keep_reply_bytes: int) -> None:
        self._model = model
        self._sha256 = sha256
        self._pairs = pairs
        self._keep_reply_bytes = keep_reply_bytes
        self._layout = lru_cache(maxsize=64)(self._lay_out)

    def pack(self, commits: Commits, state: Sequence[Array]) -> tuple[list[bytes], list[bytes]]:
        """The snapshots of what `commits` and `state` ([B, *shape] a pair) say of B slots.

        Returns:
            B times the values, and B times the header that comes before them, which all with as long a reply share.
        """
        sizes = [-1 if reply is None else len(reply) for reply in commits.replies]
        if sizes.count(sizes[0]) == len(sizes):
            return self._pack(sizes[0], commits, state)
        packed: dict[int, tuple[bytes, bytes]] = {}
        for size in set(sizes):
            rows = [b for b, other in enumerate(sizes) if other == size]
            parts = self._pack(size, commits.pick(rows), [values[rows] for values in state])
            packed |= zip(rows, zip(*parts, strict=True), strict=True)
        return [packed[b][0] for b in range(len(sizes))], [packed[b][1] for b in range(len(sizes))]

    def _pack(self, size: int, commits: Commits, state: Sequence[Array]) -> tuple[list[bytes], list[bytes]]:
        layout, count = self._layout(size), len(commits.steps)
        files = np.repeat(layout.template[None], count, axis=0)
        values = {
            "position": np.array([commits.steps, commits.first_steps], "<i8").T,
            "digest": np.frombuffer(b"".join(commits.digests), np.uint8),
            **{_STATE + pair.name: rows for pair, rows in zip(self._pairs, state, strict=True)},
        }
        if size > 0:
            values["reply"] = np.frombuffer(b"".join(commits.replies), np.uint8)  # type: ignore[arg-type]  # none is None
        for name, rows in values.items():
            files[:, layout.places[name]] = np.ascontiguousarray(rows).view(np.uint8).reshape(count, -1)
        hashes = b"".join([xxh3_128_digest(file) for file in files])
        files[:, layout.places[_HASH]] = np.frombuffer(hashes, np.uint8).reshape(count, -1)
        bodies = np.ascontiguousarray(files[:, len(layout.header) :])
        return bodies.view(f"V{bodies.shape[1]}").ravel().tolist(), [layout.header] * count

    def unpack(self, data: bytes) -> Snapshot:
        """Reads a snapshot of this model version.

        Raises:
            SnapshotInvalid: damaged, cut short, or no snapshot.
            SnapshotMismatch: of another model or version, by the hash of its graph.
        """
        key, sha256, tensors = _opened(data)
        if sha256 != self._sha256:
            model = "/".join(key)
            raise SnapshotMismatch(
                f"the snapshot is of {model}, whose graph has sha256 {sha256}; this session runs {self._model} with "
                f"{self._sha256}: a state means nothing to another model",
                model=model,
            )
        step, first_step = _value(tensors, "position", np.int64, (2,)).tolist()
        if not 0 <= first_step <= step:
            raise SnapshotInvalid(f"the snapshot is at step {step}, and its last request began at {first_step}")
        digest, reply = _value(tensors, "digest", np.uint8, (16,)), None
        if (rows := tensors.get("reply")) is not None and rows.nbytes <= self._keep_reply_bytes:
            reply = _value(tensors, "reply", np.uint8, (rows.size,)).tobytes()
        state = [_value(tensors, _STATE + pair.name, pair.dtype, pair.shape) for pair in self._pairs]
        for pair, value in zip(self._pairs, state, strict=True):
            if not np.isfinite(value).all():
                raise SnapshotInvalid(f"state {pair.name} of the snapshot is not finite: no step could follow")
        return Snapshot(step, Kept(first_step, digest.tobytes(), reply) if first_step else None, state)

    def start(self, values: Mapping[str, Any]) -> Snapshot:
        """Where a session begins: the state tensors of `values` (nested lists of `shape`), the others as always.

        Raises:
            InvalidInput: no such state, another shape, or not finite.
        """
        if unknown := sorted(values.keys() - {pair.name for pair in self._pairs}):
            known = ", ".join(pair.name for pair in self._pairs)
            raise InvalidInput(f"no state {unknown[0]!r}: {self._model} has {known}", path=f"$.state.{unknown[0]}")
        state = []
        for pair in self._pairs:
            value = pair.initial_value()
            if pair.name in values:
                path = f"$.state.{pair.name}"
                try:
                    given = msgspec.convert(values[pair.name], nested(pair.dtype, pair.shape))
                    with np.errstate(over="ignore"):  # infinite, then
                        value = np.array(given, pair.dtype)
                except (ValueError, OverflowError) as error:  # msgspec's is a ValueError
                    raise InvalidInput(f"{path} is not {pair.dtype}{list(pair.shape)}: {error}", path=path) from error
                if value.shape != pair.shape or not np.isfinite(value).all():
                    raise InvalidInput(
                        f"{path} has shape {list(value.shape)}: {pair.dtype}{list(pair.shape)} is needed, all finite",
                        path=path,
                    )
            state.append(value)
        return Snapshot(0, None, state)

    def restore(self, data: bytes) -> Snapshot:
        """`unpack`, of what a client sends. Raises SnapshotInvalid, too, for a step that is beyond all use."""
        found = self.unpack(data)
        if found.step > _LAST_STEP:
            raise SnapshotInvalid(f"the snapshot is at step {found.step}: sessions go on from {_LAST_STEP} at most")
        return found

    def _lay_out(self, reply_size: int) -> _Layout:
        zeros: dict[str, Array] = {
            "position": np.zeros(2, np.int64),
            "digest": np.zeros(16, np.uint8),
            _HASH: np.zeros(16, np.uint8),
            **{_STATE + pair.name: np.zeros(pair.shape, pair.dtype) for pair in self._pairs},
        }
        if reply_size >= 0:
            zeros["reply"] = np.zeros(reply_size, np.uint8)
        metadata = {"format": FORMAT, "version": str(VERSION), "model": self._model, "sha256": self._sha256}
        data = save(zeros, metadata)
        header = _header(data)  # in an order of the process's own, and every replica shall give the same bytes
        ordered = orjson.dumps(orjson.loads(header), option=orjson.OPT_SORT_KEYS).ljust(len(header))
        data = data[:8] + ordered + data[8 + len(header) :]
        return _Layout(np.frombuffer(data, np.uint8), data[: 8 + len(_header(data))], _places(data))


def origin(data: bytes) -> tuple[tuple[str, str], str]:
    """The model (name and version) that a snapshot is of, and the sha256 of its graph; checks that it is whole.

    Raises:
        SnapshotInvalid: damaged, cut short, of a newer version, or no snapshot.
    """
    return _opened(data)[:2]


def _opened(data: bytes) -> tuple[tuple[str, str], str, dict[str, Array]]:
    """`origin`, and the tensors."""
    try:
        if int.from_bytes(data[:8], "little") > _MAX_HEADER:
            raise ValueError(f"its header has over {_MAX_HEADER} bytes")
        tensors = load(data)
        metadata = orjson.loads(_header(data))["__metadata__"]
        if metadata["format"] != FORMAT:
            raise KeyError(FORMAT)
        version, model, sha256 = int(metadata["version"]), metadata["model"], metadata["sha256"]
        name, number = model.split("/")
        place = _places(data)[_HASH]
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise SnapshotInvalid(
            f"not a snapshot ({len(data)} bytes): {error or type(error).__name__}; send what GET .../state gave, "
            "unchanged, as application/octet-stream"
        ) from error
    if version > VERSION:
        raise SnapshotInvalid(f"the snapshot has format {version}, this version of Latch knows up to {VERSION}")
    if xxh3_128_digest(data[: place.start] + bytes(16) + data[place.stop :]) != data[place]:
        raise SnapshotInvalid("the snapshot is damaged: its checksum differs; take it again, or another copy")
    return (name, number), sha256, tensors


def _value(tensors: Mapping[str, Array], name: str, dtype: DTypeLike, shape: tuple[int, ...]) -> Array:
    """One tensor of a file. Raises SnapshotInvalid where it is missing, or another than it must be."""
    if (value := tensors.get(name)) is None:
        raise SnapshotInvalid(f"the snapshot lacks {name}")
    if (value.shape, value.dtype) != (shape, np.dtype(dtype)):
        raise SnapshotInvalid(
            f"{name} of the snapshot is {value.dtype}{list(value.shape)}: {np.dtype(dtype)}{list(shape)} is needed"
        )
    return value


def _header(data: bytes) -> bytes:
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def _places(data: bytes) -> dict[str, slice]:
    """Where each tensor stands in a file."""
    header = _header(data)
    start = 8 + len(header)
    tensors = {name: entry for name, entry in orjson.loads(header).items() if name != "__metadata__"}
    return {name: slice(*(start + offset for offset in entry["data_offsets"])) for name, entry in tensors.items()}
