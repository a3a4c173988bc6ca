"""Where the files of a data set are: under LATCH_DATA, or downloaded once to the user's cache.

Its one rule: a file is what its checksum says, or it is refused by name. It must not know what is in it.
"""

import os
from pathlib import Path

import pooch

from training.errors import DataError


def read_text(path: Path) -> tuple[bytes, str]:
    """The bytes of a user's file and the text in them; DataError where it cannot be read, or names a line not UTF-8."""
    try:
        content = path.read_bytes()
        return content, content.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from error


def fetch(folder: str, file: str, sha256: str | None, source: str | None) -> Path:
    """LATCH_DATA/folder/file where LATCH_DATA is set (empty is unset), else `source` + `file`, downloaded once.

    Checked where `sha256` is given. DataError says what to do when the file is absent, differs or stays away, or when
    there is no `source`, because nobody publishes it.
    """
    root = os.environ.get("LATCH_DATA")
    if root:
        path = Path(root) / folder / file
        if not path.is_file():
            otherwise = ", or unset LATCH_DATA to download it" if source else ""
            raise DataError(f"{path} does not exist: put {file} there{otherwise}")
        if sha256 not in (None, found := pooch.file_hash(str(path))):
            raise DataError(
                f"{path} has sha256 {found}, not {sha256}: replace it" + (f" with {source}{file}" if source else "")
            )
        return path
    if source is None:
        raise DataError(
            f"{file} has no public address: put it into a folder {folder}/, set LATCH_DATA to the one above"
        )
    try:
        return Path(pooch.retrieve(source + file, sha256, file, pooch.os_cache("latch"), progressbar=True))
    except ValueError as error:  # pooch's word for a checksum that differs
        raise DataError(f"what {source} sent as {file} has not sha256 {sha256}: try again later") from error
    except OSError as error:
        raise DataError(
            f"{file} could not be downloaded from {source} ({type(error).__name__}): check the network, or put "
            f"the file into a folder {folder}/ and set LATCH_DATA to the folder above it"
        ) from error
