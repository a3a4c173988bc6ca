"""Packed rows: every shape and dtype there and back to the bit, and the path of a value that is no number."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from service.errors import InvalidInput
from service.registry import load
from service.wire.rows import Field, RowFormat

FIELDS = st.builds(
    Field,
    st.sampled_from(["float32", "int64"]),
    st.sampled_from([(), (1,), (3,), (2, 3), (1, 2, 2)]),
)


@st.composite
def outputs(draw: Callable[..., Any]) -> tuple[RowFormat, tuple[str, ...], dict[str, np.ndarray]]:
    """A model of some outputs, some of their names in any order, and values [B, T, *shape] of these."""
    fields = draw(st.lists(FIELDS, min_size=1, max_size=4))
    named = {f"out{i}": field for i, field in enumerate(fields)}
    names = tuple(draw(st.lists(st.sampled_from(list(named)), unique=True)))
    sizes = draw(st.tuples(st.integers(1, 3), st.integers(1, 4)))
    values = {name: draw(hnp.arrays(named[name].dtype, (*sizes, *named[name].shape))) for name in names}
    return RowFormat(fields[0], named), names, values


@given(case=outputs())
def test_outputs_come_back_bit_for_bit(case: tuple[RowFormat, tuple[str, ...], dict[str, np.ndarray]]) -> None:
    """Whatever B sessions' T steps gave, NaN and -0 among it, is unpacked from each session's share of the bytes."""
    rows, names, values = case
    data = rows.pack(values, names)
    sizes = values[names[0]].shape[:2] if names else (1, 1)
    size = len(data) // sizes[0]
    for b in range(sizes[0]):
        back = rows.unpack(data[b * size : (b + 1) * size], names)
        assert list(back) == list(names)
        for name in names:
            assert back[name].dtype == values[name].dtype
            assert back[name].shape == values[name].shape[1:]
            assert back[name].tobytes() == values[name][b].tobytes()


@given(field=FIELDS, data=st.data())
def test_a_batch_is_the_join_of_its_rows(field: Field, data: st.DataObject) -> None:
    """[B, T, *shape] from B times T packed rows, bytes or views of bytes, has the bits of each."""
    rows = RowFormat(field, {"y": field})
    values = data.draw(
        hnp.arrays(field.dtype, st.tuples(st.integers(1, 4), st.integers(1, 3)).map(lambda t: (*t, *field.shape)))
    )
    parts = [memoryview(each.tobytes()) if b % 2 else each.tobytes() for b, each in enumerate(values)]
    batch = rows.batch(parts, values.shape[1])
    assert (batch.shape, batch.dtype) == (values.shape, values.dtype)
    assert batch.tobytes() == values.tobytes()
    assert values[0].nbytes == values.shape[1] * rows.input_bytes


def test_a_row_of_several_outputs_has_them_one_after_another() -> None:
    """In the order asked for, little-endian, without padding, T rows of a session before the next session's."""
    rows = RowFormat(Field("int64", ()), {"a": Field("float32", (2,)), "n": Field("int64", ())})
    values = {"a": np.arange(8, dtype=np.float32).reshape(2, 2, 2), "n": np.array([[10, 11], [12, 13]])}
    expected = b""
    for b in range(2):
        for t in range(2):
            expected += int(values["n"][b, t]).to_bytes(8, "little") + values["a"][b, t].astype("<f4").tobytes()
    assert rows.pack(values, ("n", "a")) == expected


def test_nothing_asked_for_is_no_bytes() -> None:
    """No outputs are packed, and none are unpacked."""
    rows = RowFormat(Field("float32", (3,)), {"y": Field("float32", (4,))})
    assert rows.pack({}, ()) == b""
    assert rows.unpack(b"", ()) == {}


def test_a_column_that_is_no_neat_array_is_packed_in_c_order() -> None:
    """What a runtime returns with its axes moved is packed as if it were not."""
    rows = RowFormat(Field("float32", (3,)), {"y": Field("float32", (4,)), "n": Field("int64", ())})
    y = np.moveaxis(np.arange(24, dtype=np.float32).reshape(3, 2, 4), 0, 1)
    assert rows.pack({"y": y}, ("y",)) == np.ascontiguousarray(y).tobytes()
    both = rows.pack({"y": y, "n": np.zeros((2, 3), np.int64)}, ("y", "n"))
    assert rows.unpack(both[: len(both) // 2], ("y", "n"))["y"].tolist() == y[0].tolist()


PLACES = {(): "", (3,): "[2]", (2, 3): "[1][2]"}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", PLACES, ids=str)
def test_a_value_that_is_no_number_is_named(shape: tuple[int, ...], value: float) -> None:
    """The first one in the order of the rows, by its path; rows count from where the part begins."""
    rows = RowFormat(Field("float32", shape), {})
    values = np.zeros((4, *shape), np.float32)
    rows.check_finite(values.tobytes())
    values[(2, *(size - 1 for size in shape))] = values[3] = value
    for first in (0, 50):
        with pytest.raises(InvalidInput) as caught:
            rows.check_finite(memoryview(values.tobytes()), first)
        assert caught.value.extras["path"] == f"$.inputs[{first + 2}]{PLACES[shape]}"
        assert f"{caught.value.extras['path']} is {value}: the model takes a finite float32" in str(caught.value)


def test_every_integer_is_a_number() -> None:
    """No bits of an int64 are refused, those of a float NaN among them."""
    rows = RowFormat(Field("int64", ()), {})
    rows.check_finite(np.array([np.nan, np.inf, -0.0]).tobytes() + bytes([255] * 8))


def test_names_are_outputs_of_the_model(repository: Path) -> None:
    """The first one where none are asked for; each once; an unknown one is refused where it stands."""
    rows = RowFormat.of(load(repository / "toy" / "1").manifest)
    assert rows.names(None, "$.outputs") == rows.default == ("y",)
    assert rows.names([], "$.outputs") == ()
    assert rows.names(["h", "z", "h"], "$.outputs") == ("h", "z")
    with pytest.raises(InvalidInput, match=r"'q' at outputs\[1\] is no output of this model: it has y, z, h") as caught:
        rows.names(["y", "q"], "outputs")
    assert caught.value.extras["path"] == "outputs[1]"


def test_a_manifest_gives_the_format(repository: Path) -> None:
    """Outputs and states of a model by their public names, of whatever dtype and shape."""
    rows = RowFormat.of(load(repository / "counter" / "1").manifest)
    assert (rows.input, rows.input_bytes) == (Field("int64", ()), 8)
    assert rows.outputs == {
        "y": Field("float32", ()), "total": Field("float32", (1,)), "steps": Field("int64", (1,)),
    }  # fmt: skip
