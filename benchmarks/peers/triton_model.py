"""NVIDIA Triton: a model of the python backend behind the sequence batcher, its state kept by correlation id."""

import numpy as np
import triton_python_backend_utils as pb
from cell import Cell


class TritonPythonModel:
    """What the python backend looks for by this name."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the step."""
        self._cell = Cell()

    def execute(self, requests: list) -> list:
        """One step of every sequence that has a request; the batcher never sends two of one sequence at once."""
        x = np.concatenate([pb.get_input_tensor_by_name(request, "x").as_numpy() for request in requests])
        y = self._cell.step([request.correlation_id() for request in requests], x)
        return [pb.InferenceResponse([pb.Tensor("y", y[i : i + 1])]) for i in range(len(requests))]
