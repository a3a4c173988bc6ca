"""The next character: ids of an alphabet, split by place, beside what counting gives."""

import hashlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training.data import text
from training.data.text import Options
from training.errors import DataError


def written(folder: Path, content: str) -> Path:
    """A text file."""
    path = folder / "novel.txt"
    path.write_bytes(content.encode())
    return path


def test_targets_are_the_next_characters(tmp_path: Path) -> None:
    """Ids in the order of the output's features; all of the text is in one split, in its order."""
    data = text.load(written(tmp_path, "abcdefghij" * 30), Options(window=16))
    names = [name for name, _ in data.info.outputs]
    assert names == [*"abcdefghij", text.UNKNOWN]
    assert data.info.vocabulary == len(names)
    for split in data.splits.values():
        for inputs, targets, _ in split.items:
            assert inputs.dtype == np.int64
            np.testing.assert_array_equal(targets, (inputs + 1) % 10)
    scored = {name: sum(int(p.sum()) for _, _, p in split.items) for name, split in data.splits.items()}
    assert (scored["valid"], scored["test"]) == (44, 44)


def test_characters_that_did_not_train_are_unknown(tmp_path: Path) -> None:
    """They are told, and they have an id of their own."""
    data = text.load(written(tmp_path, "ab" * 50 + "é" * 3 + "ab" * 10), Options())
    unknown = len(data.info.outputs) - 1
    assert "é" not in [name for name, _ in data.info.outputs]
    assert any(unknown in inputs for inputs, _, _ in data.splits["valid"].items)
    assert data.notes == (
        "123 characters, 2 different in the training part",
        "3 characters of valid are not among them",
    )


def test_counting_is_scored_on_the_same_characters(tmp_path: Path) -> None:
    """Of a text that alternates unigrams know one bit, bigrams nearly all."""
    data = text.load(written(tmp_path, "ab" * 2000), Options())
    found = {(one.name, one.metric): one.value for one in data.references}
    assert found["unigrams", "bits"] == pytest.approx(1, abs=0.01)
    assert found["bigrams", "bits"] < 0.01
    assert found["unigrams", "nll"] == pytest.approx(np.log(2), abs=0.01)
    assert found["unigrams", "perplexity"] == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": (98, 1, 1)}, r"novel\.txt: the valid split holds 1 of 120 characters"),
        ({"split": (50, 50)}, "three percentages of 100 such as 70/15/15, not 50/50"),
        ({"window": 1}, "window must be at least 2, not 1"),
    ],
)
def test_what_cannot_be_split_is_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    """With the numbers."""
    path = written(tmp_path, "ab" * 60)
    with pytest.raises(DataError, match=words):
        text.load(path, Options(**options))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """An absent one, and one in another encoding with the line where that shows."""
    with pytest.raises(DataError, match=r"absent\.txt cannot be read: No such file"):
        text.load(tmp_path / "absent.txt", Options())
    (tmp_path / "latin.txt").write_bytes("one\ntwö\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt, line 2: not UTF-8"):
        text.load(tmp_path / "latin.txt", Options())


def test_counting_is_done_on_the_training_part(tmp_path: Path) -> None:
    """By hand: a character as often as it trained, and one more; after another as often as it came there, and as if
    seen once beside.
    """
    content = "abcab" * 14 + "bca" * 10
    data = text.load(written(tmp_path, content), Options(window=16))
    train, test = content[:70], content[85:]
    letters = ["a", "b", "c", text.UNKNOWN]
    single = {one: (train.count(one) + 1) / (70 + len(letters)) for one in letters}
    pairs = list(pairwise(train))
    after = {
        (one, other): (pairs.count((one, other)) + single[other]) / (sum(first == one for first, _ in pairs) + 1)
        for one in letters
        for other in letters
    }
    asked = list(pairwise(test))
    found = {(one.name, one.metric): one.value for one in data.references}
    assert found["unigrams", "nll"] == pytest.approx(-np.mean([np.log(single[other]) for _, other in asked]))
    assert found["bigrams", "nll"] == pytest.approx(-np.mean([np.log(after[pair]) for pair in asked]))
    assert found["bigrams", "perplexity"] == pytest.approx(np.exp(found["bigrams", "nll"]))


def test_an_alphabet_has_an_end(tmp_path: Path) -> None:
    """A thousand characters at most, the most frequent ones; a line ends in one character, however it is written."""
    rare = "".join(chr(0x4E00 + place) for place in range(1200))
    data = text.load(written(tmp_path, rare + "ab\r\n" * 800), Options(split=(80, 10, 10)))
    names = [name for name, _ in data.info.outputs]
    assert len(names) == text.LARGEST_ALPHABET
    assert {"a", "b", "\n"} <= set(names)
    assert "\r" not in names


def test_a_text_may_hold_the_sign_of_what_is_unknown(tmp_path: Path) -> None:
    """It is one character of the alphabet all the same, and what stands in the manifest is the file's own sha256."""
    path = written(tmp_path, f"\N{BYTE ORDER MARK}ab{text.UNKNOWN}\r\n" * 50)
    data = text.load(path, Options())
    names = [name for name, _ in data.info.outputs]
    assert names.count(text.UNKNOWN) == 1
    assert names[-1] == text.UNKNOWN
    assert data.info.vocabulary == len(names)
    assert data.info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
