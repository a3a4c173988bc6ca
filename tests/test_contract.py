"""What training exports, the service runs: every unit and head, the same bits alone, in batches and in chunks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry

from service.engine import load_engines
from service.metrics import Metrics
from service.proof import prove_bits, replay_golden
from service.registry import load, load_all
from service.runtime import OrtRunner
from tests.service.conftest import OPTIONS
from tests.training import strangers
from training.adopt import Plan, adopt
from training.cells import UNITS
from training.checkpoint import Run, save_tensors
from training.config import DataInfo, ModelConfig, TrainConfig
from training.export import export
from training.model import RecurrentModel

NAMED = tuple((f"value {i}", "") for i in range(6))
INFO = DataInfo("made up", "noise", "other", "none", NAMED, NAMED, "none", None, "none", "none needed")


def exported(root: Path, cell: str, head: str, **settings: Any) -> Path:
    """The version folder of a model with random weights."""
    torch.manual_seed(3)
    model = RecurrentModel(ModelConfig(cell, 6, 6, head, hidden=9, **settings)).eval()
    Run(INFO, model.config, TrainConfig(), {}, {"metrics": []}).save(root / "run")
    save_tensors(root / "run" / "best.safetensors", dict(model.state_dict()), {"epoch": 1, "valid_loss": 1.0})
    return export(root / "run", root / "models", "made-up")


CASES = [
    *((cell, "gaussian", {"layers": 2, "standardise": True}) for cell in UNITS),
    *((cell, "categorical", {"vocabulary": 6, "learned_initial_state": True}) for cell in ("gru", "lstm")),
    *((cell, head, {"standardise": True, "residual": (5, 4, 3, 2, 1, 0)})
      for cell in ("gru", "mgu3") for head in ("gaussian", "regression")),
    ("mgu", "gaussian", {"standardise": True, "components": 3}),
    *((cell, "bernoulli", {"reset": "after"}) for cell in ("gru", "gru1", "mgu2")),
]  # fmt: skip


@pytest.mark.parametrize(("cell", "head", "settings"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_every_unit_is_served_bit_for_bit_in_one_run_a_chunk(
    tmp_path: Path, cell: str, head: str, settings: dict[str, Any]
) -> None:
    """Whatever the layers, the head or the input, only the recurrence loops and no bit depends on the form."""
    files = load(exported(tmp_path, cell, head, **settings))
    runner = OrtRunner(files.manifest, files.graph)
    assert prove_bits(runner, files)
    assert runner.chunks == "scan"
    assert replay_golden(runner, files) <= files.manifest.golden.tolerance


@pytest.mark.parametrize("blend", ["write", "keep"])
@pytest.mark.parametrize("reset", ["before", "after"])
def test_a_unit_lowered_to_its_operator_is_served_without_a_loop(tmp_path: Path, reset: str, blend: str) -> None:
    """The operator takes the chunk, in the bits of its steps, and gives what the primitives give but gates."""
    settings = {"reset": reset, "blend": blend, "standardise": True, "learned_initial_state": True}
    primitives = load(exported(tmp_path, "gru", "regression", **settings))
    files = load(export(tmp_path / "run", tmp_path / "models", "made-up", lowering="operator"))
    assert [tensor.name for tensor in primitives.manifest.outputs] == ["y", "z", "r"]
    assert [tensor.name for tensor in files.manifest.outputs] == ["y"]
    assert files.manifest.unit is not None
    assert files.manifest.unit["lowering"] == "operator"
    runner = OrtRunner(files.manifest, files.graph)
    assert prove_bits(runner, files)
    assert runner.chunks == "operator"
    assert replay_golden(runner, files) <= files.manifest.golden.tolerance
    np.testing.assert_array_equal(files.golden["output.y"], primitives.golden["output.y"])


@pytest.mark.parametrize(
    ("graph", "plan"),
    [
        (strangers.voice, Plan(["state=stateN@1"], constants=["rate=16000"], shapes=["x=6"])),
        (strangers.words, Plan(["seen=seen_next@1", "steps=steps_next"], ids=5)),
        (strangers.memory, Plan(["h=h_next"])),
    ],
    ids=["voice", "words", "memory"],
)
def test_an_adopted_graph_is_served(tmp_path: Path, graph: Callable[[Path], Path], plan: Plan) -> None:
    """Branches, open shapes, constants and states of any axis: the engine loads it, proves its bits and its chunks."""
    adopt(graph(tmp_path / "graph.onnx"), tmp_path / "models", "stranger", plan)
    found = load_all(tmp_path / "models")
    assert not found.broken
    runner = OrtRunner(found.found[0].manifest, found.found[0].graph)
    assert prove_bits(runner, found.found[0])
    assert runner.chunks.startswith("scan")
    assert replay_golden(runner, found.found[0]) == 0
    engines = load_engines(found.found, {}, OPTIONS, Metrics(CollectorRegistry()))
    assert not engines.broken
    assert [engine.key.name for engine in engines] == ["stranger"]
