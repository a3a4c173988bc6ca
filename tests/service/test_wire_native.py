"""The JSON codec: round trips to the last bit, and the path of every bad value."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from service.errors import InvalidInput, LatchError, Malformed, PayloadTooLarge
from service.registry import load
from service.wire import StepReply, StepRequest, native
from service.wire.native import NativeCodec, read_envelope
from service.wire.rows import Field, RowFormat


@pytest.fixture(scope="module")
def toy(repository: Path) -> NativeCodec:
    """Rows of 3 float32."""
    return NativeCodec(RowFormat.of(load(repository / "toy" / "1").manifest), max_steps=100)


@pytest.fixture(scope="module")
def counter(repository: Path) -> NativeCodec:
    """A single int64 a step."""
    return NativeCodec(RowFormat.of(load(repository / "counter" / "1").manifest), max_steps=100)


floats = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.just(3)),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@given(rows=floats)
def test_float32_survives_json_in_and_out(toy: NativeCodec, rows: np.ndarray) -> None:
    """What the service writes, read as any JSON reader does, sent back and read by the service, is bit-equal."""
    padded = np.pad(rows, ((0, 0), (0, 1)))  # a row of y has four values, one of the input three
    written = toy.encode_reply(StepReply(("y",), padded.tobytes(), 1, len(rows)), 0.0)
    values = [row[:3] for row in json.loads(written)["outputs"]["y"]]
    np.testing.assert_array_equal(np.array(values, np.float32), rows)
    again = toy.decode_step(json.dumps({"inputs": values}).encode())
    assert (again.data, again.steps) == (rows.tobytes(), len(rows))


@given(ids=hnp.arrays(np.int64, st.integers(1, 5)))
def test_int64_survives_json_in_and_out(counter: NativeCodec, ids: np.ndarray) -> None:
    """All 64 bits of an id."""
    totals = np.stack([ids, ids + 1]).tobytes()[: ids.nbytes]
    values = json.loads(counter.encode_reply(StepReply(("steps",), totals, 1, len(ids)), 0.0))["outputs"]["steps"]
    assert np.ravel(values).tolist() == ids.tolist()
    assert counter.decode_step(json.dumps({"inputs": np.ravel(values).tolist()})).data == ids.tobytes()


def test_a_step_has_its_number_and_outputs(toy: NativeCodec) -> None:
    """The default is the first output and the next step; names may be outputs, gates and states, each once."""
    plain = toy.decode_step('{"inputs": [[1, 2, 3]]}')
    assert (plain.outputs, plain.first_step, plain.steps) == (("y",), None, 1)
    assert plain.data == np.array([1, 2, 3], np.float32).tobytes()
    full = toy.decode_step('{"inputs": [[1, 2, 3]], "step": 7, "outputs": ["z", "h", "z"]}')
    assert (full.outputs, full.first_step) == (("z", "h"), 7)
    assert toy.decode_step('{"inputs": [[1, 2, 3]], "step": null, "outputs": []}').outputs == ()


BAD_STEPS: list[tuple[str, type[LatchError], str | None]] = [
    ("", Malformed, None),
    ("{", Malformed, None),
    ("\x00", Malformed, None),
    ("nope", Malformed, None),
    ('{"inputs": [[1, 2, 3]]} x', Malformed, None),
    ("[" * 60_000, InvalidInput, "$"),
    ("[]", InvalidInput, "$"),
    ("{}", InvalidInput, "$"),
    ('{"inputs": null}', InvalidInput, "$.inputs"),
    ('{"inputs": 1}', InvalidInput, "$.inputs"),
    ('{"inputs": []}', InvalidInput, "$.inputs"),
    ('{"inputs": [[]]}', InvalidInput, "$.inputs[0]"),
    ('{"inputs": [1, 2, 3]}', InvalidInput, "$.inputs[0]"),
    ('{"inputs": [[1, 2, 3], [1, 2]]}', InvalidInput, "$.inputs[1]"),
    ('{"inputs": [[1, 2, 3], [1, 2, 3, 4]]}', InvalidInput, "$.inputs[1]"),
    ('{"inputs": [[1, 2, [3]]]}', InvalidInput, "$.inputs[0][2]"),
    ('{"inputs": [[[1, 2, 3]]]}', InvalidInput, "$.inputs[0]"),
    ('{"inputs": [[1, "2", 3]]}', InvalidInput, "$.inputs[0][1]"),
    ('{"inputs": [[1, true, 3]]}', InvalidInput, "$.inputs[0][1]"),
    ('{"inputs": [[1, null, 3]]}', InvalidInput, "$.inputs[0][1]"),
    ('{"inputs": [[1, 2, 3], [1, NaN, 3]]}', InvalidInput, "$.inputs[1][1]"),
    ('{"inputs": [[1, Infinity, 3]]}', InvalidInput, "$.inputs[0][1]"),
    ('{"inputs": [[1, -Infinity, 3]]}', InvalidInput, "$.inputs[0][1]"),
    ('{"inputs": [[1, 1e39, 3]]}', InvalidInput, "$.inputs[0][1]"),
    ('{"inputs": [[1, -1e999, 3]]}', InvalidInput, "$.inputs[0][1]"),
    ('{"inputs": [[1, 2, 3]], "step": 0}', InvalidInput, "$.step"),
    ('{"inputs": [[1, 2, 3]], "step": -1}', InvalidInput, "$.step"),
    ('{"inputs": [[1, 2, 3]], "step": 1.5}', InvalidInput, "$.step"),
    ('{"inputs": [[1, 2, 3]], "step": "1"}', InvalidInput, "$.step"),
    ('{"inputs": [[1, 2, 3]], "outputs": ["y", "q"]}', InvalidInput, "$.outputs[1]"),
    ('{"inputs": [[1, 2, 3]], "outputs": "y"}', InvalidInput, "$.outputs"),
    ('{"inputs": [[1, 2, 3]], "input": 1}', InvalidInput, "$"),
    (json.dumps({"inputs": [[1, 2, 3]] * 101}), PayloadTooLarge, "$.inputs"),
]


@pytest.mark.parametrize(("body", "kind", "path"), BAD_STEPS, ids=[body[:40] for body, _, _ in BAD_STEPS])
def test_a_bad_step_is_named(toy: NativeCodec, body: str, kind: type[LatchError], path: str | None) -> None:
    """Each bad body gives its error, with the path of the first bad value."""
    for form in (body, body.encode()):
        with pytest.raises(kind) as caught:
            toy.decode_step(form)
        assert caught.value.extras.get("path") == path
        assert path is None or path in str(caught.value)


@pytest.mark.parametrize("value", ["1.5", '"1"', "true", "[1]", "9223372036854775808", "1e400", "null"])
def test_a_bad_id_is_named(counter: NativeCodec, value: str) -> None:
    """Whatever is no 64-bit integer is refused where it stands."""
    with pytest.raises(InvalidInput) as caught:
        counter.decode_step(f'{{"inputs": [1, {value}]}}')
    assert caught.value.extras["path"] == "$.inputs[1]"


@pytest.mark.parametrize("value", [3.4028235e38, 3.402823669209385e38, 3.4028235677973362e38, 3.40282356779733e38])
def test_the_edge_of_float32_is_where_rounding_puts_it(toy: NativeCodec, value: float) -> None:
    """A number is refused exactly where it would become infinite, and the fast and the slow read agree on where."""
    with np.errstate(over="ignore"):
        fits = bool(np.isfinite(np.float32(value)))
    if fits:
        assert toy.decode_step(f'{{"inputs": [[1, 2, {value!r}]]}}').data[8:] == np.float32(value).tobytes()
    for last in ("3", "null"):
        if fits and last == "3":
            continue
        with pytest.raises(InvalidInput) as caught:
            toy.decode_step(f'{{"inputs": [[1, 2, {value!r}], [1, 2, {last}]]}}')
        assert caught.value.extras["path"] == ("$.inputs[1][2]" if fits else "$.inputs[0][2]")


def test_a_body_over_the_limit_is_refused_before_it_is_searched(toy: NativeCodec) -> None:
    """Too many steps with a bad value at the end are too many steps: nobody waits for the search."""
    for body in ({"inputs": [[1, 2, 3]] * 101 + [[None]]}, {"sequences": [[[1, 2, 3]] * 101, [[None]]]}):
        with pytest.raises(PayloadTooLarge):
            (toy.decode_step if "inputs" in body else toy.decode_predict)(json.dumps(body).encode())


@pytest.mark.parametrize(
    ("body", "many"),
    [
        ('{"sequences": [@]}', "[],"),
        ('{"inputs": [[@]]}', "{},"),
        ('{"inputs": [[@]]}', "1,"),
        ('{"inputs": [[1, 2, 3]], "outputs": [@]}', '"y",'),
        ('{"inputs": @]}', "["),
    ],
    ids=["sequences", "objects", "numbers", "names", "depth"],
)
def test_a_body_of_what_no_request_has_is_refused_before_it_is_read(
    toy: NativeCodec, body: str, many: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Millions of lists or values take seconds to read, in which everybody would wait."""
    monkeypatch.setattr(native.json, "loads", None)
    body = body.replace("@", many * 70_000)
    for decode in (toy.decode_step, toy.decode_predict):
        for form in (body, body.encode()):
            with pytest.raises(PayloadTooLarge, match="one request may carry 100 steps, which have at most") as caught:
                decode(form)  # type: ignore[arg-type]
            assert caught.value.extras["limit"] == 100


def test_the_largest_request_is_within_the_counts(repository: Path) -> None:
    """As many steps as there may be, of any shape, in one sequence or in one each, with every output."""
    fields = {"y": Field("float32", (2, 3)), "h": Field("float32", (1,))}
    codec = NativeCodec(RowFormat(Field("float32", (2, 3)), fields), max_steps=5_000)
    row = [[1.5, 2.5, 3.5], [4.5, 5.5, 6.5]]
    names = ["y", "h", "y"]
    body = json.dumps({"inputs": [row] * 5_000, "outputs": names}).encode()
    assert codec.decode_step(body).steps == 5_000
    assert len(codec.decode_predict(json.dumps({"sequences": [[row]] * 5_000, "outputs": names}).encode())) == 5_000


def test_a_message_that_names_no_session_is_not_searched_for_ever() -> None:
    """One that is no JSON is read again for its NaN only where it is no larger than a request."""
    assert read_envelope('{"session": "a", "inputs": [[NaN]]}').session == "a"
    with pytest.raises(Malformed):
        read_envelope(f'{{"session": "a", "inputs": [[NaN{", []" * 70_000}]]}}')


@given(body=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
def test_no_bytes_raise_anything_else(toy: NativeCodec, body: bytes) -> None:
    """Random bytes are a typed error, never another exception."""
    for decode in (toy.decode_step, toy.decode_predict):
        with pytest.raises(LatchError):
            decode(body)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


almost_rows = st.lists(st.lists(st.floats() | st.integers(), min_size=2, max_size=3), min_size=1, max_size=3)


@given(
    inputs=json_values | almost_rows,
    step=json_values | st.integers(-1, 3),
    outputs=json_values | st.lists(st.sampled_from(["y", "z", "q"]), max_size=2),
)
@example(inputs=[[1, 2.5, -3]], step=1, outputs=["y"])
def test_no_json_raises_anything_else(toy: NativeCodec, inputs: Any, step: Any, outputs: Any) -> None:
    """Any JSON in the fields decodes to finite rows of the right shape, or is a typed error."""
    for decode, key in ((toy.decode_step, "inputs"), (toy.decode_predict, "sequences")):
        body = {key: inputs} | ({"step": step} if key == "inputs" else {}) | {"outputs": outputs}
        try:
            decoded = decode(json.dumps(body).encode())
        except LatchError:
            continue
        for request in [decoded] if isinstance(decoded, StepRequest) else decoded:
            rows = np.frombuffer(request.data, np.float32).reshape(request.steps, 3)
            assert len(rows) >= 1
            assert np.isfinite(rows).all()


@pytest.mark.parametrize(
    ("body", "kind", "path"),
    [
        ('{"sequences": []}', InvalidInput, "$.sequences"),
        ('{"sequences": [[[1, 2, 3]], []]}', InvalidInput, "$.sequences[1]"),
        ('{"sequences": [[[1, 2, 3]], [[1, 2]]]}', InvalidInput, "$.sequences[1][0]"),
        ('{"sequences": [[[1, 2, NaN]]]}', InvalidInput, "$.sequences[0][0][2]"),
        (json.dumps({"sequences": [[[1, 2, 3]] * 60] * 2}), PayloadTooLarge, "$.sequences"),
    ],
)
def test_a_bad_sequence_is_named(toy: NativeCodec, body: str, kind: type[LatchError], path: str) -> None:
    """Predict's bodies are held to the same rules, with the sequence in the path."""
    with pytest.raises(kind) as caught:
        toy.decode_predict(body.encode())
    assert caught.value.extras["path"] == path


def test_predict_replies_in_order(counter: NativeCodec) -> None:
    """One object a sequence."""
    replies = [StepReply(("y",), np.array([i], np.float32).tobytes(), 1, 1) for i in range(3)]
    written = b"".join(counter.parts_of_predictions(replies))
    assert [s["outputs"]["y"] for s in json.loads(written)["sequences"]] == [[0], [1], [2]]


@pytest.mark.parametrize("steps", [1, 3, 5000])
@pytest.mark.parametrize("names", [("y",), ("h", "y", "n"), ()])
def test_a_long_reply_is_written_in_parts(steps: int, names: tuple[str, ...]) -> None:
    """To the same bytes, however many rows there are of however many outputs; and no part is long."""
    rows = RowFormat(
        Field("float32", (3,)), {"y": Field("float32", (2, 3)), "h": Field("float32", (40,)), "n": Field("int64", ())}
    )
    codec = NativeCodec(rows, max_steps=10_000)
    size = steps * rows.output_bytes(names)
    floats = np.random.default_rng(0).normal(size=size // 4).astype(np.float32)
    reply = StepReply(names, floats.tobytes(), 4, 3 + steps, True)
    parts = [*codec.parts_of_reply(reply, 1.5)]
    assert b"".join(parts) == codec.encode_reply(reply, 1.5)
    assert max(map(len, parts)) < 250_000
    both = json.loads(b"".join(codec.parts_of_predictions([reply, reply])))
    assert both == {"sequences": [{"outputs": json.loads(codec.encode_reply(reply, 1.5))["outputs"]}] * 2}


def test_a_very_large_body_is_not_read_twice() -> None:
    """What is wrong with it is told all the same, in fewer words."""
    codec = NativeCodec(RowFormat(Field("float32", (3,)), {"y": Field("float32", (1,))}), max_steps=2**20)
    rows = [[1, 2, 3]] * 9 + [[1, "two", 3]]
    for filler, words in (
        ("", 'is "two": the model takes a finite float32'),
        (" " * 2**20, "Expected `float`, got `str`"),
    ):
        with pytest.raises(InvalidInput, match=words) as caught:
            codec.decode_step(json.dumps({"inputs": rows}) + filler)
        assert caught.value.extras["path"] == "$.inputs[9][1]"


def test_an_id_that_no_session_has_is_not_looked_for() -> None:
    """However long it is."""
    assert read_envelope(json.dumps({"session": "a" * 128})).session == "a" * 128
    with pytest.raises(InvalidInput, match=r"names no session: .* length <= 128") as caught:
        read_envelope(json.dumps({"session": "a" * 129}))
    assert caught.value.extras["path"] == "$.session"


def test_the_digest_tells_requests_apart() -> None:
    """Other inputs, fewer of them, or other outputs have another digest; the same has the same."""
    rows = np.arange(6, dtype=np.float32).tobytes()
    base = StepRequest(rows, 2, ("y",), 1)
    assert len(base.digest) == 16
    assert base.digest == StepRequest(bytes(bytearray(rows)), 2, ("y",)).digest
    others = [StepRequest(rows[::-1], 2, ("y",)), StepRequest(rows, 2, ("y", "z")), StepRequest(rows, 2, ())]
    others.append(StepRequest(rows[:12], 1, ("y",)))
    assert all(other.digest != base.digest for other in others)


def test_a_duplicate_is_flagged(toy: NativeCodec) -> None:
    """`replayed` and `already_applied` appear only where they are true."""
    plain = json.loads(toy.encode_reply(StepReply((), b"", 1, 1), 0.5))
    assert plain == {"outputs": {}, "step": 1, "expires_at": "1970-01-01T00:00:00.500000Z"}
    assert json.loads(toy.encode_reply(StepReply((), b"", 1, 1, True), 0.5))["replayed"] is True
    applied = json.loads(toy.encode_reply(StepReply((), None, 1, 1, True), 0.5))
    assert (applied["already_applied"], applied["outputs"]) == (True, None)
