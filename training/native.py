"""The loops of `loops.py` on the CPU, from `native.cpp`: compiled on first use, kept in the user's cache.

Its one rule: where it cannot be had it says so once, and `loops.py` does the work. A compiler is all it needs: the
library knows neither torch nor Python, so it is built in seconds and called through ctypes.

`LATCH_KERNELS` chooses: `auto` (the default), `native` (an error where it cannot be had) or `torch`.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pooch
import torch
from torch import Tensor

from training.errors import ConfigError
from training.loops import ACTIVATIONS, Form

LINE = 64  # bytes to whose multiple native.cpp has the units padded
CHOICES = ("auto", "native", "torch")
NAMES = {torch.float32: "float", torch.float64: "double"}
SOURCE = Path(__file__).with_name("native.cpp")
# No -ffast-math: sums stay in their order, and a NaN stays one.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread")
_KINDS = {name: kind for kind, name in enumerate(ACTIVATIONS)}
_LOG = logging.getLogger(__name__)


class _Form(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64) for name in ("steps", "batch", "hidden", "gates", "keep", "after", "s", "phi", "threads")
    ]


def _compile() -> Path:
    """The library for this source, compiler and processor; OSError or CalledProcessError where there can be none."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("there is no C++ compiler")
    # What the compiler predefines names its version and what the processor can do.
    asked = subprocess.run([compiler, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, check=True)  # noqa: S603
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode() + asked.stdout).hexdigest()[:16]
    folder = Path(pooch.os_cache("latch"))
    library = folder / f"kernels-{key}.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as partial:  # another process may be doing the same
            built = Path(partial) / library.name
            subprocess.run([compiler, *FLAGS, "-o", str(built), str(SOURCE)], capture_output=True, check=True)  # noqa: S603
            built.replace(library)
    return library


@cache
def library() -> ctypes.CDLL | None:
    """The compiled loops, or None, said once. ConfigError where `LATCH_KERNELS` asks for what cannot be."""
    choice = os.environ.get("LATCH_KERNELS", CHOICES[0])
    if choice not in CHOICES:
        raise ConfigError(f"LATCH_KERNELS is {choice!r}: choose one of {', '.join(CHOICES)}")
    if choice == "torch":
        return None
    try:
        return ctypes.CDLL(str(_compile()))
    except (OSError, subprocess.CalledProcessError) as error:
        why = (getattr(error, "stderr", None) or str(error).encode()).decode(errors="replace").strip()
        if choice == "native":
            raise ConfigError(f"LATCH_KERNELS is native, but native.cpp cannot be compiled: {why}") from error
        _LOG.warning("training runs in plain torch, which is slower: native.cpp cannot be compiled (%s)", why)
        return None


def serves(x: Tensor) -> bool:
    """Whether these loops can run on tensors like `x`."""
    return x.device.type == "cpu" and x.dtype in NAMES and library() is not None


def _call(name: str, form: Form, h: Tensor, steps: int, *buffers: Tensor | None) -> None:
    """One loop; buffers are dense, and `h` [..., B, H] gives the sizes."""
    batch, hidden = h.shape[-2:]
    for buffer in buffers:  # the library would read and write beyond any other
        if buffer is not None and not (buffer.dtype == h.dtype and buffer.is_contiguous()):
            raise ValueError(f"{name} of {h.dtype}: a buffer is {buffer.dtype} with strides {buffer.stride()}")
    kinds = _KINDS[form.s], _KINDS[form.phi]
    shape = _Form(steps, batch, hidden, form.gates, form.keep, form.after, *kinds, torch.get_num_threads())
    pointers = (None if buffer is None else ctypes.c_void_p(buffer.data_ptr()) for buffer in buffers)
    getattr(library(), f"{name}_{NAMES[h.dtype]}")(ctypes.byref(shape), *pointers)


def gated_forward(form: Form, a: Tensor, h: Tensor, e: Tensor, u: Tensor, b_u: Tensor | None) -> None:
    """`loops.gated_forward`."""
    _call("gated_forward", form, h, len(a), a, h, e, u, b_u)


def gated_backward(
    form: Form, grad: Tensor, a: Tensor, h: Tensor, e: Tensor, u: Tensor, d: Tensor, d_candidate: Tensor | None
) -> Tensor:
    """`loops.gated_backward`."""
    carry = torch.zeros_like(h[0])
    _call("gated_backward", form, h, len(a), grad, a, h, e, u, d, d_candidate, carry)
    return carry


def folded_forward(form: Form, a: Tensor, h: Tensor, u: Tensor, z: Tensor | None) -> None:
    """`loops.folded_forward`."""
    _call("folded_forward", form, h, len(a), a, h, u, z)


def folded_backward(form: Form, grad: Tensor, a: Tensor, u: Tensor, z: Tensor | None, d: Tensor) -> Tensor:
    """`loops.folded_backward`."""
    carry = torch.zeros_like(grad[0])
    _call("folded_backward", form, grad, len(a), grad, a, u, z, d, carry)
    return carry


def lstm_forward(form: Form, a: Tensor, h: Tensor, c: Tensor, p: Tensor, u: Tensor) -> None:
    """`loops.lstm_forward`."""
    _call("lstm_forward", form, h, len(a), a, h, c, p, u)


def lstm_backward(
    form: Form, grad: Tensor, grad_c: Tensor, a: Tensor, c: Tensor, p: Tensor, u: Tensor, d: Tensor
) -> tuple[Tensor, Tensor]:
    """`loops.lstm_backward`."""
    carry = torch.zeros_like(grad_c)
    _call("lstm_backward", form, grad, len(a), grad, a, c, p, u, d, carry, grad_c)
    return carry, grad_c


def scan_forward(form: Form, a: Tensor, h: Tensor) -> None:
    """`loops.scan_forward`: without a product, a step after the other is fastest here."""
    _call("scan_forward", form, h, len(a), a, h)


def scan_backward(form: Form, grad: Tensor, a: Tensor, h: Tensor, d: Tensor) -> Tensor:
    """`loops.scan_backward`."""
    carry = torch.zeros_like(h[0])
    _call("scan_backward", form, h, len(a), grad, a, h, d, carry)
    return carry
