"""What the README's figures come from: every figure is a ratio of two things measured in one run on one machine.

Reading order: `machine.py` (cores, programs, rounds), `load.py` (the generator), `echo.py` (the baselines), `latch.py`
(the service as a contender), then one file a question. `python -m benchmarks --help` says how to run them.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before the runtime is imported, as in service and training
