"""The peers, each set up as its documentation says (README.md has the titles); nothing here measures."""

import shutil
import struct

import numpy as np
from load import http, message, upgrade
from peer import MODEL, Door, Launch, Peer, Place, dumps, floats, free_port, loads

RUNTIME = ("onnxruntime==1.32.0", "orjson==3.13.0")
NUMPY = "numpy==2.4.6"
OCTETS = "application/octet-stream"
JSON, BINARY = "HTTP, JSON", "HTTP, binary"
SOCKET_JSON, SOCKET_BINARY = "WebSocket, JSON", "WebSocket, binary"


# Latch: sessions are made with PUT. Steps carry no number, because no peer would recognize a duplicate.


def _latch(place: Place) -> Launch:
    shutil.copytree(MODEL.parents[1], place.folder / "models" / "chorales-gru")
    command = [place.program("latch"), "serve", "--port", place.port, "--models", place.folder / "models"]
    return Launch(command, {"LATCH_LOG_LEVEL": "warning"})


def _latch_session(session: int) -> list[bytes]:
    return [http("PUT", f"/v1/sessions/bench-{session}", b'{"model": "chorales-gru"}')]


def _latch_socket(session: int, subprotocol: str) -> list[bytes]:
    socket = upgrade(f"/v1/sessions/bench-{session}/stream", f"Sec-WebSocket-Protocol: {subprotocol}")
    return [*_latch_session(session), socket]


def _latch_steps(session: int, body: bytes, *kind: str) -> bytes:
    return http("POST", f"/v1/sessions/bench-{session}/steps", body, *kind)


def _latch_json(x: np.ndarray) -> bytes:
    return dumps({"inputs": [x]})


def _latch_reply(reply: bytes) -> np.ndarray:
    return loads(reply, "outputs", "y")


LATCH = Peer(
    "Latch",
    "latch",
    (),
    _latch,
    "/health/ready",
    (
        Door(JSON, lambda i, x, _: _latch_steps(i, _latch_json(x)), _latch_reply, _latch_session),
        Door(BINARY, lambda i, x, _: _latch_steps(i, x.tobytes(), OCTETS), floats, _latch_session),
        Door(
            SOCKET_JSON,
            lambda i, x, _: message(_latch_json(x)),
            _latch_reply,
            lambda i: _latch_socket(i, "latch.json"),
            greeted=True,
        ),
        Door(
            SOCKET_BINARY,
            lambda i, x, _: message(struct.pack("<BBHIQ", 1, 0, 0, 1, 0) + x.tobytes(), 2),
            floats,
            lambda i: _latch_socket(i, "latch.binary"),
            greeted=True,
        ),
    ),
)


# NVIDIA Triton, with both strategies of its sequence batcher. "Oldest" is the one for models that keep their own state
# by correlation id, and takes any number of sequences. "Direct" gives each sequence a row of the batch for as long as
# it lives: here exactly as many rows as there are clients, its best case. No delay: 64 clients in a closed loop fill
# the batches by themselves.

TRITON_CONFIG = """
name: "gru"
backend: "python"
max_batch_size: 64
input {{ name: "x" data_type: TYPE_FP32 dims: 88 }}
output {{ name: "y" data_type: TYPE_FP32 dims: 88 }}
instance_group {{ count: 1 kind: KIND_CPU }}
sequence_batching {{
  max_sequence_idle_microseconds: 600000000
  {strategy}
  control_input {{ name: "session" control {{ kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 }} }}
}}
"""


def _triton(place: Place, strategy: str) -> Launch:
    packages = place.environment / "lib" / "python3.11" / "site-packages"
    server, models, backends = (
        packages / "pytriton" / "tritonserver",
        place.folder / "models",
        place.folder / "backends",
    )
    place.copy("triton_model.py", "models/gru/1/model.py")
    place.write("models/gru/config.pbtxt", TRITON_CONFIG.format(strategy=strategy))
    # The wheel has a stub for each Python; Triton looks for one beside the backend.
    shutil.copytree(server / "backends" / "python", backends / "python")
    shutil.copy(server / "python_backend_stubs" / "3.11" / "triton_python_backend_stub", backends / "python")
    command = [server / "bin" / "tritonserver", f"--model-repository={models}", f"--backend-directory={backends}"]
    command += ["--http-address=127.0.0.1", f"--http-port={place.port}", "--allow-grpc=false", "--allow-metrics=false"]
    libraries = packages / "nvidia_pytriton.libs"
    return Launch([*command, "--exit-timeout-secs=1"], {"PYTHONPATH": packages, "LD_LIBRARY_PATH": libraries})


def _triton_request(session: int, first: bool, **x: object) -> dict[str, object]:
    sequence = {"sequence_id": session, "sequence_start": first, "sequence_end": False}
    return {"parameters": sequence, "inputs": [{"name": "x", "shape": [1, 88], "datatype": "FP32", **x}]}


def _triton_json(session: int, x: np.ndarray, first: bool) -> bytes:
    return http("POST", "/v2/models/gru/infer", dumps(_triton_request(session, first, data=x)))


def _triton_binary(session: int, x: np.ndarray, first: bool) -> bytes:
    request = _triton_request(session, first, parameters={"binary_data_size": x.nbytes})
    head = dumps(request | {"outputs": [{"name": "y", "parameters": {"binary_data": True}}]})
    size = f"Inference-Header-Content-Length: {len(head)}"
    return http("POST", "/v2/models/gru/infer", head + x.tobytes(), OCTETS, size)


def triton(name: str, strategy: str) -> Peer:
    """Triton with one of the strategies."""
    doors = (
        Door(JSON, _triton_json, lambda reply: loads(reply, "outputs", 0, "data")),
        Door(BINARY, _triton_binary, floats),
    )
    needs = ("nvidia-pytriton==0.7.0", "numpy==1.26.4", *RUNTIME)
    return Peer(name, "nvidia-pytriton", needs, lambda at: _triton(at, strategy), "/v2/models/gru/ready", doors)


# Ray Serve in its high throughput mode.


def _ray(place: Place) -> Launch:
    place.copy("ray_serve.py", "server.py")
    command = [place.program("python"), "server.py", "--port", place.port, "--cpus", place.cores]
    fast = {"RAY_SERVE_ENABLE_HA_PROXY": 1, "RAY_SERVE_THROUGHPUT_OPTIMIZED": 1}
    return Launch(
        command,
        {
            "PYTHONPATH": place.folder,
            "RAY_TMPDIR": place.folder,
            "RAY_USAGE_STATS_ENABLED": 0,
            "RAY_AUTH_MODE": "disabled",
            **fast,
        },
    )


RAY = Peer(
    "Ray Serve",
    "ray",
    ("ray[serve]==2.60.0", NUMPY, *RUNTIME),
    _ray,
    "/ready",
    (
        Door(JSON, lambda i, x, _: http("POST", f"/sessions/{i}/step", dumps(x)), loads),
        Door(SOCKET_JSON, lambda i, x, _: message(dumps(x)), loads, lambda _: [upgrade("/stream")]),
        Door(SOCKET_BINARY, lambda i, x, _: message(x.tobytes(), 2), floats, lambda _: [upgrade("/stream")]),
    ),
    settle=5,  # its proxy is configured anew shortly after the replica is ready, and drops connections then
)


# TorchServe. `batchSize` times the workers is how many sequences are served at all: one keeps its place until it was
# idle for `sequenceMaxIdleMSec`.

TORCHSERVE_MODEL = """
minWorkers: 1
maxWorkers: 1
batchSize: 64
maxBatchDelay: 1
maxNumSequence: 64
sequenceMaxIdleMSec: 60000
maxSequenceJobQueueSize: 10
sequenceBatching: true
"""


def _torchserve(place: Place) -> Launch:
    place.copy("torchserve_handler.py", "handler.py")
    place.write("model-config.yaml", TORCHSERVE_MODEL)
    addresses = {"inference": place.port, "management": free_port(), "metrics": free_port()}
    settings = [f"{name}_address=http://127.0.0.1:{port}" for name, port in addresses.items()]
    settings += [f"grpc_{name}_port={free_port()}" for name in ("inference", "management")]
    place.write("config.properties", "\n".join([*settings, "async_logging=true", "disable_token_authorization=true"]))
    pack = "torch-model-archiver --model-name gru --version 1 --handler handler.py --extra-files cell.py"
    serve = "torchserve --start --foreground --ncs --model-store . --models gru=gru.mar --ts-config config.properties"
    return Launch(["sh", "-c", f"{pack} --config-file model-config.yaml && exec {serve} --disable-token-auth"])


def _torchserve_json(session: int, x: np.ndarray, first: bool) -> bytes:
    kind, sequence = "application/json", f"ts_request_sequence_id: bench-{session}"
    return http("POST", "/predictions/gru", dumps(x), kind, sequence)


TORCHSERVE = Peer(
    "TorchServe",
    "torchserve",
    ("torch==2.13.0", "torchserve==0.12.0", "torch-model-archiver==0.12.0", NUMPY, "PyYAML", "psutil", *RUNTIME),
    _torchserve,
    "/ping",
    (Door(JSON, _torchserve_json, loads),),
)


# BentoML with one worker.


def _bentoml(place: Place) -> Launch:
    place.copy("bentoml_service.py", "service.py")
    command = [place.program("bentoml"), "serve", "service:Gru", "--host", "127.0.0.1", "--port", place.port]
    return Launch(command, {"BENTOML_HOME": place.folder / "home", "BENTOML_DO_NOT_TRACK": True})


def _bentoml_json(session: int, x: np.ndarray, first: bool) -> bytes:
    return http("POST", "/step", dumps({"steps": [{"session": str(session), "x": x}]}))


BENTOML = Peer(
    "BentoML",
    "bentoml",
    ("bentoml==1.4.39", "fastapi==0.165.0", "websockets==17.4", NUMPY, *RUNTIME),
    _bentoml,
    "/readyz",
    (
        Door(JSON, _bentoml_json, loads),
        Door(SOCKET_JSON, lambda i, x, _: message(dumps(x)), loads, lambda _: [upgrade("/ws/stream")]),
        Door(SOCKET_BINARY, lambda i, x, _: message(x.tobytes(), 2), floats, lambda _: [upgrade("/ws/stream")]),
    ),
)


# LitServe with one worker.


def _litserve(place: Place) -> Launch:
    place.copy("litserve_server.py", "server.py")
    return Launch([place.program("python"), "server.py", "--port", place.port])


def _litserve_json(session: int, x: np.ndarray, first: bool) -> bytes:
    return http("POST", "/predict", dumps({"session": str(session), "x": x}))


LITSERVE = Peer(
    "LitServe",
    "litserve",
    ("litserve==0.2.19", NUMPY, *RUNTIME),
    _litserve,
    "/health",
    (Door(JSON, _litserve_json, lambda reply: loads(reply, "y")),),
)


# MLServer without parallel workers, each of which would have states of its own, and without adaptive batching, which is
# off by default and was slower here (1 and 5 ms).


def _mlserver(place: Place) -> Launch:
    place.copy("mlserver_runtime.py", "runtime.py")
    ports = {"http_port": place.port, "grpc_port": free_port(), "metrics_port": free_port()}
    place.write("settings.json", dumps({"parallel_workers": 0, "debug": False, **ports}).decode())
    place.write("model-settings.json", dumps({"name": "gru", "implementation": "runtime.Gru"}).decode())
    return Launch([place.program("mlserver"), "start", "."], {"PYTHONPATH": place.folder})


def _mlserver_json(session: int, x: np.ndarray, first: bool) -> bytes:
    inputs = [
        {"name": "x", "shape": [1, 88], "datatype": "FP32", "data": x},
        {"name": "session", "shape": [1, 1], "datatype": "INT64", "data": [session]},
    ]
    return http("POST", "/v2/models/gru/infer", dumps({"inputs": inputs}))


MLSERVER = Peer(
    "MLServer",
    "mlserver",
    ("mlserver==1.7.1", NUMPY, *RUNTIME),
    _mlserver,
    "/v2/models/gru/ready",
    (Door(JSON, _mlserver_json, lambda reply: loads(reply, "outputs", 0, "data")),),
)

PEERS = {
    "latch": LATCH,
    "triton": triton("Triton (oldest)", "oldest { max_candidate_sequences: 1024 }"),
    "triton-direct": triton("Triton (direct, 64 slots)", "direct { }"),
    "ray": RAY,
    "torchserve": TORCHSERVE,
    "bentoml": BENTOML,
    "litserve": LITSERVE,
    "mlserver": MLSERVER,
}
