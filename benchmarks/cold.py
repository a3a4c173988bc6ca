"""How long the service takes to be ready with twelve models, beside ONNX Runtime loading the same twelve graphs."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from benchmarks import bare
from benchmarks.latch import Latch
from benchmarks.machine import ROOT, aside
from benchmarks.report import Row, at_most

MODELS, GOAL = 12, 1.5
PROGRAM = """
import sys
from pathlib import Path
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
graphs = [path.read_bytes() for path in Path(sys.argv[1]).glob("*/1/model.onnx")]
sessions = [onnxruntime.InferenceSession(graph, options) for graph in graphs]
print("loaded", flush=True)
"""


def run(quick: bool) -> Iterator[Row]:
    """Seconds by seconds, medians of fresh processes that take turns: of the loading alone, and from exec to ready."""
    rounds = 3 if quick else 7
    pairs = {
        "cold start, create_app": (app, loading, "InferenceSession of the same graphs"),
        "cold start, `latch serve` until it listens": (serve, program, "a process that imports and loads the same"),
    }
    with shipped(MODELS) as folder:
        for what, (mine, bare_one, against) in pairs.items():
            ours, theirs = list[float](), list[float]()
            for _ in range(rounds):
                for seconds, call in ((ours, mine), (theirs, bare_one)):
                    with aside() as pool:
                        seconds.append(pool.submit(call, folder).result())
            value = median(ours) / median(theirs)
            detail = f"{median(ours) * 1000:.0f} ms and {median(theirs) * 1000:.0f} ms, {rounds} processes each"
            yield at_most(GOAL, f"{what}, {MODELS} models", against, value, detail)


def app(folder: Path) -> float:
    """Files checked, sessions made, golden vectors replayed."""
    from service.app import create_app
    from service.settings import load_settings

    settings = load_settings(models=folder)
    start = time.perf_counter()
    create_app(settings)
    return time.perf_counter() - start


def loading(folder: Path) -> float:
    """The runtime alone, as quick as it can."""
    graphs = [path.read_bytes() for path in sorted(folder.glob("*/1/model.onnx"))]
    start = time.perf_counter()
    for graph in graphs:
        bare.session(graph)
    return time.perf_counter() - start


def serve(folder: Path) -> float:
    """From the start of the process to the line with its address."""
    start = time.perf_counter()
    with Latch(folder):
        return time.perf_counter() - start


def program(folder: Path) -> float:
    """From the start of a process to when it has loaded all graphs, with a thread each as the service."""
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", PROGRAM, folder], stdout=subprocess.PIPE, text=True) as process:  # noqa: S603 - our own program
        said = process.stdout.readline() if process.stdout else ""
        seconds = time.perf_counter() - start
    if said != "loaded\n":
        raise RuntimeError(f"the program that only loads graphs said {said!r}")
    return seconds


@contextmanager
def shipped(count: int) -> Iterator[Path]:
    """The shipped models, and copies of them until there are `count`."""
    with tempfile.TemporaryDirectory() as folder:
        originals = sorted((ROOT / "models").glob("*/1"))
        for i in range(count):
            source = originals[i % len(originals)]
            name = source.parent.name + (f"-copy{i}" if i >= len(originals) else "")
            target = Path(folder) / name / "1"
            shutil.copytree(source, target)
            manifest = json.loads((target / "manifest.json").read_text()) | {"name": name}
            (target / "manifest.json").write_text(json.dumps(manifest))
        yield Path(folder)
