"""Steps a second by the number of sessions in a run, on every device that the installed runtime has."""

from collections.abc import Iterator

import onnxruntime as ort

from benchmarks import bare, models
from benchmarks.latch import MODEL
from benchmarks.machine import ROOT, aside, bar
from benchmarks.report import Row

SIZES = tuple(2**i for i in range(14))
BARS = "▁▂▃▄▅▆▇█"


def run(quick: bool) -> Iterator[Row]:
    """For every model and device the best size, with all the others as a line of bars."""
    seconds = 0.05 if quick else 0.3
    devices = ["cpu"] + (["cuda"] if "CUDAExecutionProvider" in ort.get_available_providers() else [])
    with models.repository(("gru", "gru3"), 256) as made, aside() as pool:
        for folder in (ROOT / "models" / MODEL / "1", made / "gru-256" / "1", made / "gru3-256" / "1"):
            for device in devices:
                rates: dict[int, float] = {}
                for size in bar(SIZES, f"{folder.parent.name} on {device}"):
                    rates[size] = pool.submit(bare.best, folder, f"runner {device}", size, 1, seconds).result()
                best = max(rates, key=rates.__getitem__)
                plot = "".join(BARS[int(rate / rates[best] * (len(BARS) - 1))] for rate in rates.values())
                detail = f"1 to {SIZES[-1]}: {plot} " + ", ".join(f"{n}: {rate:,.0f}" for n, rate in rates.items())
                what = f"{folder.parent.name} on {device}, steps/s, the best at {best} sessions a run"
                yield Row(what, "one session a run", "", f"{rates[best] / rates[1]:.1f}", None, detail)
