"""`latch demo`: the chorale itself, the drawing, and a run against a real service."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from service.demo import DemoFailed, draw, frames, play
from tests.service.conftest import Server, serving
from tests.service.networks import page, stranger

MODELS = Path(__file__).parents[2] / "models"


def render(console_width: int = 120) -> Console:
    """A console that writes to memory."""
    return Console(file=io.StringIO(), width=console_width, force_terminal=False)


def text(console: Console) -> str:
    """What was written."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_chorale_is_four_voices_in_range() -> None:
    """Twenty-four frames of four voices, bass below soprano, within the 88 notes."""
    chorale = frames()
    assert len(chorale) == 24
    for soprano, alto, tenor, bass in chorale:
        assert 108 >= soprano > alto >= tenor >= bass >= 21


def test_the_roll_shows_what_was_played_and_what_is_expected() -> None:
    """A played note is solid, an expected one shaded, in the right row and column; the hits are counted."""
    expected_c = [0.0] * 88
    expected_c[60 - 21] = 0.9
    console = render()
    console.print(draw([[60], [60, 62]], [expected_c, expected_c]))
    rows = {line[:4].strip(): line[5:] for line in text(console).splitlines()}
    assert rows["C4"] == "▞▞██▓▓"
    assert rows["D4"] == "··▞▞··"
    assert "C#4" not in rows
    assert "1 of 2 notes" in text(console)


def test_the_demo_plays_through_a_real_service() -> None:
    """Every frame is played over WebSocket, and the session is ended afterwards."""
    with serving(MODELS) as server:
        console = render()
        play(server.url, "chorales-gru", 0, console)
        assert server.http.get("/v1/sessions").json()["sessions"] == []
    drawn = text(console).splitlines()
    assert any(line.startswith("24 frames") for line in drawn)
    assert len(drawn) < 24, "the whole picture fits into a small terminal"
    assert "C5" in text(console)


@pytest.mark.parametrize(
    ("model", "word"), [("nope", "no model 'nope'"), ("toy", "3")], ids=["unknown model", "not 88 notes"]
)
def test_a_model_that_does_not_fit_is_explained(server: Server, model: str, word: str) -> None:
    """What the service says reaches the person."""
    with pytest.raises(DemoFailed, match=word):
        play(server.url, model, 0, render())


@pytest.mark.parametrize("answer", ["{}", "[]", "null", '"x"', '{"id": 1}'])
def test_something_else_at_the_address_is_no_latch(answer: str) -> None:
    """A server that answers otherwise is a sentence, not a traceback."""
    with stranger(page("200 OK", answer)) as port, pytest.raises(DemoFailed, match="is not Latch"):
        play(f"http://127.0.0.1:{port}/", "chorales-gru", 0, render())


@pytest.mark.parametrize(
    ("url", "word"), [("http://127.0.0.1:9", "latch serve"), ("127.0.0.1:8000", "http://")], ids=["nobody", "no scheme"]
)
def test_no_service_says_how_to_start_one(url: str, word: str) -> None:
    """The message has the address and the command."""
    with pytest.raises(DemoFailed, match=word) as caught:
        play(url, "chorales-gru", 0, render())
    assert url in str(caught.value)
