"""`latch`: the command line. Rule: it reads arguments and prints; the work is done elsewhere."""

import logging
import re
import signal
from pathlib import Path
from typing import Annotated

import typer
from prometheus_client import CollectorRegistry
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from service.app import create_app, engine_options
from service.engine import load_engines
from service.errors import LatchError
from service.metrics import Metrics
from service.registry import ModelKey, load_all
from service.server import Server, configure, listen
from service.settings import PREFIX, Settings, load_settings

cli = typer.Typer(
    name="latch",
    help="Serve models that remember: one hidden state per session, thousands of sessions advanced together.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()

ModelsOption = Annotated[Path | None, typer.Option("--models", help="Model repository [LATCH_MODELS, else ./models]")]


@cli.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on [LATCH_HOST, else 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one [LATCH_PORT, else 8000]")] = None,
    models: ModelsOption = None,
    store: Annotated[str | None, typer.Option(help="Where sessions are kept [LATCH_STORE_URL, else memory://]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N [LATCH_DEVICE, else auto]")] = None,
) -> None:
    """Serve every model in the repository over HTTP and WebSocket.

    Example: latch serve --port 8080 --models ./models
    """
    settings = load_settings(host=host, port=port, models=models, store_url=store, device=device)
    level = settings.log_level.upper()
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", force=True)
    if level == "INFO":
        logging.getLogger("uvicorn").setLevel("WARNING")  # it has two lines for every socket
    listener = listen(settings.host, settings.port)
    server = build(settings)
    for stop in (signal.SIGINT, signal.SIGTERM):
        # uvicorn stops on these and then raises them again; a stop that was asked for is no failure.
        signal.signal(stop, signal.SIG_IGN)
    server.run(sockets=[listener])


def build(settings: Settings) -> Server:
    """The server around the app, as `latch serve` runs it."""
    app = create_app(settings)
    config = configure(app, host=settings.host, port=settings.port, max_message_bytes=settings.max_body_bytes)
    patience, delay = settings.drain_ms / 1000, settings.drain_delay_ms / 1000
    return Server(config, app.app.state.drain, patience=patience, delay=delay)


@cli.command()
def check(models: ModelsOption = None) -> None:
    """Load every model and replay its golden vectors; exit with 1 if one does not give what was exported."""
    settings = load_settings(models=models)
    found = load_all(settings.models)
    table = Table(
        Column("model", overflow="fold"),
        "device",
        "largest golden error",
        "allowed",
        "bit-exact",
        title=f"{settings.models}",
    )
    broken = dict(found.broken)
    for files in track(found.found, "loading", console=Console(stderr=True), transient=True):
        loaded = load_engines([files], {}, engine_options(settings), Metrics(CollectorRegistry()))
        broken |= loaded.broken
        for engine in loaded:
            allowed = f"{engine.manifest.golden.tolerance:g}"
            exact = "yes" if engine.bit_exact else "no"
            table.add_row(str(engine.key), engine.device, f"{engine.golden_error:.2g}", allowed, exact)
    out.print(table)
    _report_broken(broken)
    if not found.found:
        out.print(
            f"no model in {settings.models}: it has folders <name>/<version>/ (--models, LATCH_MODELS)", style="red"
        )
    if broken or not found.found:
        raise typer.Exit(1)


@cli.command("models")
def list_models(models: ModelsOption = None) -> None:
    """List the models of the repository: unit, sizes and scores, as their manifests say."""
    settings = load_settings(models=models)
    found = load_all(settings.models)
    table = Table(Column("model", overflow="fold"), "unit", "hidden", "parameters", "state bytes", "test score")
    for files in found.found:
        manifest, unit = files.manifest, files.manifest.unit or {}
        score = next((m for m in manifest.metrics if m["split"] == "test"), None)
        table.add_row(
            str(files.key),
            unit.get("cell", "-"),
            str(unit.get("hidden_size", "-")),
            str(manifest.parameters or "-"),
            str(manifest.state_bytes),
            f"{score['name']} {score['value']:.3f} {score['unit']}" if score else "-",
        )
    out.print(table)
    _report_broken(found.broken)


@cli.command("settings")
def list_settings() -> None:
    """List every setting: its name in the environment, its value now, and what it means."""
    settings = load_settings()
    table = Table(*(Column(title, overflow="fold") for title in ("setting", "value", "default", "meaning")))
    for name, field in Settings.model_fields.items():
        value = re.sub("//.*@", "//...@", str(getattr(settings, name)))  # the store's, which may have a password
        table.add_row(PREFIX + name.upper(), value, str(field.default), field.description)
    out.print(table)


@cli.command()
def demo(
    url: Annotated[
        str | None, typer.Option(help="A running service; by default that on this machine's LATCH_PORT")
    ] = None,
    model: Annotated[str, typer.Option(help="A model of 88 notes")] = "chorales-gru",
    tempo: Annotated[float, typer.Option(help="Frames a second; 0 plays as fast as it can", min=0)] = 4.0,
) -> None:
    """Stream the opening of a chorale through a session and draw what was played and what was foreseen.

    Start the service first, in another terminal: latch serve
    """
    from service.demo import play  # with an HTTP client, which no server waits for

    play(url or f"http://127.0.0.1:{load_settings().port}", model, tempo, out)


def main() -> None:
    """Runs the command line; a known error is one line on standard error and exit code 2."""
    try:
        cli(standalone_mode=True)
    except LatchError as error:
        Console(stderr=True).print(f"latch: {error}", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(2) from error


def _report_broken(broken: dict[ModelKey, LatchError]) -> None:
    for key, error in broken.items():
        out.print(f"broken: {key}: {error}", style="red", markup=False)


if __name__ == "__main__":
    main()
