"""Adopting a step graph made by anyone: it gets the contract, or the reason why it cannot have one."""

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.external_data_helper import set_external_data

from tests.training import strangers
from training.adopt import Plan, adopt, require_no_chance
from training.errors import ExportError

VOICE = Plan(["state=stateN@1"], constants=["rate=16000"], shapes=["x=6"])
MEMORY = Plan(["h=h_next"])


def golden(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of golden.npz."""
    with np.load(folder / "golden.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def test_a_state_on_axis_1_and_a_constant_are_told(tmp_path: Path) -> None:
    """The manifest says which tensor is what, shapes without the batch; the golden vectors are the graph's own."""
    folder = adopt(strangers.voice(tmp_path / "voice.onnx"), tmp_path / "models", "voice", VOICE, about="Speech?")
    assert folder == tmp_path / "models" / "voice" / "1"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["description"] == "Speech?"
    assert manifest["input"] == {"name": "x", "dtype": "float32", "shape": [6], "batch_axis": 0}
    assert manifest["state"] == [
        {"name": "state", "dtype": "float32", "shape": [2, 4], "batch_axis": 1, "input": "state", "output": "stateN"}
    ]
    assert [(output["name"], output["shape"], output["role"]) for output in manifest["outputs"]] == [
        ("speech", [1], "prediction")
    ]
    assert manifest["constants"] == [{"name": "rate", "dtype": "int64", "shape": [], "value": [16000]}]
    assert manifest["parameters"] == 6 * 4 + 4 * 4 + 4 + 1
    arrays = golden(folder)
    assert arrays["input.x"].shape == (3, 24, 6)
    assert arrays["output.speech"].shape == (3, 24, 1)
    np.testing.assert_allclose(arrays["state.state"][:, 0], np.tanh(arrays["state.state"][:, 1]), rtol=1e-5)


def test_a_constant_is_used(tmp_path: Path) -> None:
    """Another rate takes the other branch of the graph."""
    path = strangers.voice(tmp_path / "voice.onnx")
    first = golden(adopt(path, tmp_path / "models", "voice", VOICE))
    other = golden(adopt(path, tmp_path / "models", "voice", Plan(VOICE.states, ["rate=8000"], VOICE.shapes)))
    np.testing.assert_array_equal(first["input.x"], other["input.x"])
    assert np.abs(first["output.speech"] - other["output.speech"]).max() > 0.01


def test_several_states_and_ids(tmp_path: Path) -> None:
    """Each state has its own axis and dtype; ids stay below what was said."""
    plan = Plan(["seen=seen_next@1", "steps=steps_next"], ids=5)
    folder = adopt(strangers.words(tmp_path / "words.onnx"), tmp_path / "models", "words", plan)
    arrays = golden(folder)
    assert arrays["input.id"].dtype == np.int64
    assert set(np.unique(arrays["input.id"])) == set(range(5))
    np.testing.assert_array_equal(arrays["output.counts"][:, -1].sum(axis=1), [24] * 3)
    np.testing.assert_array_equal(arrays["state.steps"], [[24]] * 3)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [(pair["dtype"], pair["batch_axis"]) for pair in manifest["state"]] == [("float32", 1), ("int64", 0)]


def test_a_sample_is_what_the_golden_vectors_are_made_of(tmp_path: Path) -> None:
    """Any number of sequences and steps."""
    sample = np.arange(2 * 7 * 2, dtype=np.float64).reshape(2, 7, 2)
    np.save(tmp_path / "sample.npy", sample)
    plan = Plan(MEMORY.states, sample=tmp_path / "sample.npy")
    arrays = golden(adopt(strangers.memory(tmp_path / "m.onnx"), tmp_path / "models", "memory", plan))
    np.testing.assert_array_equal(arrays["output.y"], sample.cumsum(axis=1))
    np.save(tmp_path / "sample.npy", sample[:, :, :1])
    with pytest.raises(ExportError, match=r"sample\.npy has shape \[2, 7, 1\], not \[sequences, steps, 2\]"):
        adopt(tmp_path / "m.onnx", tmp_path / "models", "memory", plan)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_a_sample_of_no_finite_numbers_is_refused(tmp_path: Path, value: float) -> None:
    """By the file and the place, whatever the graph makes of it; what only a wider float holds is not finite either."""
    sample = np.zeros((2, 7, 2))
    sample[1, 3, 0] = value
    np.save(tmp_path / "sample.npy", sample)
    path = strangers.memory(tmp_path / "m.onnx", node("Tanh", ["h"], "y"), KEEP)
    with pytest.raises(ExportError, match=r"sample\.npy is .* at \[1, 3, 0\], which is no finite float32: fill it"):
        adopt(path, tmp_path / "models", "m", Plan(MEMORY.states, sample=tmp_path / "sample.npy"))


@pytest.mark.parametrize("value", ["[1, 1e39]", "[NaN, 1]", "[1, -Infinity]"])
def test_a_constant_of_no_finite_numbers_is_refused(tmp_path: Path, value: str) -> None:
    """By its name, not by the output that it would spoil."""
    model = onnx.load(strangers.memory(tmp_path / "m.onnx", node("Add", ["x", "k"], "y"), KEEP))
    model.graph.input.append(strangers.value("k", [2]))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=rf"the value of 'k' is no finite float32: {re.escape(value)}"):
        adopt(tmp_path / "m.onnx", tmp_path / "models", "m", replace(MEMORY, constants=(f"k={value}",)))


def test_a_sample_of_ids_is_taken_as_it_is(tmp_path: Path) -> None:
    """Fractions are none, and would be cut to others."""
    np.save(tmp_path / "ids.npy", np.array([[1.0, 2.0, 4.0]]))
    plan = Plan(["seen=seen_next@1", "steps=steps_next"], sample=tmp_path / "ids.npy")
    path = strangers.words(tmp_path / "words.onnx")
    assert golden(adopt(path, tmp_path / "models", "words", plan))["input.id"].tolist() == [[1, 2, 4]]
    np.save(tmp_path / "ids.npy", np.array([[1.0, 2.5, 4.0]]))
    with pytest.raises(ExportError, match=r"ids\.npy holds values that are no whole numbers; input 'id' is int64"):
        adopt(path, tmp_path / "models", "words", plan)


def test_weights_count_wherever_they_are(tmp_path: Path) -> None:
    """In a node's attribute and in another width, too."""
    model = onnx.load(strangers.memory(tmp_path / "m.onnx"))
    double = numpy_helper.from_array(np.ones((2, 3)), "weights")
    model.graph.initializer.append(double)
    model.graph.node.insert(0, helper.make_node("Constant", [], ["more"], value=numpy_helper.from_array(np.ones(5))))
    onnx.save(model, tmp_path / "m.onnx")
    folder = adopt(tmp_path / "m.onnx", tmp_path / "models", "memory", MEMORY)
    assert json.loads((folder / "manifest.json").read_text())["parameters"] == 1 + 6 + 5
    model = onnx.load(strangers.voice(tmp_path / "voice.onnx"))
    branch = next(node for node in model.graph.node if node.op_type == "If").attribute[0].g
    branch.initializer.append(numpy_helper.from_array(np.ones(7, np.float32), "inner"))
    onnx.save(model, tmp_path / "voice.onnx")
    folder = adopt(tmp_path / "voice.onnx", tmp_path / "models", "voice", VOICE)
    assert json.loads((folder / "manifest.json").read_text())["parameters"] == 6 * 4 + 4 * 4 + 4 + 1 + 7


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan([]), "no --state given: .* the graph takes x, state, rate and returns speech, stateN"),
        (Plan(["state"]), "--state 'state' is not in=out or in=out@axis"),
        (Plan(["states=stateN@1"], ["rate=1"]), "'?x, state'? would be what a client sends"),
        (Plan(["state=next@1"], ["rate=1"], ["x=6"]), "does not return 'next': it returns speech, stateN"),
        (Plan(["state=stateN@1"]), "x, rate would be what a client sends, and one input must be"),
        (Plan(["state=stateN@1"], sequence="x"), "rate is neither state, constant nor the input 'x'"),
        (Plan(["state=stateN@1"], ["rate=fast"], ["x=6"]), "the value of 'rate' is no int64 in JSON"),
        (Plan(["state=stateN@1"], ["rate=1.7"], ["x=6"]), "the value of 'rate' is no int64 in JSON: 1.7"),
        (Plan(["state=stateN@1"], ["rate=1"], ["x=0"]), r"'x' has shape \[0\] without the batch: sizes are at least 1"),
        (Plan(["state=stateN@1"], ["rate=[1]"], ["x=6"]), r"constant 'rate' has shape \[\], its value \[1\]"),
        (Plan(["state=stateN@1"], ["pace=1"], ["x=6"]), "does not take 'pace': it takes x, state, rate"),
        (Plan(["state=stateN@1"], ["rate=1"]), r"'x' has shape \['batch', 'samples'\]: say .* such as --shape x=1"),
        (Plan(["state=stateN@1"], ["rate=1"], ["x=6x1"]), r"--shape of 'x' is \[6, 1\], but the graph says"),
        (Plan(["state=stateN@1"], ["rate=1"], ["x=5"]), "the graph refuses a step of 2 sessions"),
        (Plan(["state=stateN"], ["rate=1"], ["x=6"]), "'state' has .*: its batch axis 0 is fixed at 2; .* state@1"),
        (Plan(["state=stateN@3"], ["rate=1"], ["x=6"]), "there is no axis 3 for the batch"),
        (Plan(["state=speech@1"], ["rate=1"], ["x=6"]), r"'state' takes shape \[2, 2, 4\] for 2 .* returns \[2, 1\]"),
    ],
)  # fmt: skip
def test_a_plan_that_does_not_fit_says_why(tmp_path: Path, plan: Plan, words: str) -> None:
    """By the name of the tensor, and nothing is written."""
    with pytest.raises(ExportError, match=words):
        adopt(strangers.voice(tmp_path / "voice.onnx"), tmp_path / "models", "voice", plan)
    assert not (tmp_path / "models").exists()


def test_a_fixed_batch_is_refused(tmp_path: Path) -> None:
    """A graph exported for one session."""
    path = strangers.voice(tmp_path / "voice.onnx", batch=1)
    with pytest.raises(ExportError, match=r"'x' has shape .*: its batch axis 0 is fixed at 1; export"):
        adopt(path, tmp_path / "models", "voice", VOICE)


def node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    """A node of one output."""
    return helper.make_node(op, inputs, [output], **attributes)


KEEP = node("Identity", ["h"], "h_next")


@pytest.mark.parametrize(
    ("nodes", "shapes", "words"),
    [
        ([node("ReduceSum", ["x"], "y", keepdims=1), KEEP], {"y": [1, 1]}, r"'y' has no batch axis: for 2, 3, 5"),
        ([node("CumSum", ["x", "zero"], "y"), KEEP], {}, "output 'y' differs by .* alone and among 3: rows of a batch"),
        (
            [node("CumSum", ["x", "zero"], "s"), node("Constant", [], "few", value_float=1e-3),
             node("Mul", ["s", "few"], "part"), node("Add", ["x", "part"], "y"), KEEP],
            {}, "output 'y' differs by .*e-0[34] when a session runs alone",
        ),
        ([node("RandomNormalLike", ["x"], "y"), KEEP], {}, "RandomNormalLike 'y' draws .* not deterministic; draw in"),
        ([node("Mul", ["x", "big"], "y"), node("Mul", ["y", "big"], "h_next")], {}, "state 'h' is not finite"),
        (
            [node("Identity", ["x"], "y"), node("Concat", ["h", "x"], "h_next", axis=1)], {"h_next": ["batch", 4]},
            r"state 'h' takes shape \[2, 2\] .* returns \[2, 4\]",
        ),
    ],
)  # fmt: skip
def test_a_graph_that_is_no_step_is_refused(
    tmp_path: Path, nodes: list[onnx.NodeProto], shapes: dict[str, list[Any]], words: str
) -> None:
    """Without a batch axis, with rows that feel each other, with chance in it, with a state that overflows or grows."""
    with pytest.raises(ExportError, match=words):
        adopt(strangers.memory(tmp_path / "m.onnx", *nodes, **shapes), tmp_path / "models", "memory", MEMORY)
    assert not (tmp_path / "models").exists()


def dropout(path: Path, mode: str) -> Path:
    """Sums x + h, of which one in ten thousand is dropped where `mode` is on."""
    given = node("Constant", [], "on", value=numpy_helper.from_array(np.array(mode in ("on", "nothing"))))
    rate = node("Constant", [], "rate", value_float=0.0 if mode == "nothing" else 1e-4)
    drop = node("Dropout", ["x", "rate", "train" if mode == "given" else "on"], "kept")
    nodes = [given, rate, drop, node("Add", ["kept", "h"], "y"), KEEP]
    model = onnx.load(strangers.memory(path, *nodes))
    if mode == "given":
        model.graph.input.append(strangers.value("train", [], onnx.TensorProto.BOOL))
    elif mode == "weight":
        del model.graph.node[0]
        model.graph.initializer.append(numpy_helper.from_array(np.array(False), "on"))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("mode", "constants", "refused"),
    [("on", (), True), ("off", (), False), ("weight", (), False), ("nothing", (), False),
     ("given", ("train=true",), True), ("given", ("train=false",), False)],
)  # fmt: skip
def test_a_little_chance_is_refused_too(tmp_path: Path, mode: str, constants: tuple[str, ...], refused: bool) -> None:
    """What two runs would hardly show: by the operator, which may be there as long as it drops nothing."""
    path, plan = dropout(tmp_path / "m.onnx", mode), replace(MEMORY, constants=constants)
    if not refused:
        assert adopt(path, tmp_path / "models", "m", plan).name == "1"
        return
    with pytest.raises(ExportError, match=r"Dropout 'kept' draws random numbers: .* export it in evaluation mode"):
        adopt(path, tmp_path / "models", "m", plan)


@pytest.mark.parametrize("trains", [0, 1])
def test_whether_dropout_is_on_is_found_out_behind_other_nodes(tmp_path: Path, trains: int) -> None:
    """As some exporters write it."""
    nodes = [
        node("Constant", [], "said", value_int=trains),
        node("Identity", ["said"], "same"),
        node("Cast", ["same"], "trains", to=onnx.TensorProto.BOOL),
        node("Dropout", ["x", "", "trains"], "y"),
        KEEP,
    ]
    model = onnx.load(strangers.memory(tmp_path / "m.onnx", *nodes))
    with pytest.raises(ExportError, match="Dropout 'y' draws") if trains else nullcontext():
        require_no_chance(model, {})


def test_chance_that_no_operator_admits_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same steps taken twice."""
    monkeypatch.setattr("training.adopt.RANDOM", ())
    path = strangers.memory(tmp_path / "m.onnx", node("RandomNormalLike", ["x"], "y"), KEEP)
    with pytest.raises(ExportError, match=r"output 'y' differs when .* not deterministic"):
        adopt(path, tmp_path / "models", "m", MEMORY)


def gru(direction: str, where: str) -> onnx.ModelProto:
    """Takes x [B, 2] through a GRU of 2 units and back, in the graph itself, in a branch or in a function."""
    ways = 2 if direction == "bidirectional" else 1
    nodes = [
        node("Unsqueeze", ["x", "zero"], "x3"),
        helper.make_node("GRU", ["x3", "W", "R", "", "", "h3"], ["", "Yh"], hidden_size=2, direction=direction),
    ]
    inputs, outputs, weights = ["x", "h3"], ["Yh"], {"zero": np.array([0]), "first": np.array([0])}
    weights |= {name: np.full((ways, 6, 2), 0.1, np.float32) for name in "WR"}
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    opsets, functions = [helper.make_opsetid("", 17)], []
    if where == "branch":
        inner = helper.make_graph(nodes, "inner", [], [strangers.value("Yh", [ways, "batch", 2])])
        other = node("Identity", ["h3"], "kept")
        keep = helper.make_graph([other], "keep", [], [strangers.value("kept", [ways, "batch", 2])])
        nodes = [node("Constant", [], "yes", value=numpy_helper.from_array(np.array(True)))]
        nodes += [node("If", ["yes"], "out", then_branch=inner, else_branch=keep)]
    elif where == "function":
        del nodes[1].attribute[0]
        nodes[1].attribute.append(onnx.AttributeProto(name="direction", ref_attr_name="way", type="STRING"))
        inputs += ["W", "R", "zero"]
        functions = [helper.make_function("own", "Layer", inputs, outputs, nodes, opsets, ["way"])]
        nodes = [node("Layer", inputs, "out", domain="own", way=direction)]
        opsets = [*opsets, helper.make_opsetid("own", 1)]
    else:
        nodes += [node("Identity", ["Yh"], "out")]
    nodes += [node("Identity", ["out"], "h3_next"), node("Gather", ["out", "first"], "y1", axis=0)]
    nodes += [node("Squeeze", ["y1", "zero"], "y")]
    graph = helper.make_graph(
        nodes, "layer", [strangers.value("x", ["batch", 2]), strangers.value("h3", [ways, "batch", 2])],
        [strangers.value("y", ["batch", 2]), strangers.value("h3_next", [ways, "batch", 2])], tensors,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=8)


@pytest.mark.parametrize("where", ["graph", "branch", "function"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_a_layer_that_reads_later_steps_is_refused(tmp_path: Path, direction: str, where: str) -> None:
    """Wherever it is: fed step by step it would answer, and with something else than it was trained to."""
    onnx.save(gru(direction, where), tmp_path / "m.onnx")
    plan = Plan(["h3=h3_next@1"])
    if direction == "forward":
        assert adopt(tmp_path / "m.onnx", tmp_path / "models", "m", plan).name == "1"
        return
    with pytest.raises(ExportError, match=rf"GRU '.*' is {direction}: it reads later steps"):
        adopt(tmp_path / "m.onnx", tmp_path / "models", "m", plan)
    assert not (tmp_path / "models").exists()


def test_a_layer_over_something_within_a_step_may_go_both_ways(tmp_path: Path) -> None:
    """It begins from nothing at every step, as those over the bands of a frame do."""
    nodes = [
        node("Transpose", ["x"], "bands", perm=[1, 0]),
        node("Unsqueeze", ["bands", "two"], "bands3"),
        helper.make_node("GRU", ["bands3", "W", "R"], ["Y"], hidden_size=1, direction="bidirectional"),
        node("ReduceSum", ["Y", "axes"], "both", keepdims=0),
        node("Transpose", ["both"], "y", perm=[1, 0]),
        KEEP,
    ]
    model = onnx.load(strangers.memory(tmp_path / "m.onnx", *nodes))
    weights = {"two": np.array([2]), "axes": np.array([1, 3]), **{n: np.full((2, 3, 1), 0.1, np.float32) for n in "WR"}}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    onnx.save(model, tmp_path / "m.onnx")
    assert adopt(tmp_path / "m.onnx", tmp_path / "models", "m", MEMORY).name == "1"


def test_a_function_of_another_opset_is_looked_into_too(tmp_path: Path) -> None:
    """It stays a call: it cannot be put in the place of it."""
    path = strangers.memory(tmp_path / "m.onnx", node("Identity", ["x"], "y"), KEEP)
    inner = [
        node("Constant", [], "on", value=numpy_helper.from_array(np.array(True))),
        node("Constant", [], "rate", value_float=1e-4),
        node("Dropout", ["a", "rate", "on"], "b"),
    ]
    model = onnx.load(path)
    model.graph.node[0].CopyFrom(node("Own", ["x"], "y", domain="own"))
    model.functions.append(helper.make_function("own", "Own", ["a"], ["b"], inner, [helper.make_opsetid("", 15)]))
    model.opset_import.append(helper.make_opsetid("own", 1))
    onnx.save(model, path)
    with pytest.raises(ExportError, match="Dropout 'b' draws random numbers"):
        adopt(path, tmp_path / "models", "m", MEMORY)


def test_a_graph_under_its_files_name_is_a_new_version_or_another_model(tmp_path: Path) -> None:
    """`model.onnx` is what many are called: the second is no version of the first unless it has its tensors."""
    models, path = tmp_path / "models", tmp_path / "model.onnx"
    for version in ("1", "2"):
        strangers.memory(path, node("Identity", ["x"], "y"), KEEP)
        assert adopt(path, models, "model", MEMORY, succeeds=True).name == version
    strangers.voice(path)
    with pytest.raises(ExportError, match=r"model/2 has other tensors: model\.onnx is no new version of it; give it"):
        adopt(path, models, "model", VOICE, succeeds=True)
    assert adopt(path, models, "model", VOICE).name == "3"


@pytest.mark.parametrize("wider", [("x", "y", "h", "h_next"), ("h", "h_next")])
def test_a_new_version_has_the_sizes_of_the_one_before(tmp_path: Path, wider: tuple[str, ...]) -> None:
    """Of the state too: a session that is kept goes on with the newest."""
    path, nodes = tmp_path / "model.onnx", [node("Identity", ["x"], "y"), KEEP]
    adopt(strangers.memory(path, *nodes), tmp_path / "models", "model", MEMORY)
    strangers.memory(path, *nodes, **{name: ["batch", 3] for name in wider})
    with pytest.raises(ExportError, match=r"model/1 has other tensors: model\.onnx is no new version of it"):
        adopt(path, tmp_path / "models", "model", MEMORY, succeeds=True)


@pytest.mark.parametrize("sample", ["archive", "empty", "text"])
def test_a_sample_that_is_no_array_is_refused(tmp_path: Path, sample: str) -> None:
    """By its name."""
    path = tmp_path / "sample.npy"
    with path.open("wb") as file:
        if sample == "archive":
            np.savez(file, a=np.zeros(3))
        elif sample == "text":
            np.save(file, np.array([["a"]]))
    with pytest.raises(ExportError, match=r"sample\.npy is no \.npy array"):
        adopt(strangers.voice(tmp_path / "voice.onnx"), tmp_path / "models", "voice", replace(VOICE, sample=path))


def test_ids_must_be_bounded(tmp_path: Path) -> None:
    """Random ids of an unknown vocabulary would be outside of it."""
    plan = Plan(["seen=seen_next@1", "steps=steps_next"])
    with pytest.raises(ExportError, match="input 'id' is int64: say below what its ids are with --ids"):
        adopt(strangers.words(tmp_path / "words.onnx"), tmp_path / "models", "words", plan)


def test_files_that_are_no_models_are_refused(tmp_path: Path) -> None:
    """Absent, something else, a broken graph, an operator or an opset that nobody knows."""
    path = tmp_path / "m.onnx"
    with pytest.raises(ExportError, match=r"m\.onnx cannot be read: No such file"):
        adopt(path, tmp_path / "models", "m", MEMORY)
    path.write_bytes(b"<html>")
    with pytest.raises(ExportError, match=r"m\.onnx is not an ONNX model|does not pass ONNX's own check"):
        adopt(path, tmp_path / "models", "m", MEMORY)
    strangers.memory(path, node("Add", ["x", "gone"], "y"), KEEP)
    with pytest.raises(ExportError, match=r"m\.onnx \(ai\.onnx 17\) does not pass ONNX's own check"):
        adopt(path, tmp_path / "models", "m", MEMORY)
    model = onnx.load(strangers.memory(path))
    model.opset_import[0].version = 9999
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=r"cannot load the graph: .*[Oo]pset 9999"):
        adopt(path, tmp_path / "models", "m", MEMORY)
    model = onnx.load(strangers.memory(path))
    model.graph.node.append(helper.make_node("Magic", ["x"], ["z"], domain="their.own"))
    model.opset_import.append(helper.make_opsetid("their.own", 1))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=r"cannot load the graph: .*their\.own"):
        adopt(path, tmp_path / "models", "m", MEMORY)


def test_weights_in_a_file_beside_are_taken_in(tmp_path: Path) -> None:
    """As torch writes them by default; the version is one file, which its sha256 covers."""
    model = onnx.load(strangers.voice(tmp_path / "one.onnx"))
    (tmp_path / "given").mkdir()
    onnx.save_model(
        model, tmp_path / "given" / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0
    )
    assert (tmp_path / "given" / "m.data").is_file()
    paths = [tmp_path / "one.onnx", tmp_path / "given" / "m.onnx"]
    made = [adopt(path, tmp_path / "models", path.parent.name, VOICE) for path in paths]
    one, other = (golden(path) for path in made)
    assert all(np.array_equal(one[name], other[name]) for name in one)
    (tmp_path / "given" / "m.data").write_bytes(b"short")
    with pytest.raises(ExportError, match="its weights in other files cannot be read"):
        adopt(paths[1], tmp_path / "models", "cut", VOICE)


@pytest.mark.parametrize("place", ["gone.bin", "../one.onnx", "/etc/passwd"])
def test_weights_elsewhere_are_refused(tmp_path: Path, place: str) -> None:
    """By the weight's name; a path in the graph leads nowhere but beside it."""
    (tmp_path / "given").mkdir()
    model = onnx.load(strangers.voice(tmp_path / "one.onnx"))
    set_external_data(model.graph.initializer[0], place)
    (tmp_path / "given" / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=r"weight 'W' lies in .* no file beside it: put it there"):
        adopt(tmp_path / "given" / "m.onnx", tmp_path / "models", "m", VOICE)


def test_a_tensor_is_given_once(tmp_path: Path) -> None:
    """Twice the same state, or two states of one result: a slip that the service would refuse, or worse, not."""
    path = strangers.voice(tmp_path / "m.onnx")
    for states in (("state=stateN@1", "state=stateN@1"), ("state=stateN@1", "x=stateN")):
        with pytest.raises(ExportError, match="is given twice: a tensor is one state"):
            adopt(path, tmp_path / "models", "m", replace(VOICE, states=states))


def test_a_version_is_not_replaced_unasked(tmp_path: Path) -> None:
    """As with export."""
    path = strangers.memory(tmp_path / "m.onnx")
    adopt(path, tmp_path / "models", "memory", MEMORY)
    assert adopt(path, tmp_path / "models", "memory", MEMORY).name == "2"
    with pytest.raises(ExportError, match="memory/1 exists"):
        adopt(path, tmp_path / "models", "memory", MEMORY, version="1")
    adopt(path, tmp_path / "models", "memory", MEMORY, version="1", force=True)


def test_an_output_may_have_its_batch_elsewhere(tmp_path: Path) -> None:
    """The golden vectors have it first, as the manifest says where it is."""
    nodes = [node("Add", ["x", "h"], "h_next"), node("Transpose", ["h_next"], "y", perm=[1, 0])]
    path = strangers.memory(tmp_path / "m.onnx", *nodes, y=[2, "batch"])
    folder = adopt(path, tmp_path / "models", "memory", MEMORY)
    arrays = golden(folder)
    np.testing.assert_allclose(arrays["output.y"], arrays["input.x"].cumsum(axis=1), rtol=1e-5, atol=1e-5)
    (output,) = json.loads((folder / "manifest.json").read_text())["outputs"]
    assert (output["shape"], output["batch_axis"]) == ([2], 1)


@pytest.mark.parametrize(
    ("nodes", "shapes", "words"),
    [
        (
            [node("Add", ["x", "h"], "y"), KEEP],
            {"y": [5, 2]},
            r"'y' is declared with shape \[5, 2\], but it has 2 axes",
        ),
        ([node("Add", ["x", "h"], "y"), KEEP], {"h_next": [5, 2]}, r"'h_next' is declared with shape \[5, 2\]"),
    ],
)
def test_a_result_that_is_declared_as_something_else_is_refused(
    tmp_path: Path, nodes: list[onnx.NodeProto], shapes: dict[str, list[Any]], words: str
) -> None:
    """The service reads the declaration: one of another number of sessions would be believed."""
    with pytest.raises(ExportError, match=words):
        adopt(strangers.memory(tmp_path / "m.onnx", *nodes, **shapes), tmp_path / "models", "memory", MEMORY)
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x", r"'x' is tensor\(double\); a step takes .* with a Cast inside"),
        ("y", r"output 'y' is tensor\(double\); a step"),
    ],
)
def test_other_types_are_refused(tmp_path: Path, name: str, words: str) -> None:
    """By the tensor's name."""
    nodes = {
        "x": [node("Cast", ["x"], "x32", to=onnx.TensorProto.FLOAT), node("Add", ["x32", "h"], "y"), KEEP],
        "y": [node("Add", ["x", "h"], "y32"), node("Cast", ["y32"], "y", to=onnx.TensorProto.DOUBLE), KEEP],
    }[name]
    model = onnx.load(strangers.memory(tmp_path / "m.onnx", *nodes))
    for one in (*model.graph.input, *model.graph.output):
        if one.name == name:
            one.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=words):
        adopt(tmp_path / "m.onnx", tmp_path / "models", "memory", MEMORY)


def test_an_input_may_have_its_batch_elsewhere(tmp_path: Path) -> None:
    """Said behind its name; and of several outputs the first is the prediction."""
    nodes = [node("Transpose", ["x"], "turned", perm=[1, 0]), node("Add", ["turned", "h"], "y")]
    nodes += [node("Identity", ["y"], "h_next"), node("Neg", ["y"], "less")]
    model = onnx.load(strangers.memory(tmp_path / "m.onnx", *nodes, x=[2, "batch"]))
    model.graph.output.append(strangers.value("less", ["batch", 2]))
    onnx.save(model, tmp_path / "m.onnx")
    folder = adopt(tmp_path / "m.onnx", tmp_path / "models", "m", replace(MEMORY, sequence="x@1"))
    arrays = golden(folder)
    np.testing.assert_allclose(arrays["output.y"], arrays["input.x"].cumsum(axis=1), rtol=1e-5, atol=1e-5)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["input"]["shape"], manifest["input"]["batch_axis"]) == ([2], 1)
    roles = {output["name"]: output["role"] for output in manifest["outputs"]}
    assert roles == {"y": "prediction", "less": "other"}
