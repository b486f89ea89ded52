"""One token after the other: the decoder's graph and the tokens that it has seen."""

from __future__ import annotations

import numpy as np

from mm_edge.engine.part import Graph

NEVER = -1e9  # added to the scores of places that hold no token


class Decoder:
    """A graph as of `manifest.DecoderSpec`. Its cache are the graph's own inputs, of a fixed size: a step writes the
    rows of one token, and nothing is copied but them, unless by ONNX Runtime to a GPU."""

    def __init__(self, graph: Graph):
        inputs = graph.inputs
        self._graph, self._row = graph, inputs.get("row")
        self._token, self._place, self._mask = inputs["token"], inputs["place"], inputs["mask"]
        self._keys, self._values = inputs["keys"], inputs["values"]
        self.length = self._mask.shape[0]
        self.reset()

    def reset(self) -> None:
        """No token was seen."""
        for cache in (self._keys, self._values):  # the mask hides them, but NaN times 0 is NaN
            cache.fill(0)
        self._mask.fill(NEVER)
        self.seen = 0

    def feed(self, token: int, row: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The graph's outputs after one more token, or after `row` (D,) of an image in its stead; they hold until the
        next. Raises IndexError if `length` were seen already, EngineError if the engine fails."""
        at = self.seen
        if at >= self.length:
            raise IndexError(f"{self.length} tokens were seen, there is no room for another")
        self._token[0], self._place[0] = token, at
        if row is not None and self._row is not None:
            self._token[0], self._row[0] = -1, row
        outputs = self._graph.run()
        self._keys[:, :, :, at], self._values[:, :, at] = outputs["key"], outputs["value"]
        self._mask[at] = 0
        self.seen = at + 1
        return outputs
