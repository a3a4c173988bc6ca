"""The Latch service: one hidden state per session, thousands of sessions advanced together."""

import os

# ONNX Runtime keeps a device id and usage events in the user's cache from the moment it is imported, and only this
# name in the environment stops it: a service in somebody's rack tells nobody what it runs.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
