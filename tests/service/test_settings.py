"""Settings: bounds, names, and messages that say what to do."""

import os
import re
from pathlib import Path

import pytest

from service.errors import SettingsInvalid
from service.settings import PREFIX, Settings, load_settings


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine reaches these tests."""
    for name in [name for name in os.environ if name.upper().startswith(PREFIX)]:
        monkeypatch.delenv(name)


def test_defaults_need_no_environment() -> None:
    """A fresh machine serves ./models on the loopback address."""
    settings = load_settings()
    assert (settings.host, settings.port, settings.models) == ("127.0.0.1", 8000, Path("models"))
    assert settings.store_url == "memory://"
    assert settings.idle_ttl_ms == 15 * 60 * 1000


def test_the_environment_sets_a_field_and_the_command_line_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """LATCH_PORT is read; an explicit argument beats it; None means not given."""
    monkeypatch.setenv("LATCH_PORT", "9001")
    assert load_settings().port == 9001
    assert load_settings(port=9002).port == 9002
    assert load_settings(port=None).port == 9001


@pytest.mark.parametrize("name", ["LATCH_PROT", "latch_prot", "LATCH_MAX_BATCH"])
def test_an_unknown_name_refuses_to_start(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A typo in the environment is an error that names it, not a silent default."""
    monkeypatch.setenv(name, "1")
    with pytest.raises(SettingsInvalid, match=name):
        load_settings()


def test_what_training_reads_is_no_setting_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has set it up for training can serve from the same shell."""
    root = Path(__file__).parents[2] / "training"
    names = {name for path in root.rglob("*.py") for name in re.findall(r'environ.*"(LATCH_\w+)"', path.read_text())}
    assert names == Settings.FOREIGN
    for name in names:
        monkeypatch.setenv(name, "/data")
    load_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "abc"),
        ("port", "70000"),
        ("max_batch_size", "0"),
        ("max_body_bytes", "1"),
        ("device", "gpu"),
        ("idle_ttl_ms", "0"),
        ("log_level", "loud"),
    ],
)
def test_a_bad_value_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the setting's name and the bad value."""
    monkeypatch.setenv(PREFIX + name.upper(), value)
    with pytest.raises(SettingsInvalid, match=rf"{PREFIX}{name.upper()} = '{value}'"):
        load_settings()


def test_idle_bounds_may_not_contradict_each_other() -> None:
    """A default outside the bounds that sessions are held to is refused."""
    with pytest.raises(SettingsInvalid, match="idle_ttl_ms 500"):
        load_settings(idle_ttl_ms=500)


def test_every_field_is_described() -> None:
    """`latch settings` has a sentence for each."""
    assert all(field.description for field in Settings.model_fields.values())
