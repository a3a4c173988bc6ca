"""The model step that every peer serves: one ONNX Runtime session of one thread, and the states by session.

Rule: all peers run this same file, so that they differ in how a request reaches it and in nothing else. It lives in the
peers' environments and knows only numpy and ONNX Runtime. Sessions are never freed: a benchmark's few fit.
"""

import os
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

INPUTS, HIDDEN, SESSIONS = 88, 46, 65_536


class Cell:
    """Hidden states in one array, a row a session, and the step that advances some of them."""

    def __init__(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        model = Path(os.environ["PEERS_MODEL"])
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._rows: dict[Hashable, int] = {}
        self._h = np.zeros((SESSIONS, HIDDEN), np.float32)

    def step(self, sessions: Sequence[Hashable], x: np.ndarray) -> np.ndarray:
        """Advances each session, none twice, by its row of `x`, [n, 88] -> [n, 88]; a new one starts from zeros."""
        rows = [self._rows.setdefault(session, len(self._rows)) for session in sessions]
        y, self._h[rows] = self._session.run(["y", "h_next"], {"x": x, "h": self._h[rows]})
        return y
