"""The data sets by name, and the user's own.

Its one rule: adding a set is one module and one line here. It must not know units or training.
"""

from collections.abc import Callable

from training.config import DataInfo
from training.data import adding, digits, imdb, mnist, own, polymusic, sensors, speech
from training.data.sequences import DataSet
from training.errors import DataError

LOADERS: dict[str, Callable[[str], DataSet]] = {
    **dict.fromkeys(polymusic.SETS, polymusic.load),
    "sensors": sensors.load,
    "adding": adding.load,
    "digits": digits.load,
    **dict.fromkeys(mnist.STEPS, mnist.load),
    "imdb": imdb.load,
    "speech": speech.load,
}

# Of the sets that are neither generated nor bundled: their file and what may be done with it.
FILES: dict[str, tuple[str, str]] = {
    **{name: (rolls.file, rolls.licence) for name, rolls in polymusic.SETS.items()},
    **dict.fromkeys(mnist.STEPS, ("mnist/*.gz", mnist.LICENCE)),
    "imdb": (imdb.FILE, imdb.LICENCE),
    "speech": (speech.FILE, speech.LICENCE),
}


def load(name: str) -> DataSet:
    """The data set called `name`, checked; DataError when there is none or its file is not right."""
    if name not in LOADERS:
        raise DataError(f"unknown data set {name!r}: choose one of {', '.join(LOADERS)}")
    return LOADERS[name](name)


def load_again(info: DataInfo) -> DataSet:
    """The data set that a run was made of, by name or from the user's own file."""
    return own.again(info) if info.own else load(info.name)
