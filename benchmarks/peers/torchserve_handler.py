"""TorchServe: a stateful handler behind sequence batching, the state kept by sequence id."""

import numpy as np
from cell import Cell
from ts.context import Context


class StatefulHandler:
    """What TorchServe calls with each batch of requests, no two of them of one sequence."""

    def initialize(self, context: Context) -> None:
        """Loads the step."""
        self._cell = Cell()

    def handle(self, data: list[dict], context: Context) -> list[list[float]]:
        """One step of every sequence that has a request."""
        x = np.array([row["body"] for row in data], np.float32)
        return self._cell.step([context.get_sequence_id(i) for i in range(len(data))], x).tolist()
