"""Where the time of the serving core goes, by stage: samples of py-spy under every load whose goal is missed or near.

Rule: a sample counts for the innermost frame that belongs to a stage, so a library's time is its caller's. A round
without the sampler says what a message costs on the loop's thread and on all others, by the system's account of each;
the samples only how that is shared out. What the service itself says of its runs stands beside it.

A sampler takes every thread that could run for one that does, and here all of them share a core. Not weighed by what
each has used, the loop that wants the core while a worker runs the model took up to half of the model's time.
"""

import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from benchmarks import bulk, cold, latch, models
from benchmarks.doors import CONNECTIONS, VARIANTS, WARM
from benchmarks.latch import MODEL, Latch, rolls
from benchmarks.load import Line, closed_loop, open_loop
from benchmarks.machine import ROOT, SERVER, pinned
from benchmarks.report import LIBRARIES, Row, provenance

PAGE = Path(__file__).with_name("profile.md")
SAMPLES = 250  # a second
REST, IDLE = "rest", "_worker ("
WORKER = re.compile(r"[\w.]*\b_bootstrap \(")  # the outermost frame of every thread but the first

# Stage -> how a frame, `function (path:line)`, looks that belongs to it; the first that fits.
SERVING = {
    "ONNX Runtime": r"/onnxruntime/",
    "digests": r"\bdigests?\b.*/service/wire/__init__",
    "decode, encode": r"/service/wire/",
    "batcher, queues": r"/service/(batcher|work|queues|steps|runtime|graphs|metrics)\.py",
    "slab, commit": r"/service/(slab|commits)\.py",
    "store": r"/service/(stores/|ledger|snapshot)",
    "routers, sessions": r"/service/(routers/|sessions|app)",
    "uvicorn, uvloop, kernel": r"/service/(server|step_protocol)|/(uvicorn|websockets|httptools|asyncio|starlette)/",
}
STARTING = {
    "imports": r"<frozen importlib",
    "proofs": r"/service/proof\.py",
    "graphs of chunks": r"/service/(scan|recurrence|operators)\.py",
    "sessions of ONNX Runtime": r"/service/device\.py",
    "warm-up": r"\bwarm_up .*/service/runtime\.py",
    "files, manifests": r"/service/(registry|manifest)\.py",
    "the app": r"/service/(app|routers/\w+)\.py",
}


class Profile(NamedTuple):
    """What was run, microseconds of processor time that each message cost, and how many of them each stage took; and
    how many of the clock its runs took, which the service has measured.
    """

    what: str
    cost: float
    stages: dict[str, float]
    runs: float | None = None


class Used(NamedTuple):
    """Seconds that a service has used: of processor time on the loop's thread and on all others; of runs' time."""

    loop: float
    others: float
    runs: float

    @classmethod
    def now(cls, service: Latch) -> Self:
        """Until now."""
        tasks = {task.name: task / "schedstat" for task in Path(f"/proc/{service.pid}/task").iterdir()}
        seconds = {name: int(file.read_text().split()[0]) * 1e-9 for name, file in tasks.items()}
        loop = seconds.pop(str(service.pid))
        with urllib.request.urlopen(f"http://127.0.0.1:{service.port}/metrics") as page:
            sums = re.findall(r"(?m)^latch_compute_seconds_sum\{.*\} (\S+)", page.read().decode())
        return cls(loop, sum(seconds.values()), sum(map(float, sums)))


def run(quick: bool) -> Iterator[Row]:
    """Microseconds of the serving core a message, and the shares of the stages; the page has them as a table."""
    seconds = 0.5 if quick else 3.0
    profiles = {"a message": list[Profile](), "a start": list[Profile]()}
    for unit, found in (("a message", _serving(seconds)), ("a start", _starting(1 if quick else 5))):
        for profile in found:
            profiles[unit].append(profile)
            shares = sorted(profile.stages.items(), key=lambda one: -one[1])
            detail = ", ".join(f"{stage} {share / profile.cost:.0%}" for stage, share in shares if share)
            if profile.runs is not None:
                detail += f"; runs, by the service's own clock: {profile.runs / profile.cost:.0%}"
            yield Row(f"{profile.what}: the core's time", "", "", f"{profile.cost:,.0f} us", None, detail)
    if not quick:
        PAGE.write_text(page(profiles))


def fold(samples: str, stages: Mapping[str, str]) -> dict[str, float]:
    """The share of each stage in py-spy's raw samples, `outer;inner;... count` a line; what is of none is the rest.

    A thread that waits for work, or for its turn to take it, does none.
    """
    counts: Counter[str] = Counter()
    for line in samples.splitlines():
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")[::-1]
        if not frames[0].startswith(IDLE):
            counts[next(filter(None, (_stage(frame, stages) for frame in frames)), REST)] += int(count)
    return {stage: counts[stage] / (counts.total() or 1) for stage in (*stages, REST)}


def weigh(samples: str, stages: Mapping[str, str], loop: float, others: float) -> dict[str, float]:
    """What each stage took of the `loop`'s time and of all `others`', each shared out by the samples of its own."""
    lines = samples.splitlines()
    costs = dict.fromkeys((*stages, REST), 0.0)
    for cost, own in (
        (loop, [line for line in lines if not WORKER.match(line)]),
        (others, [line for line in lines if WORKER.match(line)]),
    ):
        shares = fold("\n".join(own), stages)
        for stage, share in shares.items():
            costs[stage] += share * cost
        costs[REST] += (1 - sum(shares.values())) * cost  # nobody was seen in it
    return costs


def _stage(frame: str, stages: Mapping[str, str]) -> str | None:
    """A module that is being imported is no stage of its own: the import is."""
    if frame.startswith("<module>"):
        return None
    return next((stage for stage, pattern in stages.items() if re.search(pattern, frame)), None)


def page(profiles: Mapping[str, Sequence[Profile]]) -> str:
    """The tables, a row a scenario."""
    lines = [
        "# Where the serving core's time goes",
        "",
        "`python -m benchmarks profile`: microseconds of processor time that a message costs the service, and how many",
        "of them each stage takes, by samples of its Python frames (`benchmarks/profile.py` says what is in a stage).",
        "",
        "`runs` checks the samples by another way: the time of the runs by the service's own clock",
        "(`latch_compute_seconds`), which is that in ONNX Runtime, the few microseconds around it, and, where runs",
        "have a thread (256 units), what the loop does meanwhile on the same core. There, too, a loop that is ready",
        "and waits for the core counts as uvicorn, uvloop, kernel, which so have more than their due.",
        "",
        *provenance((*LIBRARIES, "py-spy")),
    ]
    for unit, rows in profiles.items():
        stages = list(rows[0].stages)
        checks = [] if rows[0].runs is None else ["runs"]
        lines += ["", f"| us {unit} | all | {' | '.join(stages + checks)} |"]
        lines.append("|---|" + "---:|" * (1 + len(stages + checks)))
        for row in rows:
            shares = [*row.stages.values(), *([] if row.runs is None else [row.runs])]
            cells = " | ".join(f"{share:,.0f} ({share / row.cost:.0%})" for share in shares)
            lines.append(f"| {row.what} | {row.cost:,.0f} | {cells} |")
    return "\n".join(lines) + "\n"


def _serving(seconds: float) -> Iterator[Profile]:
    """The service under load."""
    rows = list(rolls(VARIANTS))
    with tempfile.TemporaryDirectory(prefix="latch-") as folder:
        for what, door, url in (
            ("websocket-binary", latch.websocket_binary, "memory://"),
            ("websocket-binary, sqlite", latch.websocket_binary, f"sqlite:///{folder}/sessions.db"),
            ("http-json", latch.http_json, "memory://"),
        ):
            with Latch(store_url=url) as service:
                lines = [door(service.port, session, rows) for session in service.create(CONNECTIONS)]
                yield _loaded(f"{what}, {CONNECTIONS} connections", service, lines, seconds)
                if url == "memory://" and door is latch.websocket_binary:
                    yield _loaded("the same at half the peak", service, lines, seconds, share=0.5)
    with models.repository(("gru",), 256) as made:
        for models_folder, name in ((ROOT / "models", MODEL), (made, "gru-256")):
            with Latch(models_folder) as service:
                chunks = rolls(bulk.SESSIONS, bulk.STEPS)
                ids = service.create(bulk.SESSIONS, name)
                line = latch.many(service.port, ids, chunks, window=bulk.WINDOW)
                what = f"{bulk.SESSIONS} sessions x {bulk.STEPS} steps a message, {name}"
                yield _loaded(what, service, [line], seconds, replies=bulk.SESSIONS)
                backfill = latch.http_binary(
                    service.port, service.create(1, name, "backfill")[0], list(rolls(1, bulk.BACKFILL))
                )
                yield _loaded(f"backfill of {bulk.BACKFILL:,} steps, {name}", service, [backfill], seconds)


def _loaded(
    what: str, service: Latch, lines: Sequence[Line], seconds: float, *, replies: int = 1, share: float = 1.0
) -> Profile:
    """A load without the sampler, for what a message costs, and once more with it."""
    with pinned():
        rate = closed_loop(lines, max(WARM, seconds / 3)) * share

        def load() -> float:
            if share == 1.0:
                return closed_loop(lines, seconds)
            open_loop(lines, rate, seconds)
            return rate

        before = Used.now(service)
        done = load() * seconds / replies
        used = Used(*((after - first) / done * 1e6 for first, after in zip(before, Used.now(service), strict=True)))
        samples = _sampled(load, "--duration", str(max(1, round(seconds))), "--pid", str(service.pid))
    cost = used.loop + used.others
    return Profile(what, cost, weigh(samples, SERVING, used.loop, used.others), used.runs)


def _starting(times: int) -> Iterator[Profile]:
    """The service as it starts: its modules, then `create_app`."""
    program = (
        "import sys, time; from pathlib import Path; from service.app import create_app; "
        "from service.settings import load_settings; "
        "create_app(load_settings(models=Path(sys.argv[1]))); print(time.process_time())"
    )
    with cold.shipped(cold.MODELS) as folder:
        command = [sys.executable, "-c", program, str(folder)]
        with pinned(SERVER):
            costs = [float(subprocess.check_output(command, cwd=ROOT)) for _ in range(times)]  # noqa: S603 - our own
        samples = "".join(_sampled(lambda: None, "--", *command) for _ in range(times))
    cost = min(costs) * 1e6
    shares = fold(samples, STARTING)
    yield Profile(f"cold start, {cold.MODELS} models", cost, {stage: share * cost for stage, share in shares.items()})


def _sampled(load: Callable[[], Any], *target: str) -> str:
    """What py-spy sees of a process under a load."""
    spy = Path(sys.executable).with_name("py-spy")
    if not spy.is_file():
        raise RuntimeError(f"no py-spy beside {sys.executable}, which samples the service: `make setup` installs it")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "samples"
        command = [spy, "record", "--format", "raw", "--full-filenames", "--rate", str(SAMPLES), "--output", file]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        sampler = subprocess.Popen([*command, *target], cwd=ROOT, text=True, **pipes)  # noqa: S603 - a tool of ours
        # Beside the generator it would look when that sleeps, at the same point of each of its requests.
        os.sched_setaffinity(sampler.pid, {SERVER})
        load()
        said, _ = sampler.communicate()
        if sampler.returncode:
            raise RuntimeError(f"py-spy, which must be allowed to trace processes: {said.strip()[-300:]}")
        return file.read_text()
