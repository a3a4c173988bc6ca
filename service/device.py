"""Where graphs run: opens ONNX Runtime sessions on the device that was asked for, or says why not.

Rule: every node of an open session is on its device; what does not fit there is refused here and never runs elsewhere
unnoticed. It knows graphs as bytes, not manifests.
"""

import os
import re
from typing import Any

import onnxruntime as ort

from service.errors import ModelUnloadable, SettingsInvalid


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


def open_session(graph: bytes, provider: Any, threads: int) -> ort.InferenceSession:
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
