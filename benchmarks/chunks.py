"""What a chunk in one run (ONNX `Scan`) costs beside the same steps one by one, for every shipped model."""

from collections.abc import Iterator

from benchmarks import bare
from benchmarks.machine import ROOT, aside, bar
from benchmarks.report import Row

STEPS, SESSIONS = 32, (1, 8, 64)


def run(quick: bool) -> Iterator[Row]:
    """A row a model: time of a run of 32 steps by the time of 32 runs, for some numbers of sessions."""
    seconds = 0.05 if quick else 0.3
    with aside() as pool:
        for folder in bar(sorted((ROOT / "models").glob("*/1")), "chunks"):
            ratios = []
            for count in SESSIONS:
                steps, chunk = (
                    pool.submit(bare.best, folder, form, count, STEPS, seconds).result()
                    for form in ("one run a step", "one run")
                )
                ratios.append(f"{steps / chunk:.2f}")
            what = f"{folder.parent.name}: a chunk of {STEPS} steps of {', '.join(map(str, SESSIONS))} sessions"
            yield Row(what, "the same steps, a run each, time", "", ", ".join(ratios))
