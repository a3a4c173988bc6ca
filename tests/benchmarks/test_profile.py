"""The profile: which stage a sample counts for."""

from benchmarks import profile

SERVE = "serve (/latch/service/batcher.py:9);_run (/latch/service/batcher.py:99);run (/latch/service/graphs.py:9)"
START = "create_app (/latch/service/app.py:9)"


def shares(samples: str, stages: dict[str, str]) -> dict[str, float]:
    """Those that are not zero."""
    return {stage: share for stage, share in profile.fold(samples, stages).items() if share}


def test_a_librarys_time_is_its_callers() -> None:
    """Numpy and the standard library belong to whatever of the service called them."""
    samples = f"{SERVE};moveaxis (/env/site-packages/numpy/_core/numeric.py:9) 3\n"
    assert shares(samples, profile.SERVING) == {"batcher, queues": 1.0}


def test_the_innermost_stage_counts() -> None:
    """The runtime is inside of the batcher, and its time is not the batcher's."""
    samples = f"{SERVE};run (/env/site-packages/onnxruntime/capi/session.py:9) 3\n{SERVE} 1\n"
    assert shares(samples, profile.SERVING) == {"ONNX Runtime": 0.75, "batcher, queues": 0.25}


def test_digests_are_told_from_the_rest_of_the_wire() -> None:
    """Both are functions of `service/wire`."""
    digests, decode = (
        "Block.digests (/latch/service/wire/__init__.py:9)",
        "read_block (/latch/service/wire/frames.py:9)",
    )
    samples = f"{digests} 1\n{decode} 1\n"
    assert shares(samples, profile.SERVING) == {"digests": 0.5, "decode, encode": 0.5}


def test_a_thread_that_waits_for_work_does_none() -> None:
    """Whether it sleeps or wants the interpreter's lock, the core's time is another's."""
    samples = f"run (threading.py:9);_worker (/python/concurrent/futures/thread.py:81) 5\n{SERVE} 1\n"
    assert shares(samples, profile.SERVING) == {"batcher, queues": 1.0}


def test_a_module_that_is_imported_is_the_imports() -> None:
    """What runs at import is no stage of the module's own, and what nobody knows is the rest."""
    imported = "_call (<frozen importlib._bootstrap>:241);<module> (/latch/service/manifest.py:9)"
    samples = f"{START};{imported} 2\n{START};parse_manifest (/latch/service/manifest.py:99) 1\nmain (x.py:1) 1\n"
    assert shares(samples, profile.STARTING) == {"imports": 0.5, "files, manifests": 0.25, profile.REST: 0.25}


def test_each_thread_is_weighed_by_what_it_used() -> None:
    """However often it was seen; what a thread used that was never seen is the rest."""
    worker = "Thread._bootstrap (/python/threading.py:9);_worker (/python/concurrent/futures/thread.py:58);" + SERVE[8:]
    run = f"{worker};run (/env/site-packages/onnxruntime/capi/session.py:9)"
    shared = profile.weigh(f"{SERVE} 9\n{run} 3\n{worker} 1\n", profile.SERVING, 100.0, 200.0)
    assert (shared["ONNX Runtime"], shared["batcher, queues"], shared[profile.REST]) == (150.0, 150.0, 0.0)
    assert profile.weigh(f"{SERVE} 9\n", profile.SERVING, 100.0, 20.0)[profile.REST] == 20.0


def test_the_page_has_a_row_a_scenario_and_a_column_a_stage() -> None:
    """Microseconds, with their shares."""
    rows = [profile.Profile("a load", 200.0, {"ONNX Runtime": 150.0, profile.REST: 50.0})]
    assert "| a load | 200 | 150 (75%) | 50 (25%) |" in profile.page({"a message": rows})
    checked = profile.page({"a message": [rows[0]._replace(runs=160.0)]})
    assert "| us a message | all | ONNX Runtime | rest | runs |\n|---|---:|---:|---:|---:|\n" in checked
    assert "| a load | 200 | 150 (75%) | 50 (25%) | 160 (80%) |" in checked
