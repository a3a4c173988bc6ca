"""Latch's offline half: recurrent units, their training, and the model folders that the service loads.

Its one rule: it hands over files only (`models/manifest.schema.json`), and imports neither FastAPI nor `service`.
"""

import os

# ONNX Runtime writes a device id and usage events into the user's cache as soon as it is imported, before any call
# could switch that off; only this name in the environment prevents it. Nobody asked for a diary of their training.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
