"""`OrtRunner`: one ONNX Runtime session for one step graph.

Rule: the only module that imports onnxruntime. A run is a pure function of inputs and state; it keeps nothing.
"""

import logging
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from service import scan
from service.errors import InferenceFailed, ModelUnloadable, SettingsInvalid
from service.manifest import Array, Manifest, initial_state

log = logging.getLogger(__name__)

# A run shorter than this is cheaper on the event loop's own thread than a hop to a worker (20 to 300 us).
INLINE_SECONDS = 500e-6

_ORT_TYPES = {"float32": "tensor(float)", "int64": "tensor(int64)"}


def providers(device: str) -> list[Any]:
    """What to try, in order, for `auto`, `cpu`, `cuda` or `cuda:N`; only `auto` has a second choice.

    Raises:
        SettingsInvalid: CUDA was asked for by name and the installed runtime has none; never a silent fallback.
    """
    cuda = "CUDAExecutionProvider" in ort.get_available_providers()
    if device == "cpu" or (device == "auto" and not cuda):
        return ["CPUExecutionProvider"]
    if device == "auto":
        return [*providers("cuda"), "CPUExecutionProvider"]
    if not cuda:
        raise SettingsInvalid(
            f"device {device!r}: the installed onnxruntime {ort.__version__} has no CUDA provider; "
            "install the gpu extra instead of cpu, or set LATCH_DEVICE=cpu"
        )
    index = re.fullmatch(r"cuda:(\d+)", device)
    return [("CUDAExecutionProvider", {"device_id": index[1] if index else "0"})]


def _open(graph: bytes, provider: Any, threads: int) -> ort.InferenceSession:
    """A session whose every node is on `provider`. Raises ModelUnloadable where that cannot be."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Weights in a file of their own would be looked for in the working directory, under no sha256: look nowhere.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", f"{os.devnull}/")
    if provider != "CPUExecutionProvider":
        ort.preload_dlls()  # CUDA and cuDNN come as Python packages, where the loader does not look
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        return ort.InferenceSession(graph, options, providers=[provider])
    except Exception as error:  # the errors of the binding share no base class
        raise ModelUnloadable(f"model.onnx cannot be loaded by onnxruntime {ort.__version__}: {error}") from error


def _run(session: ort.InferenceSession, wanted: list[str], feed: dict[str, Array]) -> list[Array]:
    try:
        values: list[Array] = session.run(wanted, feed)
    except Exception as error:
        raise InferenceFailed(f"onnxruntime refused the step: {error}") from error
    return values


class OrtRunner:
    """Runs the step graph of `manifest` for a batch of sessions.

    Args:
        manifest: the contract that the graph must fit.
        graph: the bytes of model.onnx.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        threads: threads that one run may use.

    Raises:
        ModelUnloadable: the runtime cannot read the graph, or its tensors are not the manifest's.
    """

    def __init__(self, manifest: Manifest, graph: bytes, *, device: str = "cpu", threads: int = 1) -> None:
        *choices, last = providers(device)
        for provider in choices:
            try:
                self._session = _open(graph, provider, threads)
                break
            except ModelUnloadable as error:
                log.warning("%s runs on the CPU: %s", manifest.name, error)
        else:
            provider = last
            self._session = _open(graph, provider, threads)
        self.device = self._session.get_providers()[0].removesuffix("ExecutionProvider").lower()
        self._manifest = manifest
        self._constants = {constant.name: constant.array() for constant in manifest.constants}
        self._replies = manifest.replies
        self._next_state = [pair.output for pair in manifest.state]
        self._axes = {t.name: t.batch_axis for t in (manifest.input, *manifest.outputs)}
        for pair in manifest.state:
            self._axes |= {pair.input: pair.batch_axis, pair.output: pair.batch_axis}
        self._moves_axes = any(self._axes.values())
        self._check_tensors()
        self._seconds_per_run, self._seconds_per_row = 0.0, 0.0
        self._scan: ort.InferenceSession | None = None
        self.chunks = "scan"
        try:
            self._scan = _open(scan.wrap(graph, manifest), provider, threads)
        except Exception as error:  # noqa: BLE001 - whatever does not fit into a loop still runs step by step
            self.step_by_step(str(error))

    def step_by_step(self, reason: str) -> None:
        """Gives up the one-run form of a chunk; `chunks` tells why."""
        self._scan = None
        self.chunks = f"loop: {reason}"

    def run(
        self, inputs: Array, state: Sequence[Array], outputs: Sequence[str]
    ) -> tuple[dict[str, Array], list[Array]]:
        """Advances B sessions by T steps each.

        Args:
            inputs: [B, T, *input.shape] of the input's dtype.
            state: one [B, *shape] a state pair, in the manifest's order.
            outputs: public names of what to return.

        Returns:
            For each name [B, T, *shape], and the new state like `state`.

        Raises:
            InferenceFailed: the runtime refused; nothing was changed.
        """
        if self._scan is not None and inputs.shape[1] > 1:
            return self._run_scan(self._scan, inputs, state, outputs)
        names = [self._replies[name] for name in outputs]
        wanted = list(dict.fromkeys(names + self._next_state))
        columns: list[dict[str, Array]] = []
        for t in range(inputs.shape[1]):
            feed = {self._manifest.input.name: self._to_graph(self._manifest.input.name, inputs[:, t])}
            for pair, value in zip(self._manifest.state, state, strict=True):
                feed[pair.input] = self._to_graph(pair.input, value)
            values = _run(self._session, wanted, feed | self._constants)
            column = {name: self._from_graph(name, value) for name, value in zip(wanted, values, strict=True)}
            state = [column[name] for name in self._next_state]
            columns.append(column)
        stacked = {
            public: np.stack([column[name] for column in columns], axis=1)
            for public, name in zip(outputs, names, strict=True)
        }
        return stacked, list(state)

    def _run_scan(
        self, session: ort.InferenceSession, inputs: Array, state: Sequence[Array], outputs: Sequence[str]
    ) -> tuple[dict[str, Array], list[Array]]:
        x = self._manifest.input.name
        feed = {scan.inputs(x): np.ascontiguousarray(np.moveaxis(inputs, (1, 0), (0, 1 + self._axes[x])))}
        for pair, value in zip(self._manifest.state, state, strict=True):
            feed[scan.first(pair.input)] = self._to_graph(pair.input, value)
        names = {public: self._replies[public] for public in outputs}
        sequences = [scan.sequence(name) for name in dict.fromkeys(names.values())]
        lasts = [scan.last(pair.input) for pair in self._manifest.state]
        wanted = sequences + lasts
        values = dict(zip(wanted, _run(session, wanted, feed | self._constants), strict=True))
        stacked = {
            public: np.moveaxis(values[scan.sequence(name)], (0, 1 + self._axes[name]), (1, 0))
            for public, name in names.items()
        }
        return stacked, [
            self._from_graph(name, values[last]) for name, last in zip(self._next_state, lasts, strict=True)
        ]

    def warm_up(self, max_rows: int) -> None:
        """Runs the smallest and the largest batch once each, and learns from a second run what a row costs."""
        times = []
        for rows in (1, max(2, max_rows)):
            inputs = np.zeros((rows, 1, *self._manifest.input.shape), self._manifest.input.dtype)
            state = initial_state(self._manifest.state, rows)
            self.run(inputs, state, [])
            start = time.perf_counter()
            self.run(inputs, state, [])
            times.append(time.perf_counter() - start)
        self._seconds_per_row = max(0.0, (times[1] - times[0]) / (max(2, max_rows) - 1))
        self._seconds_per_run = times[0]

    def is_short(self, rows: int, steps: int) -> bool:
        """Whether a run of this size belongs on the event loop's own thread, as measured at warm-up."""
        return steps * (self._seconds_per_run + rows * self._seconds_per_row) <= INLINE_SECONDS

    def _to_graph(self, name: str, value: Array) -> Array:
        if self._moves_axes:
            value = np.moveaxis(value, 0, self._axes[name])
        return np.ascontiguousarray(value)

    def _from_graph(self, name: str, value: Array) -> Array:
        return np.moveaxis(value, self._axes[name], 0) if self._moves_axes else value

    def _check_tensors(self) -> None:
        """The graph's inputs and outputs must be the manifest's, in name, type and shape."""
        manifest = self._manifest
        expected = {t.name: (t.dtype, t.shape) for t in (manifest.input, *manifest.outputs)}
        inputs = {manifest.input.name} | {pair.input for pair in manifest.state} | set(self._constants)
        for pair in manifest.state:
            expected |= {pair.input: (pair.dtype, pair.shape), pair.output: (pair.dtype, pair.shape)}
        graph_inputs = {node.name: node for node in self._session.get_inputs()}
        graph_outputs = {node.name: node for node in self._session.get_outputs()}
        if set(graph_inputs) != inputs:
            raise ModelUnloadable(
                f"model.onnx takes {sorted(graph_inputs)}, the manifest says {sorted(inputs)}: both must name the same"
            )
        missing = sorted(set(expected) - set(graph_inputs) - set(graph_outputs))
        if missing:
            raise ModelUnloadable(f"model.onnx does not return {', '.join(missing)}, which the manifest promises")
        for name, (dtype, shape) in expected.items():
            node = graph_inputs.get(name) or graph_outputs[name]
            if node.type != _ORT_TYPES[dtype]:
                raise ModelUnloadable(f"model.onnx: {name} is {node.type}, the manifest says {dtype}")
            if len(node.shape) != len(shape) + 1:
                raise ModelUnloadable(
                    f"model.onnx: {name} has {len(node.shape)} axes, the manifest says {len(shape)} and the batch"
                )
            sizes = [size for axis, size in enumerate(node.shape) if axis != self._axes[name]]
            if any(isinstance(size, int) and size != want for size, want in zip(sizes, shape, strict=True)):
                raise ModelUnloadable(
                    f"model.onnx: {name} has shape {node.shape}, the manifest says {list(shape)} "
                    f"with the batch at axis {self._axes[name]}"
                )
            if isinstance(node.shape[self._axes[name]], int):
                raise ModelUnloadable(
                    f"model.onnx: the batch axis {self._axes[name]} of {name} is fixed at "
                    f"{node.shape[self._axes[name]]}: export it dynamic"
                )
