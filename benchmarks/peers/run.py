"""Measures Latch beside other servers: `python benchmarks/peers/run.py [peer ...]`; writes results.json and results.md.

Every server runs the same step of the same model, on one core, with the load on another; then once more on all cores.
Each protocol gets a fresh server. The first outputs of every session, and its last one after the load, are compared
with a loop of ONNX Runtime: a lost, doubled or mixed state shows. Latch is measured before and after the peers, so that
ratios are of one run; a run replaces the rows of the peers that it measured and leaves the others.
"""

import argparse
import fcntl
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnxruntime as ort
import results
from load import Client, closed_loop
from peer import HERE, MODEL, Door, Peer
from server import TICK, Server, environment, running, version
from setups import PEERS

CHECKED, CYCLE, ROUNDS = 20, 16, 3
TRIES = 3  # of a round, and of the whole with a fresh server, until strangers do not disturb
CORES = sorted(os.sched_getaffinity(0))
SERVER, LOAD = CORES[0], CORES[-1]

T = TypeVar("T")


def say(text: str) -> None:
    """Progress."""
    sys.stderr.write(f"{datetime.now(UTC):%H:%M:%S}  {text}\n")


class Reference:
    """What every session gets, and what it must answer.

    Attributes:
        inputs: [clients, CHECKED + CYCLE, 88]: the first are sent once, the others again and again.
    """

    def __init__(self, clients: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])
        self.inputs = np.random.default_rng(1).random((clients, CHECKED + CYCLE, 88), np.float32)

    def outputs(self, steps: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Each session's first outputs [n, CHECKED, 88], and the one after so many steps [n, 88]."""
        counts, n = np.array(steps), len(steps)
        h, first, last = (np.zeros(shape, np.float32) for shape in ((n, 46), (n, CHECKED, 88), (n, 88)))
        for step in range(max(steps)):
            at = step if step < CHECKED else CHECKED + (step - CHECKED) % CYCLE
            rows = np.flatnonzero(counts > step)
            last[rows], h[rows] = self._session.run(["y", "h_next"], {"x": self.inputs[rows, at], "h": h[rows]})
            if step < CHECKED:
                first[:, step] = last
        return first, last


class Round:
    """Some seconds of load.

    Attributes:
        rate: steps a second.
        latencies: seconds of each.
        busy: the load's share of its core.
        strangers: what processes other than the load and the server used, in cores.
    """

    def __init__(self, clients: Sequence[Client], server: Server, seconds: float) -> None:
        self.latencies: list[float] = []
        begin, load, served, all_of_it = time.perf_counter(), time.process_time(), server.seconds(), _used()
        self.rate = closed_loop(clients, seconds, lambda _, latency: self.latencies.append(latency))
        all_of_it, served = _used() - all_of_it, server.seconds() - served
        load, passed = time.process_time() - load, time.perf_counter() - begin
        self.busy, self.strangers = load / passed, max(0.0, all_of_it - served - load) / passed


def _used() -> float:
    """Processor time of all processes on the machine so far, and of the kernel for them."""
    user, nice, system, _, _, interrupt, soft, steal = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + interrupt + soft + steal) / TICK


def best(tries: Sequence[T], facts: Callable[[T], tuple[float, float]]) -> T:
    """The try that strangers did not disturb; the fastest where they disturbed all. `facts`: strangers, rate."""
    return max(tries, key=lambda one: (facts(one)[0] <= results.DISTURBED, facts(one)[1]))


def measure(door: Door, server: Server, reference: Reference, warm: float, seconds: float) -> dict[str, float]:
    """Opens the sessions, takes their first outputs, warms up, loads, and compares.

    A round that strangers disturbed is taken again, a few times. Returns `rate` and the `low` and `high` of the rounds
    (steps/s), `p50` and `p99` (ms), `busy` and `strangers` (the largest), `off` (of an output from the reference).
    """
    clients, checks, rounds = [], [], []
    for session, inputs in enumerate(reference.inputs, 1):
        requests = [door.request(session, x, step == 0) for step, x in enumerate(inputs)]
        clients.append(Client(server.port, door.opening(session), door.greeted, requests, CHECKED))
    for _ in range(CHECKED):
        closed_loop(clients, 0, lambda client, latency: None)
        checks.append([client.last for client in clients])
    closed_loop(clients, warm, lambda client, latency: None)
    for _ in range(ROUNDS):
        tries = [Round(clients, server, seconds / ROUNDS)]
        while tries[-1].strangers > results.DISTURBED and len(tries) < TRIES:
            tries.append(Round(clients, server, seconds / ROUNDS))
        rounds.append(best(tries, lambda one: (one.strangers, one.rate)))
    first, last = reference.outputs([client.sent for client in clients])
    got = np.array([[door.reply(reply) for reply in replies] for replies in checks])
    end = np.array([door.reply(client.last) for client in clients])
    off = max(np.abs(got - first.transpose(1, 0, 2)).max(), np.abs(end - last).max())
    for client in clients:
        client.socket.close()
    rates = [one.rate for one in rounds]
    p50, p99 = np.percentile([latency for one in rounds for latency in one.latencies], (50, 99)) * 1000
    figures = {"rate": np.median(rates), "low": min(rates), "high": max(rates), "p50": p50, "p99": p99, "off": off}
    figures |= {name: max(getattr(one, name) for one in rounds) for name in ("busy", "strangers")}
    return {name: float(value) for name, value in figures.items()}


def measure_all(peer: Peer, options: argparse.Namespace, *, all_cores: bool = True) -> list[dict[str, Any]]:
    """A row for each door of the peer."""
    say(f"{peer.name}: environment")
    folder, reference = environment(peer, options.cache, options.python), Reference(options.clients)
    rows = []
    for door in peer.doors:
        row: dict[str, Any] = {"peer": peer.name, "door": door.name, "version": version(peer)}
        for kind, cores in {"one": [SERVER], **({"all": CORES} if all_cores else {})}.items():
            tries: list[dict[str, float]] = []
            while len(tries) < TRIES and (not tries or tries[-1]["strangers"] > results.DISTURBED):
                wait_for_quiet(options.patience)
                with exclusive(options.lock), running(peer, folder, cores, say) as server:
                    os.sched_setaffinity(0, {LOAD})
                    try:
                        tries.append(measure(door, server, reference, peer.warm, options.seconds))
                    finally:
                        os.sched_setaffinity(0, CORES)
                say(f"{peer.name}, {door.name}, {kind}: " + ", ".join(f"{k} {v:.4g}" for k, v in tries[-1].items()))
            row[kind] = best(tries, lambda one: (one["strangers"], one["rate"]))
        rows.append(row)
    return rows


def wait_for_quiet(seconds: float) -> None:
    """Returns when nobody disturbs, or after so long."""
    end, used = time.monotonic() + seconds, float("inf")
    while used > 2 * results.DISTURBED and time.monotonic() < end:
        used = _used()
        time.sleep(2)
        used = _used() - used


@contextmanager
def exclusive(path: Path | None) -> Iterator[None]:
    """Holds a lock on a file, for machines on which others measure too."""
    with (path or Path(os.devnull)).open("a") as file:
        if path is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Measures what was asked for, and brings the results up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", metavar="peer", help=f"all of {', '.join(PEERS)} if none is named")
    parser.add_argument("--seconds", type=float, default=6, help="of load that counts, for each door")
    parser.add_argument("--clients", type=int, default=64, help="each with a session of its own; Triton's slots are 64")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "latch-peers", help="environments")
    parser.add_argument("--python", default="python3.11", help="makes the environments; Triton needs one of 3.11")
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait for a quiet machine, each time")
    parser.add_argument("--lock", type=Path, help="a file to hold a lock on while a server runs")
    options = parser.parse_args()
    if unknown := set(options.peers) - set(PEERS):
        parser.error(f"no peer {', '.join(unknown)}; there are {', '.join(PEERS)}")

    begin, rows, failures = time.monotonic(), measure_all(PEERS["latch"], options), {}
    latch = {row["door"]: [row["one"]["rate"]] for row in rows}
    names = [name for name in options.peers or PEERS if name != "latch"]
    for name in names:
        try:
            rows += measure_all(PEERS[name], options)
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            failures[PEERS[name].name] = str(error)
            say(f"{PEERS[name].name}: {error}")
    for row in measure_all(PEERS["latch"], options, all_cores=False) if names else []:
        latch[row["door"]].append(row["one"]["rate"])
    commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=HERE, text=True).strip()  # noqa: S607
    run = {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}", "commit": commit, "latch": latch, "failures": failures}
    run |= {"clients": options.clients, "seconds": options.seconds, "peers": options.peers}
    results.update(run, rows)
    say(f"done in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
