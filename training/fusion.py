"""Fusion: the modalities' tokens in, features out; four strategies behind one interface.

    features, gates, attention = fusion(tokens, mask, age)

`mask` and `age` are inputs. An absent modality is replaced by a learned absence and attended by no one; where there is
attention, a null token is always there, so that all sensors absent is no NaN. `gates` are the modalities' shares, from
what they say and by a learned trust in each: of all that goes on, but for hybrid, where they weigh the late part alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor, nn

from training.nets import ModalityType


class FusionStrategy(Enum):
    EARLY = "early"  # side by side, before anything is made of them
    LATE = "late"  # each makes a proposal of its own, which are weighed
    HYBRID = "hybrid"  # both, and cross-modal attention between them
    HIERARCHICAL = "hierarchical"  # attention within groups of like modalities, then between the groups

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise ValueError(f"fusion_strategy: expected one of {[each.value for each in cls]}, got {value!r}")


class Fusion(nn.Module):
    """What all strategies share: tokens of one size that know their age and absence, and the learned trust.

    Args:
        token_units: of each modality. max_age_s: at which each has the age of the oldest.
        dim: of the tokens in here. outputs: features of the strategy's own choice.

    Attributes: features, how many come out.
    """

    features: int

    def __init__(self, token_units: Sequence[int], max_age_s: Sequence[float], dim: int):
        super().__init__()
        n = len(token_units)
        self.dim = dim
        self.register_buffer("max_age_s", torch.tensor(max_age_s).clamp(min=1e-3), persistent=False)
        self.project = nn.ModuleList(nn.Linear(units, dim) for units in token_units)
        self.age = nn.Parameter(torch.zeros(n, dim))
        self.absent = nn.Parameter(torch.randn(n, dim) * 0.1)

    def tokens(self, tokens: Sequence[Tensor], mask: Tensor, age: Tensor) -> Tensor:
        """M of (B, units); mask, age (B, M) -> (B, M, dim)."""
        x = torch.stack([project(t) for project, t in zip(self.project, tokens)], 1)
        x = x + (age / self.max_age_s).clamp(0, 1)[..., None] * self.age
        return torch.where(mask[..., None] > 0, x, self.absent)

    def gates(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, M, dim) -> (B, M), summing to 1 over those that are present."""
        return (self.gate(x).squeeze(-1) + self.weight).masked_fill(mask <= 0, -1e4).softmax(-1)

    def forward(self, tokens: Sequence[Tensor], mask: Tensor, age: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tokens: M of (B, units); mask, age (B, M) -> features (B, features), gates (B, M), attention (B, heads,
        M + 1, M + 1) (the last: the null token; the identity where the strategy has no attention)."""
        raise NotImplementedError


class CrossModalAttention(nn.Module):
    """Tokens (B, n, dim) attend to each other where `hidden` (B, n) is False: (B, n, dim), (B, heads, n, n)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        batch, n, _ = x.shape
        y = self.norm(x)
        q, k, v = self.qkv(y).view(batch, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        attention = scores.masked_fill(hidden[:, None, None, :], -1e4).softmax(-1)
        return y + self.out((attention @ v).transpose(1, 2).flatten(2)), attention


class CrossModalAttentionFusion(Fusion):
    """Hybrid: the tokens early (side by side, not weighed), through cross-modal attention, and late (a proposal of each
    modality, weighed by the gates)."""

    def __init__(self, token_units: Sequence[int], max_age_s: Sequence[float], dim: int, heads: int, outputs: int):
        super().__init__(token_units, max_age_s, dim)
        n = len(token_units)
        self.null = nn.Parameter(torch.randn(1, dim) * 0.1)
        self.attend = CrossModalAttention(dim, heads)
        self.early = nn.Sequential(nn.Linear(n * dim, outputs), nn.ReLU())
        self.gate, self.weight = nn.Linear(dim, 1), nn.Parameter(torch.zeros(n))
        self.late = nn.Linear(dim, dim)
        self.features = outputs + 2 * dim

    def forward(self, tokens: Sequence[Tensor], mask: Tensor, age: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.tokens(tokens, mask, age)
        z, attention = self.attend(*_with_null(x, self.null, mask))
        gates = self.gates(z[:, :-1], mask)
        pooled = (gates[..., None] * self.late(z[:, :-1])).sum(1)
        return torch.cat([self.early(x.flatten(1)), pooled, z[:, -1]], 1), gates, attention


class EarlyFusion(Fusion):
    """The tokens side by side, each weighed by its gate, through one layer."""

    def __init__(self, token_units: Sequence[int], max_age_s: Sequence[float], dim: int, heads: int, outputs: int):
        super().__init__(token_units, max_age_s, dim)
        n = len(token_units)
        self.early = nn.Sequential(nn.Linear(n * dim, outputs), nn.ReLU())
        self.gate, self.weight = nn.Linear(dim, 1), nn.Parameter(torch.zeros(n))
        self.heads, self.features = heads, outputs

    def forward(self, tokens: Sequence[Tensor], mask: Tensor, age: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.tokens(tokens, mask, age)
        gates = self.gates(x, mask)
        weighed = x * torch.where(mask[..., None] > 0, gates[..., None] * mask.shape[1], 1.0)
        return self.early(weighed.flatten(1)), gates, _no_attention(mask, self.heads)


class LateFusion(Fusion):
    """Each modality makes a proposal of its own, in which no other has a say; the gates weigh them."""

    def __init__(self, token_units: Sequence[int], max_age_s: Sequence[float], dim: int, heads: int, outputs: int):
        super().__init__(token_units, max_age_s, dim)
        n = len(token_units)
        self.propose = nn.ModuleList(nn.Sequential(nn.Linear(dim, outputs), nn.ReLU()) for _ in range(n))
        self.gate, self.weight = nn.Linear(dim, 1), nn.Parameter(torch.zeros(n))
        self.heads, self.features = heads, outputs

    def forward(self, tokens: Sequence[Tensor], mask: Tensor, age: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.tokens(tokens, mask, age)
        gates = self.gates(x, mask)
        proposals = torch.stack([propose(x[:, i]) for i, propose in enumerate(self.propose)], 1)
        return (gates[..., None] * proposals).sum(1), gates, _no_attention(mask, self.heads)


class HierarchicalFusion(Fusion):
    """Attention within each group of modalities, whose members the gates sum up, then between the groups, each of which
    its members' gates weigh.

    `groups`: for each modality the number of its group, from 0 on.
    """

    def __init__(
        self, token_units: Sequence[int], max_age_s: Sequence[float], dim: int, heads: int, outputs: int,
        groups: Sequence[int],
    ):  # fmt: skip
        super().__init__(token_units, max_age_s, dim)
        n, self.count = len(token_units), max(groups) + 1
        member = torch.tensor([[group == g for group in groups] for g in range(self.count)])  # (groups, M)
        self.register_buffer("member", member, persistent=False)
        self.null = nn.Parameter(torch.randn(1, dim) * 0.1)
        self.within, self.between = CrossModalAttention(dim, heads), CrossModalAttention(dim, heads)
        self.gate, self.weight = nn.Linear(dim, 1), nn.Parameter(torch.zeros(n))
        self.out = nn.Sequential(nn.Linear((self.count + 1) * dim, outputs), nn.ReLU())
        self.features = outputs

    def forward(self, tokens: Sequence[Tensor], mask: Tensor, age: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, there = self.tokens(tokens, mask, age), mask > 0
        inner, attention = torch.zeros_like(x), None
        for member in self.member:  # all tokens pass, but attend to their group's only
            z, attended = self.within(*_with_null(x, self.null, (there & member).to(mask.dtype)))
            inner = torch.where(member[:, None], z[:, :-1], inner)
            rows = torch.cat([member, member.new_ones(1)])[None, None, :, None]
            attention = attended if attention is None else torch.where(rows, attended, attention)
        assert attention is not None
        gates = self.gates(inner, mask)
        by_group = gates[:, None] * self.member.to(mask.dtype)  # (B, groups, M)
        shares = by_group.sum(-1, keepdim=True)
        sums = by_group @ inner / shares.clamp(min=1e-6)
        seen = (there[:, None] & self.member).any(-1)
        z, _ = self.between(*_with_null(sums, self.null, seen.to(mask.dtype)))
        groups = z[:, :-1] * shares * self.count  # weighed behind the attention, which takes each to one size
        return self.out(torch.cat([groups, z[:, -1:]], 1).flatten(1)), gates, attention


def build_fusion(
    strategy: FusionStrategy, types: Sequence[ModalityType], token_units: Sequence[int], max_age_s: Sequence[float],
    dim: int, heads: int, outputs: int,
) -> Fusion:  # fmt: skip
    """Raises ValueError unless dim is a multiple of heads."""
    if dim % heads:
        raise ValueError(f"fusion_dim: expected a multiple of the {heads} attention heads, got {dim}")
    sizes = (token_units, max_age_s, dim, heads, outputs)
    if strategy is FusionStrategy.HIERARCHICAL:
        found = [_GROUPS.get(kind, 2) for kind in types]
        return HierarchicalFusion(*sizes, groups=[sorted(set(found)).index(group) for group in found])
    simple = {
        FusionStrategy.EARLY: EarlyFusion,
        FusionStrategy.LATE: LateFusion,
        FusionStrategy.HYBRID: CrossModalAttentionFusion,
    }
    return simple[FusionStrategy(strategy)](*sizes)


# What is alike: what shows the surroundings, what is heard or said, and (all others) how the robot itself moves.
_GROUPS = {
    ModalityType.VISION: 0,
    ModalityType.VIDEO: 0,
    ModalityType.SCAN: 0,
    ModalityType.POINTS: 0,
    ModalityType.AUDIO: 1,
    ModalityType.TEXT: 1,
}


def _with_null(x: Tensor, null: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens with the null token behind them, and which of them are hidden."""
    hidden = torch.cat([mask <= 0, torch.zeros_like(mask[:, :1]) > 0], 1)
    return torch.cat([x, null.expand(len(x), 1, x.shape[-1])], 1), hidden


def _no_attention(mask: Tensor, heads: int) -> Tensor:
    """Each token attends to itself."""
    n = mask.shape[1] + 1
    return torch.eye(n, dtype=mask.dtype, device=mask.device).expand(len(mask), heads, n, n)
