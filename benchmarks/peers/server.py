"""A peer's environment and its server, from `pip install` to the last process gone."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

from peer import MODEL, Peer, Place, free_port

TICK = os.sysconf("SC_CLK_TCK")
INSTALLS, STARTS, STOPS = 900.0, 60.0, 10.0  # seconds that each may take


def environment(peer: Peer, cache: Path, python: str) -> Path:
    """The peer's virtual environment, made where it is missing or for other versions; Latch's is the one we run in."""
    if not peer.requirements:
        return Path(sys.prefix)
    package, wanted = re.split(r"[^\w-]", peer.requirements[0])[0], "\n".join(peer.requirements)
    folder = cache / package
    done = folder / "requirements.txt"
    if not done.exists() or done.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        install = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for command in ([python, "-m", "venv", folder], [*install, *peer.requirements]):
            made = subprocess.run(command, capture_output=True, text=True, timeout=INSTALLS)  # noqa: S603
            if made.returncode:
                raise RuntimeError("; ".join(line for line in made.stderr.splitlines() if line.startswith("ERROR")))
        done.write_text(wanted)
    return folder


def version(peer: Peer) -> str:
    """The package and its version."""
    return peer.requirements[0].replace("==", " ") if peer.requirements else f"latch {metadata.version('latch')}"


class Server:
    """A server that runs. Its processes are known by a mark in their variables: some begin sessions of their own."""

    def __init__(self, port: int, mark: str) -> None:
        self.port = port
        self._mark = mark.encode()

    def processes(self) -> Iterator[Path]:
        """The folder in /proc of each."""
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it ended meanwhile, or is not ours to read
                if self._mark in (process / "environ").read_bytes():
                    yield process

    def seconds(self) -> float:
        """Processor time so far."""
        ticks = 0
        for process in self.processes():
            with suppress(OSError):
                fields = (process / "stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / TICK


@contextmanager
def running(peer: Peer, environment: Path, cores: Sequence[int], say: Callable[[str], None]) -> Iterator[Server]:
    """The server on these cores, ready, afterwards gone with all that it started; `say` gets the log of a failure."""
    mark = str(uuid.uuid4())
    with tempfile.TemporaryDirectory(prefix="peer-", ignore_cleanup_errors=True) as folder:
        place = Place(environment, Path(folder), free_port(), len(cores))
        command, variables = peer.launch(place)
        ours = {"PEERS_MARK": mark, "PEERS_MODEL": MODEL, "OMP_NUM_THREADS": 1}
        ours["PATH"] = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
        log = place.folder / "server.log"
        with log.open("wb") as output:
            server = subprocess.Popen(  # noqa: S603 - our own commands
                ["taskset", "--cpu-list", ",".join(map(str, cores)), *map(str, command)],  # noqa: S607
                cwd=folder,
                env=os.environ | {name: str(value) for name, value in {**ours, **variables}.items()},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            _wait_ready(server, f"http://127.0.0.1:{place.port}{peer.ready}")
            time.sleep(peer.settle)
            yield Server(place.port, mark)
        except Exception:
            say("\n".join(log.read_text(errors="replace").splitlines()[-20:]))
            raise
        finally:
            _stop(server, Server(place.port, mark))


def _wait_ready(server: subprocess.Popen[bytes], url: str) -> None:
    end = time.monotonic() + STARTS
    while time.monotonic() < end:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=2):  # noqa: S310 - our own address
                return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"the server was not ready after {STARTS:.0f} s")


def _stop(first: subprocess.Popen[bytes], server: Server) -> None:
    """Asks the first process to end; then kills what is left."""
    first.terminate()
    with suppress(subprocess.TimeoutExpired):
        first.wait(STOPS)
    for process in server.processes():
        with suppress(ProcessLookupError):
            os.kill(int(process.name), signal.SIGKILL)
    first.wait()
