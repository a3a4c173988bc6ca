"""What an operation of a client may ask for, and how often it is tried.

Rule: no I/O. An operation is a generator (`Work`): it yields what it wants done, is sent what came of it, or is thrown
`Later` where the connection failed. `blocking.py` and `asynchronous.py` only perform.
"""

import random
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from math import inf
from numbers import Real
from typing import Any, NamedTuple, TypeAlias, TypeVar

from service.client.errors import PatienceExhausted
from service.errors import InvalidInput

FIRST_DELAY, LONGEST_DELAY = 0.05, 2.0  # seconds, of the back-off
LONGEST_TIMEOUT = 86_400.0  # beyond some weeks, clocks of the system overflow

T = TypeVar("T")
Result = TypeVar("Result")


class Call(NamedTuple):
    """An HTTP request to send, as httpx has it; what came of it is an `Answer`."""

    method: str
    url: str
    content: bytes
    headers: Mapping[str, str]
    timeout: float


class Answer(NamedTuple):
    """An HTTP reply; names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Dial(NamedTuple):
    """A WebSocket to open, in place of the one there was."""

    path: str
    timeout: float


class Exchange(NamedTuple):
    """A message to send, if any, over the WebSocket; what came of it is the next message."""

    message: bytes | None
    timeout: float


class Sleep(NamedTuple):
    """Time to let pass."""

    seconds: float


Effect: TypeAlias = Call | Dial | Exchange | Sleep
Work: TypeAlias = Generator[Effect, Any, Result]


class Later(Exception):
    """A try failed in a way that another may not: the `problem`, and the seconds to wait at least."""

    def __init__(self, problem: Exception, after: float = 0.0) -> None:
        super().__init__(problem)
        self.problem, self.after = problem, after


@dataclass(frozen=True)
class Retry:
    """How long and how often a client tries.

    Attributes:
        patience: seconds that one operation may take with all its tries.
        timeout: seconds that one try may take.
        clock: monotonic seconds.
        jitter: gives a number between two others: the back-off is between 0 and a bound that doubles.
    """

    patience: float = 60.0
    timeout: float = 10.0
    clock: Callable[[], float] = time.monotonic
    jitter: Callable[[float, float], float] = random.uniform

    def __post_init__(self) -> None:
        for name, value, most in (("patience", self.patience, inf), ("timeout", self.timeout, LONGEST_TIMEOUT)):
            if not (isinstance(value, Real) and 0 < value <= most):
                raise InvalidInput(f"{name} {value!r}: it is a number of seconds above 0, {most:g} at most", path=name)

    def left(self, end: float) -> float:
        """Seconds until a time of the clock, and never none."""
        return max(0.001, end - self.clock())

    def until_done(self, attempt: Callable[[float], Work[T]], steps: range = range(0)) -> Work[T]:
        """Tries until it works or is refused for good.

        Args:
            attempt: starts one try, which may take so many seconds.
            steps: what stays unacknowledged when patience ends.

        Raises:
            PatienceExhausted: another try would come too late.
            LatchError: refused for good.
        """
        deadline = self.clock() + self.patience
        bound = FIRST_DELAY
        while True:
            try:
                return (yield from attempt(min(self.timeout, self.left(deadline))))
            except Later as later:
                delay = max(later.after, self.jitter(0.0, bound))
                if self.clock() + delay >= deadline:
                    problem = str(later.problem) or type(later.problem).__name__
                    unsure = f"; steps {steps[0]} to {steps[-1]} may or may not be applied" if steps else ""
                    if later.after > self.patience:
                        unsure += f"; another try would have to wait {later.after:g} s"
                    raise PatienceExhausted(
                        f"no success in {self.patience:g} s{unsure}; the last problem: {problem}", steps
                    ) from later.problem
            yield Sleep(delay)
            bound = min(2 * bound, LONGEST_DELAY)
