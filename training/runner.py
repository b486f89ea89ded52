"""A trained model tick by tick in torch: what the bundle's parts must equal, and the student that DAgger lets drive."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from mm_edge.align import Aligner, TickRule
from mm_edge.engine.part import ModelInputs
from mm_edge.pipeline import ears, model_inputs
from mm_edge.preprocess import Vocabulary
from mm_edge.safety import Limits, limit
from mm_edge.sim.rooms import vocabulary
from mm_edge.types import Sample
from training.models import ModelState, MultiModalFusionNetwork, RobotMultiSensorModel
from training.recipe import Recipe


class Stepped(NamedTuple):
    output: np.ndarray  # (output_dim,)
    spikes: dict[str, np.ndarray]  # (spiking_units,), of the streams that stepped
    state: ModelState
    gates: np.ndarray  # (M,)
    attention: np.ndarray | None  # (rows, cols), of a camera that is asked, if it stepped


@torch.no_grad()
def step(model: MultiModalFusionNetwork, inputs: ModelInputs, state: ModelState) -> Stepped:
    """One tick, batch 1."""
    if inputs.reset:
        state = model.zero_state(1)
    encoders, held, spikes, attention = dict(state.encoders), dict(state.held), {}, None
    for name in model.text_first:
        if name not in inputs.fresh:
            continue
        x, dt_s, reset = inputs.fresh[name]
        encoder = model.encoders[name]
        before = encoder.zero_state(1) if reset else encoders[name]
        batch, dt = torch.from_numpy(x)[None], torch.tensor([[dt_s]], dtype=torch.float32)
        sample, clip = encoder.receive(batch, before.clip)
        features, scores, _ = encoder.features(sample, held.get(model.text))
        if scores is not None:
            attention = scores[0, :-1].softmax(-1).view(encoder.net.grid).numpy()
        held[name], fired, encoders[name] = encoder.step(features, before._replace(clip=clip), dt)
        if encoder.fires:
            spikes[name] = fired[0].numpy()
    mask, age = torch.from_numpy(inputs.mask)[None], torch.from_numpy(inputs.age)[None]
    fused, gates, _ = model.fusion([held[name] for name in model.names], mask, age)
    h = model.core.step(fused, state.h, torch.tensor([[inputs.dt_s]], dtype=torch.float32))
    stepped = state.stepped.masked_fill(torch.tensor([name in inputs.fresh for name in model.names]), 1.0)
    after = ModelState(encoders, held, h, stepped)
    return Stepped(model.act(model.head(h))[0].numpy(), spikes, after, gates[0].numpy(), attention)


class TorchPipeline:
    """Drives like `mm_edge.pipeline.Pipeline`, with its limits, without reasons."""

    def __init__(self, recipe: Recipe, model: RobotMultiSensorModel):
        self.recipe, self.model = recipe, model.eval()
        self._vocabulary = Vocabulary(vocabulary())
        self._limits = Limits(*(recipe.action[k] for k in ("names", "min", "max", "max_rate")))
        self.reset()

    def reset(self) -> None:
        tick = self.recipe.tick
        self._aligner = Aligner(self.recipe.streams, tick["period_ms"] / 1e3, self.recipe.max_gap_ms)
        self._ears = ears(self.recipe.streams)
        self._rule = TickRule(tick["anchor"], tick["max_period_ms"], tick.get("min_period_ms", 0.0))
        self._state = self.model.zero_state(1)
        self._previous = [0.0] * len(self._limits.names)

    def push(self, sample: Sample) -> None:
        self._aligner.push(sample)
        self._rule.pushed(sample)

    def due(self, now_ns: int) -> bool:
        return self._rule.due(now_ns)

    def tick(self, now_ns: int) -> np.ndarray:
        self._rule.ticked(now_ns)
        inputs = model_inputs(self.recipe.streams, self._aligner.window(now_ns), self._vocabulary, self._ears)
        action, _, self._state, _, _ = step(self.model, inputs, self._state)
        if inputs.reset:
            self._previous = [0.0] * len(self._previous)
        dt_s = min(inputs.dt_s, self.recipe.tick["max_period_ms"] / 1e3)
        allowed, _ = limit(action.tolist(), self._previous, dt_s, self._limits)
        self._previous = allowed or [0.0] * len(self._previous)  # not finite: it stands
        return np.array(self._previous)
