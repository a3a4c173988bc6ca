"""MLServer: a custom runtime in the server's own process, which holds the states, without its adaptive batching."""

import numpy as np
from cell import Cell
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Gru(MLModel):
    """The runtime; a batch is one request whose tensors have a row a session."""

    async def load(self) -> bool:
        """Loads the step."""
        self._cell = Cell()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """One step of every session in the batch; the session is an input, because only inputs are batched."""
        x, sessions = (NumpyCodec.decode_input(tensor) for tensor in payload.inputs)
        y = self._cell.step(sessions[:, 0].tolist(), np.asarray(x, np.float32))
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("y", y)])
