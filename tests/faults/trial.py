"""`Trial`: one scenario: its share of chance and time, what it did, and its line in the report."""

import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from tests.faults.history import Model
from tests.faults.load import Load

SEED = int(os.environ.get("FAULTS_SEED", "1"))
MINUTES = float(os.environ.get("FAULTS_MINUTES", "0"))
"""For all scenarios together; 0 is the short form."""


class Trial:
    """A scenario.

    Args:
        name: of its test.
        part: what it belongs to.
        promise: the sentence that it tries.
        models: what sessions run.
        seconds: how long it takes in the long form; 0 in the short one.
    """

    def __init__(self, name: str, part: str, promise: str, models: Sequence[Model], seconds: float) -> None:
        self.name = name
        self.part = part
        self.promise = promise
        self.rng = random.Random(f"{SEED} {name}")  # noqa: S311 - it shall be repeatable
        self.counts: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.recoveries: list[float] = []
        self.longest = 0.0
        self.passed = False
        self.models = models
        self._seconds = seconds

    def rounds(self, short: int) -> Iterator[int]:
        """So many in the short form, and as many as there is time for in the long one."""
        end, number = time.monotonic() + self._seconds, 0
        while number < short or time.monotonic() < end:
            yield number
            number += 1

    def load(self, urls: list[str], **options: Any) -> Load:
        """Clients that count for this trial."""
        return Load(urls, self.models, self.rng, counts=self.counts, **options)

    def took(self, load: Load) -> None:
        """Notes what the clients of a load, which is over, had to wait for."""
        self.longest = max(self.longest, load.longest)
