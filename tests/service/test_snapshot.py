"""A slot as bytes: nothing is lost on the way, and nothing that is not whole gets in."""

import json

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save
from xxhash import xxh3_128_digest

from service.errors import InvalidInput, SnapshotInvalid, SnapshotMismatch
from service.manifest import StatePair
from service.slab import Commits, Slot, StateSlab
from service.snapshot import Snapshot, SnapshotCodec, origin, snapshot

PAIRS = [
    StatePair(name="h", input="h", output="h2", dtype="float32", shape=(2, 3), batch_axis=1),
    StatePair(name="count", input="c", output="c2", dtype="int64", shape=(), batch_axis=0),
    StatePair(name="seen", input="s", output="s2", dtype="int64", shape=(5,), batch_axis=0, initial=(1, 0, 0, 0, 1)),
]
CODEC = SnapshotCodec("m/3", "a" * 64, PAIRS, keep_reply_bytes=100)


def rows(count: int, seed: int = 0) -> list[np.ndarray]:
    """States of so many sessions."""
    rng = np.random.default_rng(seed)
    return [
        rng.normal(size=(count, 2, 3)).astype(np.float32),
        rng.integers(-(2**60), 2**60, count),
        rng.integers(0, 2, (count, 5)),
    ]


def packed(replies: list[bytes | None], seed: int = 0) -> tuple[Commits, list[np.ndarray], list[bytes]]:
    """Commits of so many sessions, one reply each, their states, and their snapshots."""
    count = len(replies)
    digests = [bytes([b]) * 16 for b in range(count)]
    commits = Commits([Slot()] * count, [*range(10, 10 + count)], [*range(7, 7 + count)], digests, replies)
    state = rows(count, seed)
    return commits, state, whole(*CODEC.pack(commits, state))


def whole(bodies: list[bytes], headers: list[bytes]) -> list[bytes]:
    """Snapshots of their two parts."""
    return [header + body for body, header in zip(bodies, headers, strict=True)]


@given(replies=st.lists(st.none() | st.binary(max_size=40), min_size=1, max_size=9), seed=st.integers(0, 99))
def test_what_is_packed_is_unpacked(replies: list[bytes | None], seed: int) -> None:
    """Step, last request, reply (which may be empty, or too large to keep) and every bit of the state."""
    commits, state, data = packed(replies, seed)
    for b, each in enumerate(data):
        found = CODEC.unpack(each)
        assert found.kept is not None
        assert (found.step, *found.kept) == tuple(column[b] for column in (commits[1], commits[2], commits[3], replies))
        for value, expected in zip(found.state, state, strict=True):
            assert (value.dtype, value.tobytes()) == (expected.dtype, expected[b].tobytes())


def test_any_library_of_the_format_reads_it() -> None:
    """A safetensors file with plain names."""
    _, state, [data] = packed([b"reply"])
    tensors = load(data)
    assert set(tensors) == {"position", "digest", "reply", "xxh3", "state.h", "state.count", "state.seen"}
    assert tensors["position"].tolist() == [10, 7]
    assert (tensors["state.h"] == state[0][0]).all()
    assert origin(data) == (("m", "3"), "a" * 64)


def test_every_process_writes_the_same_bytes() -> None:
    """The header is in order, whatever the library makes of it."""
    commits, state, _ = packed([b"one"])
    header = CODEC.pack(commits, state)[1][0][8:]
    document = orjson.loads(header)
    assert orjson.dumps(document, option=orjson.OPT_SORT_KEYS) == header.rstrip()
    assert [*document["__metadata__"]] == ["format", "model", "sha256", "version"]


def test_those_with_as_long_a_reply_share_a_header() -> None:
    """The same object, so that whoever keeps it once finds it again quickly; the bodies have no more than values."""
    commits, state, _ = packed([b"one", b"", b"two", None, b"six"])
    bodies, headers = CODEC.pack(commits, state)
    assert headers[0] is headers[2] is headers[4]
    assert len({*headers}) == 3
    values = 16 + 16 + 16 + sum(rows.nbytes // 5 for rows in state)
    assert [len(body) for body in bodies] == [values + size for size in (3, 0, 3, 0, 3)]


def test_a_slot_is_the_same_after_the_way_out_and_in() -> None:
    """Out of one slab and into another: the two are told apart by nothing."""
    slabs = [StateSlab(PAIRS, 4, lambda: 0.0) for _ in range(2)]
    slots = [Slot(), Slot()]
    for slab, slot in zip(slabs, slots, strict=True):
        slab.acquire(slot)
    slabs[0].commit(Commits([slots[0]], [4], [3], [b"d" * 16], [b"yes"]), rows(1))
    [data] = whole(*CODEC.pack(*snapshot(slabs[0], slots[0]).commits(slots[0])))
    slabs[1].commit(*CODEC.unpack(data).commits(slots[1]))
    one, other = (snapshot(slab, slot) for slab, slot in zip(slabs, slots, strict=True))
    assert one[:2] == other[:2]
    assert [value.tobytes() for value in one.state] == [value.tobytes() for value in other.state]


def test_a_slot_that_has_seen_nothing_has_nothing_to_repeat() -> None:
    """Step 0, and no last request."""
    slab, slot = StateSlab(PAIRS, 4, lambda: 0.0), Slot()
    slab.acquire(slot)
    [data] = whole(*CODEC.pack(*snapshot(slab, slot).commits(slot)))
    assert CODEC.unpack(data)[:2] == (0, None)


@given(data=st.data())
def test_what_is_damaged_is_refused(data: st.DataObject) -> None:
    """One bit anywhere, or a missing end: it never passes for a snapshot."""
    [whole] = packed([b"some reply"])[2]
    if data.draw(st.booleans()):
        broken = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        at = data.draw(st.integers(0, 8 * len(whole) - 1))
        broken = whole[: at // 8] + bytes([whole[at // 8] ^ (1 << at % 8)]) + whole[at // 8 + 1 :]
    with pytest.raises((SnapshotInvalid, SnapshotMismatch)):
        CODEC.unpack(broken)


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 8, b"\xff" * 100, b"{}", save({"x": np.zeros(3)}), save({}, {"format": "latch-snapshot"})]
)
def test_what_is_something_else_is_refused(data: bytes) -> None:
    """Other files, and other safetensors; the message says what to send."""
    with pytest.raises(SnapshotInvalid, match=r"not a snapshot .* unchanged"):
        CODEC.unpack(data)


def test_a_newer_format_is_named() -> None:
    """Both formats are in the message."""
    [data] = packed([b""])[2]
    newer = data.replace(b'"version":"1"', b'"version":"9"')
    assert newer != data
    with pytest.raises(SnapshotInvalid, match="format 9, this version of Latch knows up to 1"):
        CODEC.unpack(newer)


def test_a_snapshot_of_another_model_is_refused_with_both_hashes() -> None:
    """The same shapes are not the same model."""
    [data] = packed([b""])[2]
    other = SnapshotCodec("m/4", "b" * 64, PAIRS, keep_reply_bytes=100)
    with pytest.raises(SnapshotMismatch, match=f"m/3.*{'a' * 64}.*m/4 with {'b' * 64}"):
        other.unpack(data)


def test_a_state_of_another_shape_is_refused() -> None:
    """A hash that says yes is not enough."""
    [data] = packed([b""])[2]
    wider = [StatePair(name="h", input="h", output="h2", dtype="float32", shape=(2, 4), batch_axis=1), *PAIRS[1:]]
    with pytest.raises(SnapshotInvalid, match=r"state\.h of the snapshot is float32\[2, 3\]"):
        SnapshotCodec("m/3", "a" * 64, wider, keep_reply_bytes=100).unpack(data)
    more = StatePair(name="more", input="a", output="b", dtype="float32", shape=(1,), batch_axis=0)
    with pytest.raises(SnapshotInvalid, match=r"lacks state\.more"):
        SnapshotCodec("m/3", "a" * 64, [*PAIRS, more], keep_reply_bytes=100).unpack(data)


def forged(**changes: np.ndarray) -> bytes:
    """A snapshot whose values somebody has changed, and whose checksum is right."""
    [data] = packed([b"reply"])[2]
    metadata = {"format": "latch-snapshot", "version": "1", "model": "m/3", "sha256": "a" * 64}
    tensors = load(data) | {name.replace("_", "."): value for name, value in changes.items()}
    blank = save(tensors | {"xxh3": np.zeros(16, np.uint8)}, metadata)
    start = 8 + int.from_bytes(blank[:8], "little")
    first, last = (start + offset for offset in json.loads(blank[8:start])["xxh3"]["data_offsets"])
    return blank[:first] + xxh3_128_digest(blank) + blank[last:]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"position": np.array([-5, -9])}, "step -5"),
        ({"position": np.array([3, 900])}, "began at 900"),
        ({"position": np.array([3, -1])}, "began at -1"),
        ({"position": np.array([3.5, np.nan])}, r"position of the snapshot is float64\[2\]"),
        ({"position": np.array([[3], [1]])}, r"position of the snapshot is int64\[2, 1\]"),
        ({"digest": np.zeros(32, np.uint8)}, r"digest of the snapshot is uint8\[32\]"),
        ({"reply": np.zeros((2, 2))}, "reply of the snapshot is float64"),
        ({"state_h": np.full((2, 3), np.nan, np.float32)}, "state h of the snapshot is not finite"),
    ],
)
def test_values_that_no_session_has_are_refused(changes: dict[str, np.ndarray], problem: str) -> None:
    """A checksum keeps nobody from making a snapshot; what it says would be saved beside what others have."""
    assert CODEC.unpack(forged()).step == 10
    with pytest.raises(SnapshotInvalid, match=problem):
        CODEC.unpack(forged(**changes))


def test_a_step_beyond_all_use_is_refused_from_clients_only() -> None:
    """A session that began at the last one that may be restored is read again from a store, whatever it did since."""
    last, beyond = (forged(position=np.array([step, 1])) for step in (2**53, 2**53 + 1))
    assert CODEC.restore(last).step == 2**53
    assert CODEC.unpack(beyond).step == 2**53 + 1
    with pytest.raises(SnapshotInvalid, match=f"step {2**53 + 1}"):
        CODEC.restore(beyond)


def test_a_reply_that_is_too_large_to_keep_is_not_kept_from_a_snapshot_either() -> None:
    """The limit is that of the service that reads it."""
    kept = [CODEC.unpack(packed([bytes(size)])[2][0]).kept for size in (100, 101)]
    assert [len(each.reply) if each and each.reply is not None else None for each in kept] == [100, None]


def test_more_tensors_than_any_model_has_are_not_looked_at() -> None:
    """The header alone is refused by its size."""
    with pytest.raises(SnapshotInvalid, match="header"):
        origin(save({f"t{i}": np.zeros(0, np.uint8) for i in range(20_000)}))


def test_a_session_may_begin_somewhere_else() -> None:
    """Values by name; what is not given is the model's own."""
    start = CODEC.start({"h": [[1, 2, 3], [4, 5, 6]]})
    assert start[:2] == Snapshot(0, None, [])[:2]
    assert [value.tolist() for value in start.state] == [[[1, 2, 3], [4, 5, 6]], 0, [1, 0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"g": [1]}, "no state 'g': m/3 has h, count, seen"),
        ({"h": [[1, 2], [3, 4]]}, r"\$\.state\.h has shape \[2, 2\]"),
        ({"h": [[1, 2, 3], [4, 5]]}, r"\$\.state\.h is not float32\[2, 3\]"),
        ({"h": [[1, 2, 3], [4, 5, "six"]]}, r"\$\.state\.h is not float32"),
        ({"h": [[1, 2, 3], [4, 5, float("inf")]]}, "all finite"),
        ({"h": None}, r"\$\.state\.h"),
        ({"h": [[1, 2, 3], [4, 5, 1e39]]}, "all finite"),
        ({"count": 2**70}, r"\$\.state\.count"),
        ({"count": 1.9}, r"\$\.state\.count is not int64.*got `float`"),
        ({"count": "7"}, r"\$\.state\.count is not int64.*got `str`"),
        ({"count": True}, r"\$\.state\.count is not int64.*got `bool`"),
        ({"h": [[1, 2, 3], [4, True, 6]]}, r"\$\.state\.h is not float32.*got `bool`"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(values: dict[str, object], problem: str) -> None:
    """The path of the bad value is in the message."""
    with pytest.raises(InvalidInput, match=problem) as caught:
        CODEC.start(values)
    assert caught.value.extras["path"].startswith("$.state.")
