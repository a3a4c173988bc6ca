"""The one frozen `Settings`: every field typed, bounded and described.

Rule: only `app` and `__main__` read settings; everybody else is handed plain values.
Milliseconds appear here and on the wire only; inside, times are float seconds.
"""

import os
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.errors import SettingsInvalid

PREFIX = "LATCH_"
TEN_YEARS_MS = 315_360_000_000


class Settings(BaseSettings):
    """What an operator may choose, each field also as `LATCH_<NAME>` in the environment."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    # Names that other parts of the product own: the training package finds its data sets and its loops by them.
    FOREIGN: ClassVar[frozenset[str]] = frozenset({"LATCH_DATA", "LATCH_KERNELS"})

    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one")
    origins: str = Field(
        "",
        description="Origins of web pages that may call, beside the service's own host: https://a.example,"
        "http://localhost:3000, or * for all",
    )
    models: Path = Field(Path("models"), description="The model repository: <name>/<version>/{model.onnx, ...}")
    reload_ms: int = Field(
        5_000, ge=0, description="How often the model repository is looked at for versions that came or went; 0: never"
    )
    store_url: str = Field(
        "memory://",
        description="Where sessions are kept: memory:// (ends with the process), sqlite:///path, redis://host, "
        "rediss://host, redis+cluster://host,host",
    )
    keep_steps: int = Field(
        0, ge=0, le=1_000, description="Answered requests of a session that it can be rolled back over"
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$", description="Where models run: auto, cpu, cuda or cuda:N"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe line to log")

    max_sessions: int = Field(100_000, ge=1, le=10_000_000, description="Live sessions a model may have")
    idle_ttl_ms: int = Field(
        900_000, ge=1, le=TEN_YEARS_MS, description="A session idle for this long expires, unless it asked else"
    )
    min_idle_ttl_ms: int = Field(
        1_000, ge=1, le=TEN_YEARS_MS, description="Shortest idle_ttl_ms that a session may ask for"
    )
    max_idle_ttl_ms: int = Field(
        31_536_000_000, ge=1, le=TEN_YEARS_MS, description="Longest idle_ttl_ms that a session may ask for"
    )
    sweep_interval_ms: int = Field(1_000, ge=10, description="How often idle sessions are looked for")
    max_expired_ids: int = Field(
        100_000, ge=0, description="Expired ids remembered, so that they answer 410 and not 404"
    )

    max_batch_size: int = Field(256, ge=1, le=65_536, description="Sessions that one run of a model advances at most")
    max_run_steps: int = Field(1024, ge=1, le=4_096, description="Steps of one session that one run advances at most")
    max_queue: int = Field(8_192, ge=1, description="Requests that may wait for one model; then 429")
    max_queue_bytes: int = Field(268_435_456, ge=1, description="Bytes of inputs that may wait for one model; then 429")
    max_session_queue: int = Field(
        64, ge=1, description="Requests that may wait for one session; more are answered 429"
    )
    max_socket_queue: int = Field(
        4_096, ge=1, description="Replies that a socket of many sessions may owe; reading stops there"
    )
    slow_reader_ms: int = Field(
        30_000, ge=1, description="A socket whose client reads nothing for this long is closed with 4408"
    )
    max_steps: int = Field(16_384, ge=1, description="Steps that one request may carry")
    max_body_bytes: int = Field(
        16_777_216,
        ge=1_024,
        description="Bytes of one HTTP body or WebSocket message, and of the packed rows of one reply",
    )
    keep_reply_bytes: int = Field(
        65_536, ge=0, description="Largest reply kept for a duplicate; beyond it, a duplicate gets already_applied"
    )
    drain_ms: int = Field(
        8_000, ge=0, le=3_600_000, description="What is in flight has this long to finish when the service stops"
    )
    drain_delay_ms: int = Field(
        0, ge=0, le=3_600_000, description="Before that, a stopping service serves on for this long, but is not ready"
    )
    intra_op_threads: int = Field(1, ge=1, le=256, description="Threads that one run of a model may use")

    def model_post_init(self, _context: Any) -> None:
        """Refuses bounds that contradict each other."""
        if not self.min_idle_ttl_ms <= self.idle_ttl_ms <= self.max_idle_ttl_ms:
            raise SettingsInvalid(
                f"idle_ttl_ms {self.idle_ttl_ms} is outside min_idle_ttl_ms {self.min_idle_ttl_ms} to "
                f"max_idle_ttl_ms {self.max_idle_ttl_ms}: move one of the three"
            )


def load_settings(**overrides: Any) -> Settings:
    """Builds `Settings` from the environment, with `overrides` (the command line's) on top.

    Args:
        overrides: fields set explicitly; None means not given.

    Raises:
        SettingsInvalid: a value is out of bounds, or a `LATCH_*` name is unknown (pydantic-settings lets those pass).
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields} | Settings.FOREIGN
    stray = sorted(name for name in os.environ if name.upper().startswith(PREFIX))
    unknown = [name for name in stray if name.upper() not in known]
    if unknown:
        raise SettingsInvalid(
            f"unknown setting {', '.join(unknown)} in the environment: `latch settings` lists the known ones"
        )
    try:
        return Settings(**{name: value for name, value in overrides.items() if value is not None})
    except ValidationError as error:
        problems = "; ".join(
            f"{PREFIX}{'.'.join(map(str, e['loc'])).upper()} = {e['input']!r}: {e['msg']}" for e in error.errors()
        )
        raise SettingsInvalid(f"{problems}. `latch settings` describes every setting") from error
