"""Finding versions, and trusting no byte that the manifest does not cover."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.errors import ManifestInvalid
from service.registry import ModelKey, load, load_all, stamps
from tests.service import toys


def test_versions_come_in_order_of_name_and_number(tmp_path: Path) -> None:
    """Version 10 comes after 9, not after 1."""
    for version in ("10", "9", "1"):
        toys.save_leaky(tmp_path, version=version)
    toys.save_counter(tmp_path)
    found = load_all(tmp_path)
    keys = [(f.manifest.name, f.manifest.version) for f in found.found]
    assert keys == [("counter", "1"), ("toy", "1"), ("toy", "9"), ("toy", "10")]
    assert found.broken == {}


def test_a_folder_that_is_not_there_says_which_setting(tmp_path: Path) -> None:
    """The operator learns what to set."""
    with pytest.raises(ManifestInvalid, match="LATCH_MODELS"):
        load_all(tmp_path / "nope")


def flip_a_byte(folder: Path) -> None:
    """A model file that somebody changed."""
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(content)


def cut_short(folder: Path) -> None:
    """A model file that was not copied whole."""
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:-10])


def lose_golden(folder: Path) -> None:
    """A file that the manifest names is not there."""
    (folder / "golden.npz").unlink()


def lose_manifest(folder: Path) -> None:
    """A folder without a manifest."""
    (folder / "manifest.json").unlink()


def scramble_golden(folder: Path) -> None:
    """Golden vectors that are no npz, under a correct sha256."""
    (folder / "golden.npz").write_bytes(b"PK not a zip")
    toys.seal(folder, json.loads((folder / "manifest.json").read_text()))


def pickle_golden(folder: Path) -> None:
    """Golden vectors that would have to be unpickled, under a correct sha256."""
    np.savez(folder / "golden.npz", **{"input.x": np.array([object()], dtype=object)})
    toys.seal(folder, json.loads((folder / "manifest.json").read_text()))


def empty_golden(folder: Path) -> None:
    """Golden vectors of no bytes, under a correct sha256."""
    (folder / "golden.npz").write_bytes(b"")
    toys.seal(folder, json.loads((folder / "manifest.json").read_text()))


def single_golden(folder: Path) -> None:
    """One array where an archive of arrays belongs."""
    with (folder / "golden.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    toys.seal(folder, json.loads((folder / "manifest.json").read_text()))


def nest_manifest(folder: Path) -> None:
    """A manifest that nests deeper than a reader can follow."""
    (folder / "manifest.json").write_text("[" * 100_000)


def half_a_character(folder: Path) -> None:
    """A manifest with a string that no reply could carry."""
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace("A toy.", r"A \ud800 toy."))


def refuse_a_look(folder: Path) -> None:
    """A file that keeps whoever reads it waiting."""
    (folder / "model.onnx").unlink()
    os.mkfifo(folder / "model.onnx")


def loop_link(folder: Path) -> None:
    """A file that is a link to itself."""
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to(folder / "model.onnx")


def rename(folder: Path) -> None:
    """A manifest that names another model than its folder does."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"name": "other"}))


def climb_out(folder: Path) -> None:
    """A manifest with a path outside its folder."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../secret"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))


def link_out(folder: Path) -> None:
    """A file name inside the folder that is a link to a file outside."""
    outside = folder.parent.parent / "outside.onnx"
    (folder / "model.onnx").rename(outside)
    (folder / "model.onnx").symlink_to(outside)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_byte, "sha256"),
        (cut_short, "sha256"),
        (lose_golden, "golden.npz cannot be read"),
        (lose_manifest, "manifest.json cannot be read"),
        (scramble_golden, "golden.npz cannot be read"),
        (pickle_golden, "golden.npz cannot be read"),
        (rename, "the folder names the model"),
        (climb_out, "does not match"),
        (link_out, "outside the folder"),
        (empty_golden, "EOFError"),
        (single_golden, "cannot be read"),
        (nest_manifest, "not JSON"),
        (half_a_character, "not JSON"),
        (loop_link, "cannot be read"),
        (refuse_a_look, "is no file"),
    ],
)
def test_a_damaged_version_is_reported_beside_the_good_one(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    """The damaged version is named with the reason; the other one is found as before."""
    damage(toys.save_leaky(tmp_path))
    toys.save_counter(tmp_path)
    found = load_all(tmp_path)
    assert [f.manifest.name for f in found.found] == ["counter"]
    assert list(found.broken) == [ModelKey("toy", "1")]
    assert message in str(found.broken[ModelKey("toy", "1")])


def test_a_name_that_is_no_text_can_be_told(tmp_path: Path) -> None:
    """A folder may be called what UTF-8 has no letter for; whoever reports it must not fail over that."""
    (toys.save_leaky(tmp_path).parent).rename(os.fsdecode(bytes(tmp_path) + b"/to\xff"))
    [(key, error)] = load_all(tmp_path).broken.items()
    assert str(key) == "to\\udcff/1"
    assert "lies in to\\udcff/1" in str(error)
    assert list(stamps(tmp_path)) == [key]


def test_a_version_that_may_not_be_looked_into_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a stamp, so that it is tried, and the others are found."""
    toys.save_leaky(tmp_path)
    toys.save_counter(tmp_path)
    plain = os.scandir

    def guarded(path: Path) -> Any:
        if path.parent.name == "toy":
            raise PermissionError(13, "Permission denied")
        return plain(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert list(stamps(tmp_path)) == [ModelKey("counter", "1"), ModelKey("toy", "1")]


def test_hidden_folders_are_no_models(tmp_path: Path) -> None:
    """An exporter's unfinished folder is not a broken model."""
    toys.save_leaky(tmp_path)
    (tmp_path / "toy" / ".2.partial").mkdir()
    (tmp_path / ".git" / "hooks").mkdir(parents=True)
    assert load_all(tmp_path).broken == {}


def test_a_stamp_tells_whether_files_were_written(tmp_path: Path) -> None:
    """Any write gives another, even one of the same size and time; a look, or what is hidden, does not."""
    folder, key = toys.save_leaky(tmp_path), ModelKey("toy", "1")
    before = stamps(tmp_path)
    assert list(before) == [key]
    load(folder)
    (folder / ".rsync-temporary").write_bytes(b"half")
    assert stamps(tmp_path) == before
    path = folder / "model.onnx"
    status = path.stat()
    (folder / "swapped").write_bytes(path.read_bytes())
    (folder / "swapped").replace(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = stamps(tmp_path)
    assert after != before
    (folder / "nowhere").symlink_to(tmp_path / "nope")
    assert stamps(tmp_path) != after


def test_digests_are_equal_where_all_files_are(tmp_path: Path) -> None:
    """The manifest covers the other files, so its sha256 tells two versions apart, and itself again."""
    digests = [
        load(toys.save_leaky(tmp_path / name, seed=seed)).digest for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert digests[0] == load(tmp_path / "a" / "toy" / "1").digest
    assert digests[0] != digests[2]


def test_a_folder_that_may_not_be_read_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lost+found of a volume stops neither a start nor a look."""
    toys.save_leaky(tmp_path)
    (tmp_path / "lost+found").mkdir()
    plain = Path.iterdir

    def guarded(path: Path) -> Iterator[Path]:
        if path.name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return plain(path)

    monkeypatch.setattr(Path, "iterdir", guarded)
    assert list(stamps(tmp_path)) == [ModelKey("toy", "1")]
    assert load_all(tmp_path).broken == {}
