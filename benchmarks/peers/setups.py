"""The peers, each set up as its documentation says (README.md has the titles); nothing here measures."""

import shutil
import struct
from functools import partial

import numpy as np
from load import http, message, upgrade
from peer import MODEL, Door, Launch, Peer, Place, dumps, floats, free_port, loads

COMMON = ("onnxruntime==1.32.0", "orjson==3.13.0", "numpy==2.4.6")
OCTETS = "application/octet-stream"
JSON, BINARY = "HTTP, JSON", "HTTP, binary"
SOCKET_JSON, SOCKET_BINARY = "WebSocket, JSON", "WebSocket, binary"


# Latch: sessions are made with PUT. Steps carry no number, because no peer would recognize a duplicate.


def _latch(place: Place) -> Launch:
    shutil.copytree(MODEL.parents[1], place.folder / "models" / "chorales-gru")
    command = [place.environment / "bin" / "latch", "serve", "--port", place.port, "--models", "models"]
    return command, {"LATCH_LOG_LEVEL": "warning"}


def _latch_session(session: int) -> list[bytes]:
    return [http("PUT", f"/v1/sessions/bench-{session}", b'{"model": "chorales-gru"}')]


def _latch_socket(protocol: str, session: int) -> list[bytes]:
    path = f"/v1/sessions/bench-{session}/stream"
    return [*_latch_session(session), upgrade(path, f"Sec-WebSocket-Protocol: {protocol}")]


def _latch_steps(session: int, body: bytes, *kind: str) -> bytes:
    return http("POST", f"/v1/sessions/bench-{session}/steps", body, *kind)


def _latch_json(x: np.ndarray) -> bytes:
    return dumps({"inputs": [x]})


def _latch_reply(reply: bytes) -> np.ndarray:
    return loads(reply, "outputs", "y")


FRAME = struct.pack("<BBHIQ", 1, 0, 0, 1, 0)  # STEP, on channel 0, one step, unnumbered
_JSON_SOCKET, _BINARY_SOCKET = partial(_latch_socket, "latch.json"), partial(_latch_socket, "latch.binary")
LATCH = (
    Door(JSON, lambda i, x, _: _latch_steps(i, _latch_json(x)), _latch_reply, _latch_session),
    Door(BINARY, lambda i, x, _: _latch_steps(i, x.tobytes(), OCTETS), floats, _latch_session),
    Door(SOCKET_JSON, lambda i, x, _: message(_latch_json(x)), _latch_reply, _JSON_SOCKET, greeted=True),
    Door(SOCKET_BINARY, lambda i, x, _: message(FRAME + x.tobytes(), 2), floats, _BINARY_SOCKET, greeted=True),
)


# NVIDIA Triton, with both strategies of its sequence batcher. "Oldest" is the one for models that keep their own state
# by correlation id, and takes any number of sequences. "Direct" gives each sequence a row of the batch for as long as
# it lives: here exactly as many rows as there are clients, its best case. No delay: 64 clients in a closed loop fill
# the batches by themselves.

OLDEST, DIRECT = "oldest { max_candidate_sequences: 1024 }", "direct { }"
TRITON_CONFIG = """
name: "gru"
backend: "python"
max_batch_size: 64
input { name: "x" data_type: TYPE_FP32 dims: 88 }
output { name: "y" data_type: TYPE_FP32 dims: 88 }
instance_group { count: 1 kind: KIND_CPU }
sequence_batching {
  max_sequence_idle_microseconds: 600000000
  STRATEGY
  control_input { name: "session" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 } }
}
"""


def _triton(strategy: str, place: Place) -> Launch:
    packages = place.environment / "lib" / "python3.11" / "site-packages"
    server, backends = packages / "pytriton" / "tritonserver", place.folder / "backends" / "python"
    place.copy("triton_model.py", "models/gru/1/model.py")
    (place.folder / "models" / "gru" / "config.pbtxt").write_text(TRITON_CONFIG.replace("STRATEGY", strategy))
    # The wheel has a stub for each Python; Triton looks for one beside the backend.
    shutil.copytree(server / "backends" / "python", backends)
    shutil.copy(server / "python_backend_stubs" / "3.11" / "triton_python_backend_stub", backends)
    command = [server / "bin" / "tritonserver", "--model-repository=models", f"--backend-directory={backends.parent}"]
    command += ["--http-address=127.0.0.1", f"--http-port={place.port}", "--allow-grpc=false", "--allow-metrics=false"]
    libraries = packages / "nvidia_pytriton.libs"
    return [*command, "--exit-timeout-secs=1"], {"PYTHONPATH": packages, "LD_LIBRARY_PATH": libraries}


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


def _v2_reply(reply: bytes) -> np.ndarray:
    return loads(reply, "outputs", 0, "data")


TRITON = (Door(JSON, _triton_json, _v2_reply), Door(BINARY, _triton_binary, floats))
TRITON_NEEDS = ("nvidia-pytriton==0.7.0", *COMMON[:2], "numpy==1.26.4")  # its backend is built for numpy 1


# Ray Serve in its high throughput mode.


def _ray(place: Place) -> Launch:
    place.copy("ray_serve.py", "server.py")
    variables = {"RAY_SERVE_ENABLE_HA_PROXY": 1, "RAY_SERVE_THROUGHPUT_OPTIMIZED": 1, "RAY_TMPDIR": place.folder}
    variables |= {"PYTHONPATH": place.folder, "RAY_USAGE_STATS_ENABLED": 0, "RAY_AUTH_MODE": "disabled"}
    return ["python", "server.py", "--port", place.port, "--cpus", place.cores], variables


def _sockets(path: str) -> tuple[Door, Door]:
    """A WebSocket that has a session for as long as it is open, and nothing but numbers in its messages."""
    return (
        Door(SOCKET_JSON, lambda i, x, _: message(dumps(x)), loads, lambda i: [upgrade(path)]),
        Door(SOCKET_BINARY, lambda i, x, _: message(x.tobytes(), 2), floats, lambda i: [upgrade(path)]),
    )


# TorchServe. `batchSize` times the workers is how many sequences are served at all: one keeps its place until it was
# idle for `sequenceMaxIdleMSec`.

TORCHSERVE_CONFIG = """
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
    (place.folder / "model.yaml").write_text(TORCHSERVE_CONFIG)
    settings = [f"inference_address=http://127.0.0.1:{place.port}", "async_logging=true"]
    settings += [f"{name}_address=http://127.0.0.1:{free_port()}" for name in ("management", "metrics")]
    settings += [f"grpc_{name}_port={free_port()}" for name in ("inference", "management")]
    (place.folder / "config.properties").write_text("\n".join(settings))
    pack = "torch-model-archiver --model-name gru --version 1 --handler handler.py --extra-files cell.py"
    serve = "torchserve --start --foreground --ncs --model-store . --models gru=gru.mar --ts-config config.properties"
    return ["sh", "-c", f"{pack} --config-file model.yaml && exec {serve} --disable-token-auth"], {}


def _torchserve_json(session: int, x: np.ndarray, first: bool) -> bytes:
    sequence = f"ts_request_sequence_id: bench-{session}"
    return http("POST", "/predictions/gru", dumps(x), "application/json", sequence)


TORCHSERVE_NEEDS = ("torchserve==0.12.0", "torch-model-archiver==0.12.0", "torch==2.13.0", "PyYAML", "psutil", *COMMON)


# BentoML, LitServe and MLServer, each with one worker or none, so that all states are in one place.


def _bentoml(place: Place) -> Launch:
    place.copy("bentoml_service.py", "service.py")
    variables = {"BENTOML_HOME": place.folder / "home", "BENTOML_DO_NOT_TRACK": True}
    return ["bentoml", "serve", "service:Gru", "--host", "127.0.0.1", "--port", place.port], variables


def _litserve(place: Place) -> Launch:
    place.copy("litserve_server.py", "server.py")
    return ["python", "server.py", "--port", place.port], {}


def _mlserver(place: Place) -> Launch:
    place.copy("mlserver_runtime.py", "runtime.py")
    ports = {"http_port": place.port, "grpc_port": free_port(), "metrics_port": free_port()}
    (place.folder / "settings.json").write_bytes(dumps({"parallel_workers": 0, "debug": False, **ports}))
    (place.folder / "model-settings.json").write_bytes(dumps({"name": "gru", "implementation": "runtime.Gru"}))
    return ["mlserver", "start", "."], {"PYTHONPATH": place.folder}


def _mlserver_json(session: int, x: np.ndarray, first: bool) -> bytes:
    row = {"name": "session", "shape": [1, 1], "datatype": "INT64", "data": [session]}
    inputs = [{"name": "x", "shape": [1, 88], "datatype": "FP32", "data": x}, row]
    return http("POST", "/v2/models/gru/infer", dumps({"inputs": inputs}))


BENTOML_NEEDS = ("bentoml==1.4.39", "fastapi==0.165.0", "websockets==17.4", *COMMON)
BENTOML = (
    Door(JSON, lambda i, x, _: http("POST", "/step", dumps({"steps": [{"session": str(i), "x": x}]})), loads),
    *_sockets("/ws/stream"),
)

RAY = (Door(JSON, lambda i, x, _: http("POST", f"/sessions/{i}/step", dumps(x)), loads), *_sockets("/stream"))
LITSERVE = (
    Door(
        JSON,
        lambda i, x, _: http("POST", "/predict", dumps({"session": str(i), "x": x})),
        lambda reply: loads(reply, "y"),
    ),
)

V2_READY = "/v2/models/gru/ready"
PEERS = {
    "latch": Peer("Latch", (), _latch, "/health/ready", LATCH),
    "triton": Peer("Triton (oldest)", TRITON_NEEDS, partial(_triton, OLDEST), V2_READY, TRITON),
    "triton-direct": Peer("Triton (direct, 64 slots)", TRITON_NEEDS, partial(_triton, DIRECT), V2_READY, TRITON),
    "ray": Peer(
        "Ray Serve",
        ("ray[serve]==2.60.0", *COMMON),
        _ray,
        "/ready",
        RAY,
        settle=5,  # its proxy is configured anew soon after the replica is ready, and drops connections then
    ),
    "torchserve": Peer(
        "TorchServe",
        TORCHSERVE_NEEDS,
        _torchserve,
        "/ping",
        (Door(JSON, _torchserve_json, loads),),
        warm=15,  # the JVM compiles meanwhile
    ),
    "bentoml": Peer("BentoML", BENTOML_NEEDS, _bentoml, "/readyz", BENTOML),
    "litserve": Peer("LitServe", ("litserve==0.2.19", *COMMON), _litserve, "/health", LITSERVE),
    "mlserver": Peer(
        "MLServer", ("mlserver==1.7.1", *COMMON), _mlserver, V2_READY, (Door(JSON, _mlserver_json, _v2_reply),)
    ),
}
