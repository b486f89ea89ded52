"""What the tasks that learn from labelled data have in common."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from training.batches import Batch
from training.models import ModelResult, MultiModalFusionNetwork, modalities_of
from training.nets import ModalityConfig
from training.recipe import Recipe, check_keys, make

QUIET, LOUD = 0.05, 0.45  # spike rates between which there is nothing to correct
SET = {"modality_configs", "output_dim", "tick_period_s"}  # of a network's arguments: by streams, outputs and ticks
Network = TypeVar("Network", bound=MultiModalFusionNetwork)


def words(recipe: Recipe) -> list[str]:
    """No text is read."""
    return []


def build_model(recipe: Recipe, words: int = 0) -> MultiModalFusionNetwork:
    """The model of a recipe, seeded; `words` of its text. Raises ValueError for sizes that it does not have."""
    sizes = {key: value for key, value in recipe.model.items() if key != "modality"}
    return build(
        MultiModalFusionNetwork, recipe, sizes, modality_configs=modalities(recipe, words),
        output_dim=len(recipe.values["names"]),
    )  # fmt: skip


def build(network: type[Network], recipe: Recipe, sizes: dict[str, Any], **others: Any) -> Network:
    """A network, seeded; `sizes` are what the recipe says. Raises ValueError for one that no network has."""
    known = inspect.signature(MultiModalFusionNetwork).parameters.keys() - SET
    check_keys(sizes, sorted(known), "model")
    torch.manual_seed(recipe.seed)
    return network(tick_period_s=recipe.tick["period_ms"] / 1e3, **others, **sizes)


def modalities(recipe: Recipe, words: int = 0) -> dict[str, ModalityConfig]:
    """The streams' configs: `model.modality` holds sizes of every modality, and by a stream's name what is different in
    it. Raises ValueError for what is neither."""
    said = recipe.model.get("modality", {})
    own = {name: sizes for name, sizes in said.items() if isinstance(sizes, dict)}
    common = {key: size for key, size in said.items() if key not in own}
    configs = modalities_of(recipe.streams, words, recipe.tick["period_ms"] / 1e3)
    check_keys(own, configs, "model.modality")
    return {
        name: make(ModalityConfig, {**vars(config), **common, **own.get(name, {})}, f"model.modality.{name}")
        for name, config in configs.items()
    }


def contrastive(tokens: list[Tensor], mask: Tensor, classes: Tensor | None = None, temperature: float = 0.1) -> Tensor:
    """InfoNCE (van den Oord et al. 2018) between each two modalities whose tokens (B, units) have the same size: of the
    lanes in which both are present (mask (B, M)), each one's own is to be told from the others', but for those of its
    class (B,)."""
    total, pairs = mask.new_zeros(()), 0
    for i, a in enumerate(tokens):
        for j in range(i):
            both = (mask[:, i] > 0) & (mask[:, j] > 0)
            if a.shape != tokens[j].shape or both.sum() < 2:
                continue
            x, y = F.normalize(a[both], dim=-1), F.normalize(tokens[j][both], dim=-1)
            logits, own = x @ y.T / temperature, torch.arange(len(x), device=x.device)
            if classes is not None:
                alike = classes[both, None] == classes[both]
                logits = logits.masked_fill(alike.fill_diagonal_(False), -torch.inf)
            total, pairs = total + (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2, pairs + 1
    return total / max(1, pairs)


def newest(x: Tensor, valid: Tensor) -> Tensor:
    """(B, T, ...) -> (B, ...): at each lane's last tick that is no padding, valid (B, T, 1)."""
    return x[torch.arange(len(x), device=x.device), valid.sum((1, 2)) - 1]


def rate_loss(batch: Batch, out: ModelResult) -> tuple[dict[str, Tensor], Tensor]:
    """Spike rates by modality, and how far they are from sense: silent neurons learn nothing, nor do those that always
    fire."""
    rates, wrong = {}, out.gates.new_zeros(())
    for name, spikes in out.spikes.items():
        keep = batch.steps[name].keep.float()
        rate = (spikes.mean(-1, keepdim=True) * keep).sum() / keep.sum().clamp(min=1)
        rates[f"rate_{name}"], wrong = rate, wrong + F.relu(QUIET - rate) + F.relu(rate - LOUD)
    return rates, wrong
