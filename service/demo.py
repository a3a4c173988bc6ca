"""`latch demo`: a chorale through a session, over WebSocket, drawn in the terminal.

Rule: a client like any other; it knows addresses and messages, nothing of the service's inside.
"""

import time

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from service.client import Client, NotLatch, PatienceExhausted
from service.errors import LatchError

LOWEST_NOTE = 21  # MIDI number of the first of the 88 notes
NAMES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
FORESEEN = 0.25  # a note at least this probable counts as foreseen

# "Herr Gott, dich loben alle wir", melody by Loys Bourgeois (1551), here in C and in a plain four-part setting of
# our own: soprano, alto, tenor, bass, one frame a quarter note.
CHORALE = """
    C5 G4 E4 C3, C5 G4 E4 C3, B4 G4 D4 G3, A4 E4 C4 A3, G4 E4 B3 E3, C5 F4 A3 F3, D5 G4 B3 G3, E5 G4 C4 C3,
    E5 G4 C4 C3, E5 G4 C4 C3, E5 A4 C4 A2, D5 G4 B3 G3, C5 E4 C4 A3, F5 A4 C4 F3, E5 G4 C4 C3, D5 G4 B3 G3,
    C5 G4 E4 C3, D5 G4 D4 B2, E5 G4 C4 C3, D5 G4 B3 G3, C5 E4 C4 A3, A4 F4 C4 F3, B4 F4 D4 G3, C5 E4 C4 C3
"""


class DemoFailed(LatchError):
    """The service cannot be reached or does not take the notes."""

    code = "demo_failed"


def frames() -> list[list[int]]:
    """The chorale as lists of MIDI note numbers, one a frame."""
    return [[_midi(name) for name in chord.split()] for chord in CHORALE.split(",")]


def play(url: str, model: str, tempo: float, console: Console) -> None:
    """Streams the chorale and draws it.

    Args:
        url: base address of a running service.
        model: a model with 88 notes in and their probabilities out.
        tempo: frames a second; 0 does not wait.
        console: where to draw.

    Raises:
        DemoFailed: no service at `url`, or it refused.
    """
    chorale = frames()
    foreseen: list[list[float]] = []
    try:
        with Client(url, patience=1) as latch, Live(console=console, auto_refresh=False) as live:
            session = latch.session(model=model)
            rows = ([float(LOWEST_NOTE + key in notes) for key in range(88)] for notes in chorale)
            for reply in session.stream(rows):
                foreseen.append(reply["y"][0].tolist())
                live.update(draw(chorale[: reply.step], foreseen), refresh=True)
                if tempo:
                    time.sleep(1 / tempo)
            session.delete()
    except PatienceExhausted as error:
        raise DemoFailed(
            f"no service answers at {url} ({error.__cause__}): start one with `latch serve`, or say --url"
        ) from error
    except KeyError as error:
        raise DemoFailed(
            f"the model {model!r} gives no {error}: it must foresee notes, as the chorale models do"
        ) from error
    except NotLatch as error:
        raise DemoFailed(f"what answers at {url} is not Latch: say --url") from error
    except LatchError as error:
        raise DemoFailed(str(error)) from error


def draw(played: list[list[int]], foreseen: list[list[float]]) -> Group:
    """The piano roll: a row a note that was played or foreseen, a column a frame, and last what is expected next.

    Args:
        played: MIDI notes of every frame so far.
        foreseen: after each of those frames, the probability of each of the 88 notes in the next one.
    """
    expected: list[list[float]] = [[0.0] * 88, *foreseen]
    notes = {note for frame in played for note in frame}
    notes |= {LOWEST_NOTE + key for row in foreseen for key, probability in enumerate(row) if probability >= FORESEEN}
    lines = [_line(note, played, expected) for note in sorted(notes, reverse=True)]
    pairs = [(note, expected[t][note - LOWEST_NOTE]) for t, frame in enumerate(played) for note in frame if t > 0]
    hits = sum(probability >= FORESEEN for _, probability in pairs)
    summary = f"{len(played)} frames; {hits} of {len(pairs)} notes after the first frame were foreseen"
    legend = Text.assemble(
        ("██", "green"), " foreseen  ", ("▞▞", "yellow"), " a surprise  ", ("░▒▓", "cyan"), " expected"
    )
    return Group(legend, *lines, Text(summary))


def _line(note: int, played: list[list[int]], expected: list[list[float]]) -> Text:
    line = Text(f"{NAMES[note % 12] + str(note // 12 - 1):>4} ", style="bold" if note % 12 == 0 else "dim")
    for frame, probabilities in zip([*played, []], expected, strict=True):
        probability = probabilities[note - LOWEST_NOTE]
        if note in frame:
            line.append(*(("██", "green") if probability >= FORESEEN else ("▞▞", "yellow")))
        else:
            line.append(_shade(probability) * 2, "cyan")
    return line


def _shade(probability: float) -> str:
    return "·░▒▓"[sum(probability >= bound for bound in (0.1, FORESEEN, 0.5))]


def _midi(name: str) -> int:
    return NAMES.index(name[:-1]) + 12 * (int(name[-1]) + 1)
