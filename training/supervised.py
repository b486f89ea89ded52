"""What the tasks that learn from labelled data have in common."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from training.batches import Batch
from training.fusion import FusionStrategy
from training.models import ModelResult, MultiModalFusionNetwork
from training.nets import ModalityConfig
from training.recipe import Recipe

QUIET, LOUD = 0.05, 0.45  # spike rates between which there is nothing to correct


def words(recipe: Recipe) -> list[str]:
    """No text is read."""
    return []


def build_model(recipe: Recipe) -> MultiModalFusionNetwork:
    """The model of a recipe, seeded: `model` holds sizes of the fusion, and `modality` those of every modality and by
    name what is different in one."""
    torch.manual_seed(recipe.seed)
    config, period_s = dict(recipe.model), recipe.tick["period_ms"] / 1e3
    common = {k: v for k, v in config.pop("modality").items() if not isinstance(v, dict)}
    modalities = {
        spec.name: ModalityConfig.of(spec, period_s, **common, **recipe.model["modality"].get(spec.name, {}))
        for spec in recipe.streams
    }
    outputs = len(recipe.values["names"])
    strategy = FusionStrategy(config.pop("fusion_strategy"))
    return MultiModalFusionNetwork(modalities, strategy, output_dim=outputs, tick_period_s=period_s, **config)


def contrastive(tokens: list[Tensor], mask: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE (van den Oord et al. 2018) between each two modalities whose tokens (B, units) have the same size: of the
    lanes in which both are present (mask (B, M)), each one's own is to be told from the others'."""
    total, pairs = mask.new_zeros(()), 0
    for i, a in enumerate(tokens):
        for j in range(i):
            both = (mask[:, i] > 0) & (mask[:, j] > 0)
            if a.shape != tokens[j].shape or both.sum() < 2:
                continue
            x, y = F.normalize(a[both], dim=-1), F.normalize(tokens[j][both], dim=-1)
            logits, own = x @ y.T / temperature, torch.arange(len(x), device=x.device)
            total, pairs = total + (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2, pairs + 1
    return total / max(1, pairs)


def rate_loss(batch: Batch, out: ModelResult) -> tuple[dict[str, Tensor], Tensor]:
    """Spike rates by modality, and how far they are from sense: silent neurons learn nothing, nor do those that always
    fire."""
    rates, wrong = {}, out.gates.new_zeros(())
    for name, spikes in out.spikes.items():
        keep = batch.steps[name].keep.float()
        rate = (spikes.mean(-1, keepdim=True) * keep).sum() / keep.sum().clamp(min=1)
        rates[f"rate_{name}"], wrong = rate, wrong + F.relu(QUIET - rate) + F.relu(rate - LOUD)
    return rates, wrong
