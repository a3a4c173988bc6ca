"""LitServe: one worker that holds the states, with its dynamic batching."""

import argparse

import litserve as ls
import numpy as np
from cell import Cell


class Gru(ls.LitAPI):
    """The steps of a request's life, in LitServe's words; one worker, because a second would have other states."""

    def setup(self, device: str) -> None:
        """Loads the step."""
        self._cell = Cell()

    def decode_request(self, request: dict) -> tuple[str, list[float]]:
        """JSON -> session and input."""
        return request["session"], request["x"]

    def batch(self, inputs: list[tuple[str, list[float]]]) -> tuple[tuple, np.ndarray]:
        """The sessions and their inputs (n, 88)."""
        sessions, frames = zip(*inputs, strict=True)
        return sessions, np.array(frames, np.float32)

    def predict(self, x: tuple[tuple, np.ndarray]) -> np.ndarray:
        """One step of every session in the batch."""
        return self._cell.step(*x)

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        """A row a request."""
        return list(output)

    def encode_response(self, output: np.ndarray) -> dict:
        """Output -> JSON."""
        return {"y": output.tolist()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    api = Gru(max_batch_size=64, batch_timeout=0.01)
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(host="127.0.0.1", port=parser.parse_args().port, num_api_servers=1, log_level="warning")
