"""Where a graph may run: the device that was asked for, or a refusal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.device import providers
from service.errors import SettingsInvalid


def test_importing_it_leaves_no_trace(tmp_path: Path) -> None:
    """ONNX Runtime writes no device id and no events into the home of whoever runs the service."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ORT_", "XDG_"))}
    command = [sys.executable, "-c", "import service.device"]
    subprocess.run(command, env=environment | {"HOME": str(tmp_path)}, check=True, timeout=60)
    assert list(tmp_path.rglob("*")) == []


def test_a_device_that_is_not_there_is_never_replaced_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for CUDA without a CUDA provider is an error; `auto` takes the CPU."""
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(SettingsInvalid, match="cuda:1"):
        providers("cuda:1")
    assert providers("auto") == providers("cpu") == ["CPUExecutionProvider"]


def test_a_cuda_device_is_chosen_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cuda:N` names the device to the provider."""
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: names)
    assert providers("cuda:3") == [("CUDAExecutionProvider", {"device_id": "3"})]
    assert providers("auto") == [*providers("cuda"), "CPUExecutionProvider"]
