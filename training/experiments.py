"""The papers' experiments: what is trained on what, how, and which figures stand in the papers.

Its one rule: an experiment is a row of the table, and says itself in what it differs from its paper. It must not know
how a model is trained, or what became of it.

Papers: Chung 2014 arXiv:1412.3555v1 tables 1 and 2; Bai 2018 arXiv:1803.01271 table 1; RRU 2021 (Residual Recurrent
Unit) arXiv:2108.00527; Dey & Salem 2017 arXiv:1701.05923v1; Heck & Salem 2017 arXiv:1701.03452v1; Hochreiter &
Schmidhuber 1997, section 5.4.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from training import data
from training.cells import UNITS
from training.config import TrainConfig
from training.data import adding, polymusic
from training.data.sequences import DataSet, Split
from training.errors import ConfigError

# Higher is better for these; lower for nll and rmse.
RISING = ("accuracy",)
QUICK = ("gru", "gru3", "mgu2", "lstm")


def cut(load: Callable[[], DataSet], train: int, rest: int | None = None) -> DataSet:
    """Of what `load` gives the first `train` sequences of the training split, and `rest` of the others (None: all)."""
    whole = load()
    parts = {
        name: Split(split.items[: train if name == "train" else rest]) for name, split in whole.splits.items()
    }  # fmt: skip
    said = f"{whole.info.split}; of these {', '.join(f'{len(split)} {name}' for name, split in parts.items())}"
    return replace(whole, splits=parts, info=replace(whole.info, split=said))


@dataclass(frozen=True)
class Arm:
    """One data set of an experiment, on which every unit of `hidden` (name to size) is trained with `seeds` seeds. It
    can be sent to another process.

    `papers` are test scores in the same `metric`, by paper and then by unit, or by a name that is no unit of ours.
    `components` are the Gaussians that a gaussian head mixes. `at` is the arm's place on the experiment's axis, where
    it has one. `epoch` is how many seconds one of `gru` took on one core: it says how long what has no record yet may
    take.
    """

    title: str
    load: Callable[[], DataSet]
    metric: str
    hidden: dict[str, int]
    train: TrainConfig
    epoch: float
    papers: dict[str, dict[str, float]] = field(default_factory=dict)
    seeds: int = 3
    embedding: int | None = None
    components: int = 1
    at: float | None = None

    def quick(self) -> "Arm":
        """Something that looks the same within a minute: few units, sequences and epochs, one seed."""
        hidden = {cell: size for cell, size in self.hidden.items() if cell in QUICK}
        train = replace(self.train, max_epochs=min(self.train.max_epochs, 3))
        return replace(self, load=partial(cut, self.load, 200, 200), hidden=hidden, train=train, seeds=1)


@dataclass(frozen=True)
class Experiment:
    """Arms by name; `differs` is said in the report; `along` names the axis on which the arms have their places."""

    title: str
    differs: str
    arms: dict[str, Arm]
    along: str = ""

    def quick(self) -> "Experiment":
        """The same in a few minutes on two cores: to see that it runs, not to compare."""
        differs = f"QUICK: at most 200 sequences a split, 3 epochs, one seed; no score means anything. {self.differs}"
        return replace(self, differs=differs, arms={name: arm.quick() for name, arm in self.arms.items()})


def sizes(units: int, **others: int) -> dict[str, int]:
    """Every unit with as many hidden units, but for `others`."""
    return dict.fromkeys(UNITS, units) | others


def only(hidden: dict[str, int], *cells: str) -> dict[str, int]:
    """Those of `cells`."""
    return {cell: hidden[cell] for cell in cells}


# Chung 2014, table 1: about 20,000 parameters for each of its three units; the variants keep the GRU's 46.
MUSIC = sizes(46, lstm=36, rnn=100)
# Title, seeds, and seconds of an epoch.
MUSIC_ARMS = {
    "chorales": ("JSB chorales", 3, 0.3),
    "nottingham": ("Nottingham", 3, 0.9),
    "musedata": ("MuseData", 1, 2.0),
    "piano-midi": ("Piano-midi.de", 1, 0.5),
}
PIXEL_PAPERS = {
    "Bai 2018": {"rnn": 0.215, "gru": 0.962, "lstm": 0.872, "TCN": 0.990},
    "RRU 2021": {"GRU, 2 layers": 0.9836, "LSTM, 2 layers": 0.9288, "RRU": 0.9874},
}
BY_VALID = (
    "5,000 training images are kept back to choose by, and a score is that of the epoch with the best valid loss; Dey "
    "& Salem's are of the last of 100."
)
RMSPROP = TrainConfig(optimiser="rmsprop", rate=0.002)


def images(name: str, epoch: float, papers: dict[str, dict[str, float]]) -> dict[str, Arm]:
    """Dey & Salem's settings, a rate an arm: 100 units, RMSProp, batches of 32, 100 epochs to the end."""
    train = replace(RMSPROP, weight_decay=0.0, batch_size=32, max_epochs=100, patience=100)
    return {
        f"{name}-{rate:g}": Arm(
            f"MNIST {name}, rate {rate:g}",
            partial(data.load, f"mnist-{name}"),
            "accuracy",
            sizes(100),
            replace(train, rate=rate),
            epoch,
            papers | ({"Dey & Salem 2017": {"gru3": 0.596}} if name == "pixels" and rate == 1e-4 else {}),
        )
        for rate in (1e-3, 5e-4, 1e-4)
    }


EXPERIMENTS: dict[str, Experiment] = {
    "music": Experiment(
        "Polyphonic music: the next frame, nats a frame",
        "Chung 2014 trained with weight noise 0.075 and chose the rate of each run among ten; here an L2 penalty of "
        "0.0003 stands in for the noise and the rate is 0.002 for all. The score is the TCN paper's: frames 2 to T, "
        "averaged over all frames of the test split. Chung's MuseData and Piano-midi figures are on another scale than "
        "everybody else's: compare those with RRU 2021, which drops silent frames and tunes its sizes. Bai's models "
        "are larger: 300,000 weights on the chorales and a million on Nottingham.",
        {
            name: Arm(
                title,
                partial(data.load, name),
                "nll",
                MUSIC,
                RMSPROP,
                epoch,
                polymusic.SETS[name].papers,
                seeds,
            )
            for name, (title, seeds, epoch) in MUSIC_ARMS.items()
        },
    ),
    "mnist-rows": Experiment(
        "MNIST, one row of 28 pixels a step",
        f"{BY_VALID} The figures of Dey & Salem 2017 for these settings were not at hand. Heck & Salem 2017 find mgu2 "
        "ahead of mgu.",
        images("rows", 10, {}),
    ),
    "mnist-pixels": Experiment(
        "MNIST, one pixel a step, 784 steps",
        f"{BY_VALID} Dey & Salem 2017 find that gru1 and gru2 almost equal gru and gru3 does not; at the lowest rate "
        "gru3 reaches 59.6% after 100 epochs and still rises; their other figures were not at hand. Bai 2018 trains "
        "10 epochs, with about 70,000 parameters.",
        images("pixels", 220, PIXEL_PAPERS),
    ),
    "imdb": Experiment(
        "IMDB reviews, the last 80 words",
        "Dey & Salem 2017 find all three types close to gru; their figures were not at hand. The words are coded by "
        "another vocabulary than theirs, so scores compare only loosely.",
        {
            "imdb": Arm(
                "IMDB",
                partial(data.load, "imdb"),
                "accuracy",
                sizes(128),
                replace(RMSPROP, rate=1e-3, weight_decay=0.0, batch_size=32, max_epochs=100, patience=5),
                23,
                embedding=128,
            )
        },
    ),
    "speech": Experiment(
        "Speech: the next 10 samples from the last 20",
        "Chung 2014's recordings (Ubisoft) are not public: these are spoken digits, so its scores do not compare. The "
        "head is his mixture of 20 Gaussians, sizes are his.",
        {
            "speech": Arm(
                "spoken digits",
                partial(data.load, "speech"),
                "nll",
                sizes(227, lstm=195, rnn=400),
                replace(RMSPROP, rate=1e-3, weight_decay=0.0, batch_size=32, max_epochs=100, patience=8),
                100,
                components=20,
            )
        },
    ),
    "adding": Experiment(
        "The adding problem: the sum of two marked numbers among many",
        "No paper of the units' has a table of it; Bai 2018 has the mean squared error at 600 steps, of sums whose "
        "variance is about 0.17: LSTM 0.164 and RNN 0.177, which is the mean, GRU 5.3e-5, TCN 5.8e-5. Here RMSE in "
        "standard deviations of the training sums: always saying the mean scores 1.",
        {
            f"steps-{steps}": Arm(
                f"{steps} steps",
                partial(adding.load, steps=steps),
                "rmse",
                MUSIC,
                TrainConfig(rate=0.005, weight_decay=0.0, batch_size=32, max_epochs=60),
                0.0025 * steps,
                at=steps,
            )
            for steps in (25, 50, 100, 200)
        },
        along="steps of a sequence",
    ),
    "small-data": Experiment(
        "Few data: handwritten digits row by row, from fewer and fewer images",
        "The article's remark that GRUs do better on some smaller data sets, with a data set of our choice "
        "(scikit-learn's digits, 8 steps of 8): no paper's table.",
        {
            f"images-{images}": Arm(
                f"{images} training images",
                partial(cut, partial(data.load, "digits"), images),
                "accuracy",
                only(MUSIC, "gru", "gru1", "gru3", "mgu", "mgu2", "lstm", "rnn"),
                TrainConfig(max_epochs=100),
                0.1,
                at=images,
            )
            for images in (75, 150, 400, 1200)
        },
        along="training images",
    ),
}


def find(name: str) -> Experiment:
    """The experiment called `name`; ConfigError with the list where there is none."""
    if name not in EXPERIMENTS:
        raise ConfigError(f"unknown experiment {name!r}: choose one of {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]
