"""A part: one graph and the state it carries. A model: the parts of a bundle, run in order as their streams bring
something new. Neither knows which engine runs its graphs, and neither reads a clock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from mm_edge.bundle import Bundle
from mm_edge.manifest import PartSpec

RESET_AFTER = 5  # failures in a row


class Graph(Protocol):
    """One ONNX graph on an engine, with state of two sides: a run reads one and writes the other.

    `inputs` are the engine's own buffers (all but the state): write there, then `run`. What `run` returns holds until
    the next run that follows a `keep`. Raises EngineError if the engine fails.
    """

    inputs: dict[str, np.ndarray]

    def run(self) -> dict[str, np.ndarray]:
        """All outputs but the state. Run again without `keep`, and it starts from the same state again."""

    def keep(self) -> None:
        """The state that the last run put out is what the next one starts from."""

    def reset(self) -> None:
        """All state is zero."""


class Fresh(NamedTuple):
    """New data of a stream: `x` as `preprocess.prepare` gives it, time since the last, whether state starts anew."""

    x: np.ndarray
    dt_s: float
    reset: bool


class ModelInputs(NamedTuple):
    """All that a model is told at a tick; training sees exactly this. M streams, in the bundle's order."""

    fresh: dict[str, Fresh]
    mask: np.ndarray  # float32 (M,), 1 where the stream is present
    age: np.ndarray  # float32 (M,), seconds
    dt_s: float
    reset: bool


class ModelOutputs(NamedTuple):
    values: dict[str, np.ndarray]  # "action" -> float32 (1, ...), as in the manifest's outputs; the caller's to keep
    mask: np.ndarray  # float32 (M,): the inputs' mask, less the streams whose last step was not finite
    reasons: tuple[str, ...]  # why the values cannot be used; empty if they can


class Part:
    """One graph and the state it carries. `outputs` are held from the last step that was finite; zero before."""

    def __init__(self, spec: PartSpec, graph: Graph):
        self.spec, self.graph = spec, graph
        self.failures = 0  # in a row
        self.dropped_steps = 0
        self.outputs = {name: np.zeros_like(value) for name, value in graph.run().items()}
        self._blank = self.outputs
        self._links: list[tuple[str, np.ndarray]] = []

    def link(self, output: str, buffer: np.ndarray) -> None:
        """From now on `buffer`, an input of a later part, holds what `outputs[output]` holds."""
        self._links.append((output, buffer))

    def step(self, dt_s: float, **feeds: np.ndarray) -> bool:
        """Run once on `feeds`, `dt_s` after the last step. False if the result is not finite: then state and outputs
        stay as they were, until after five failures in a row they start anew. Raises EngineError."""
        inputs = self.graph.inputs
        inputs["dt"].fill(dt_s)
        for name, value in feeds.items():
            inputs[name][...] = value
        outputs = self.graph.run()
        if outputs["ok"][0] == 1:
            self.failures = 0
            self.graph.keep()
            self._hold(outputs)
            return True
        self.dropped_steps += 1
        self.failures += 1
        if self.failures % RESET_AFTER == 0:
            self.reset()
        return False

    def reset(self) -> None:
        self.graph.reset()
        self._hold(self._blank)

    def _hold(self, outputs: dict[str, np.ndarray]) -> None:
        # Copied, not bound: the producer must be able to drop a step that the consumer never gets to see.
        self.outputs = outputs
        for name, buffer in self._links:
            buffer[...] = outputs[name]


class Model:
    """The parts of a bundle.

    Args:
        bundle: its parts, streams and outputs.
        open_graph: makes a part's graph on some engine.
        engine: what really runs, in words.
    """

    def __init__(self, bundle: Bundle, open_graph: Callable[[PartSpec, bytes], Graph], engine: str):
        self.engine = engine
        self.parts = {spec.name: Part(spec, open_graph(spec, bundle.contents[spec.file])) for spec in bundle.parts}
        for part in self.parts.values():
            for name, source in part.spec.uses.items():
                producer, output = source.split(".", 1)
                self.parts[producer].link(output, part.graph.inputs[name])
        # What no stream and no tick runs.
        language = bundle.language.graphs() if bundle.language else {}
        self.graphs = {name: open_graph(spec, bundle.contents[spec.file]) for name, spec in language.items()}
        self._read: list[tuple[str, np.ndarray]] = []  # inputs of the decoder that hold what the text's graph gave
        for name, spec in language.items():
            for into, source in spec.uses.items():
                producer, output = source.split(".", 1)
                buffer = self.graphs[name].inputs[into]
                if producer in self.parts:
                    self.parts[producer].link(output, buffer)
                else:
                    self._read.append((output, buffer))
        self._outputs = [(name, *source.split(".", 1)) for name, source in bundle.outputs.sources().items()]
        self._index = {spec.name: i for i, spec in enumerate(bundle.streams)}

    def step(self, inputs: ModelInputs) -> ModelOutputs:
        """One tick. A stream whose part dropped its last step counts as absent: what is held is older than its age."""
        if inputs.reset:
            self.reset()
        mask = inputs.mask.copy()
        for part in self.parts.values():
            stream = part.spec.stream
            if stream is None:
                part.step(inputs.dt_s, mask=mask, age=inputs.age)
                continue
            if stream in inputs.fresh:
                x, dt_s, reset = inputs.fresh[stream]
                if reset and not inputs.reset:
                    part.reset()
                part.step(dt_s, x=x)
            if part.failures:
                mask[self._index[stream]] = 0
        values = {name: self.parts[part].outputs[output].copy() for name, part, output in self._outputs}
        fused = [name for name, part in self.parts.items() if part.spec.stream is None and part.failures]
        return ModelOutputs(values, mask, tuple(f"non-finite action: {name} dropped its step" for name in fused))

    def read(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """What the text graph gives for tokens int64 (length,) and the image last seen; the decoder has it, too.
        Raises EngineError."""
        graph = self.graphs["text"]
        graph.inputs["tokens"][0] = tokens
        outputs = graph.run()
        for name, buffer in self._read:
            buffer[...] = outputs[name]
        return outputs

    def reset(self) -> None:
        """All state and all held outputs start anew, at zero."""
        for part in self.parts.values():
            part.reset()
            part.failures = 0
