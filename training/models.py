"""Multi-sensor liquid-spike models.

Each modality: preprocessing net -> LIF spikes -> CfC -> a token that is held until the modality's next sample. Fusion:
cross-modal attention over the tokens with mask and age, and a CfC that remembers across ticks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_edge.types import StreamSpec
from training.batches import Batch
from training.cells import LIF, CfC


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of one modality's encoder. The LIF's time constant starts at `tau_s`."""

    spiking_units: int = 128
    liquid_units: int = 64
    tau_s: float = 0.05


class EncoderState(NamedTuple):
    v: Tensor  # (B, spiking_units) membrane
    h: Tensor  # (B, liquid_units)


class CameraNet(nn.Module):
    """uint8 image and the command's token -> features. The command asks the picture: its queries attend over a grid of
    keys and over nothing, the answer if what is asked for is not to be seen. Where head 0 looked is the overlay.

    The grid is stateless. What goes on to the spiking layer is, for each head, how much it looked at each column and
    row (a population code, which binary neurons can read; all zero if there was nothing) and what it saw there; and a
    coarse map of what stands around.
    """

    HEADS, KEY = 4, 16

    def __init__(self, shape: Sequence[int], text_units: int):
        super().__init__()
        height, width, _ = shape
        self.grid = (height // 8, width // 8)
        self.dim = dim = self.HEADS * self.KEY
        self.conv = nn.Sequential(
            nn.Conv2d(3, 32, 7, 4, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, dim, 3, 2, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU(),
            nn.Conv2d(dim, dim, 3, 1, 1), nn.ReLU(),
        )  # fmt: skip
        # A cell alone sees 31 pixels: enough for a colour, too little to tell a ball from a box near by.
        self.context = nn.Sequential(
            nn.MaxPool2d(2),
            nn.Conv2d(dim, dim, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(dim, dim, 3, 1, 1),
            nn.Upsample(self.grid),
        )
        self.steer = nn.Linear(text_units, 2 * dim)  # FiLM: the command scales and shifts the features
        self.query = nn.Linear(text_units, dim)
        self.key = nn.Conv2d(dim, dim, 1)
        self.around = nn.Sequential(nn.Conv2d(dim, 8, 1), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten())
        self.nothing = nn.Parameter(torch.zeros(self.HEADS, 1))
        self.features = self.HEADS * sum(self.grid) + dim + 8 * (self.grid[0] // 4) * (self.grid[1] // 4)

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x uint8 (N, h, w, 3), text (N, text_units) -> features (N, features); head 0's scores (N, cells + 1), the
        last for nothing; what was seen whatever the command (N, dim, rows, cols)."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        image = x.to(dtype).permute(0, 3, 1, 2).sub_(128).mul_(1 / 64)  # channels-last as it lies, which is fast
        seen = self.conv(image)
        seen = F.relu(seen + self.context(seen))
        scale, shift = self.steer(text)[..., None, None].chunk(2, 1)
        grid = F.relu(seen * (1 + scale) + shift).float()
        n, cells = len(x), self.grid[0] * self.grid[1]
        keys = self.key(grid).view(n, self.HEADS, self.KEY, cells)
        scores = (self.query(text).float().view(n, self.HEADS, 1, self.KEY) @ keys).squeeze(2) * self.KEY**-0.5
        scores = torch.cat([scores, self.nothing.expand(n, -1, -1)], -1)  # (n, heads, cells + 1)
        looked = scores.softmax(-1)[..., :-1]
        values = (grid.view(n, self.HEADS, self.KEY, cells) @ looked[..., None]).flatten(1)
        looked = looked.view(n, self.HEADS, *self.grid)
        columns, rows = looked.sum(2).flatten(1), looked.sum(3).flatten(1)
        return torch.cat([3 * columns, 3 * rows, values, self.around(grid)], 1), scores[:, 0], seen


class ScanNet(nn.Module):
    """(N, 2, beams): closeness and validity over the full circle -> features. What counts is how near the nearest
    things are, so that is spread out: exp(-range / 0.3 m) and exp(-range / 1 m) go in too."""

    def __init__(self, shape: Sequence[int], range_max_m: float):
        super().__init__()
        self.range_max_m = range_max_m
        self.conv = nn.Sequential(nn.Conv1d(4, 24, 7, 3), nn.ReLU(), nn.Conv1d(24, 32, 5, 2), nn.ReLU(), nn.Flatten())
        with torch.no_grad():
            self.features = self._conv(torch.zeros(1, *shape)).shape[1]

    def _conv(self, x: Tensor) -> Tensor:
        range_m = (1 - x[:, :1]) * self.range_max_m
        x = torch.cat([x, torch.exp(-range_m / 0.3), torch.exp(-range_m)], 1)
        return self.conv(torch.cat([x[..., -6:], x, x[..., :6]], -1))  # the circle is closed

    def forward(self, x: Tensor) -> Tensor:
        return self._conv(x)


class SequenceNet(nn.Module):
    """Convolution over time: audio (N, channels, bands, hops) or imu (N, rows, 7) -> features."""

    def __init__(self, channels: int, time: int, hidden: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv1d(channels, hidden, 3, 1, 1), nn.ReLU(), nn.Conv1d(hidden, hidden, 3, 2, 1), nn.ReLU(), nn.Flatten()
        )
        self.features = hidden * ((time + 1) // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.flatten(1, 2) if x.dim() == 4 else x.transpose(1, 2))


class TextNet(nn.Module):
    """int64 tokens (N, length), 0 = padding -> features. A bag of words: commands here are short and unambiguous."""

    def __init__(self, words: int, features: int = 64):
        super().__init__()
        self.features = features
        self.embed = nn.Embedding(words + 1, features, padding_idx=0)
        self.mlp = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, features), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.embed(x).sum(1))


class ModalityEncoder(nn.Module):
    """Preprocessing net -> LIF spike encoder -> CfC. Its token is the CfC's state.

    Everything the fusion learns of the modality passes through the spikes.
    """

    def __init__(self, net: nn.Module, config: EncoderConfig, period_s: float):
        super().__init__()
        self.net = net
        self.current = nn.Sequential(nn.Linear(net.features, config.spiking_units), nn.LayerNorm(config.spiking_units))
        nn.init.constant_(self.current[1].bias, 0.4)
        self.lif = LIF(config.spiking_units, config.tau_s)
        self.cfc = CfC(config.spiking_units, config.liquid_units, period_s)

    def zero_state(self, batch: int) -> EncoderState:
        zeros = self.cfc.bias.new_zeros
        return EncoderState(zeros(batch, self.lif.units), zeros(batch, self.cfc.units))

    def step(self, features: Tensor, state: EncoderState, dt: Tensor) -> tuple[Tensor, Tensor, EncoderState]:
        """features (B, net.features) -> token (B, liquid_units), spikes (B, spiking_units), state."""
        spikes, v = self.lif.step(self.current(features), state.v, dt)
        h = self.cfc.step(spikes, state.h, dt)
        return h, spikes, EncoderState(v, h)

    def scan(
        self, features: Tensor, state: EncoderState, dt: Tensor, keep: Tensor, reset: Tensor
    ) -> tuple[Tensor, Tensor, EncoderState]:
        """features (B, T, ...) -> tokens (B, T, liquid_units), spikes (B, T, spiking_units), state; see `LIF.scan`."""
        with torch.autocast(features.device.type, enabled=False):  # half precision in the current flips spikes
            spikes, v = self.lif.scan(self.current(features), state.v, dt, keep, reset)
            tokens, h = self.cfc.scan(spikes, state.h, dt, keep, reset)
        return tokens, spikes, EncoderState(v, h)


class CrossModalAttentionFusion(nn.Module):
    """Hybrid fusion: the modalities' tokens early (side by side), through cross-modal attention, and late (a proposal
    of each modality, weighted).

    mask and age are inputs. An absent modality is replaced by a learned absence and attended by no one; a null token is
    always there, so that all sensors absent is no NaN.
    """

    def __init__(self, token_units: Sequence[int], max_age_s: Sequence[float], dim: int, heads: int, outputs: int):
        super().__init__()
        n = len(token_units)
        self.heads, self.dim = heads, dim
        self.register_buffer("max_age_s", torch.tensor(max_age_s).clamp(min=1e-3), persistent=False)
        self.project = nn.ModuleList(nn.Linear(units, dim) for units in token_units)
        self.age = nn.Parameter(torch.zeros(n, dim))
        self.absent = nn.Parameter(torch.randn(n, dim) * 0.1)
        self.null = nn.Parameter(torch.randn(1, dim) * 0.1)
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.early = nn.Sequential(nn.Linear(n * dim, outputs), nn.ReLU())
        self.gate = nn.Linear(dim, 1)
        self.weight = nn.Parameter(torch.zeros(n))  # learned trust in each modality
        self.late = nn.Linear(dim, dim)
        self.features = outputs + 2 * dim

    def forward(self, tokens: Sequence[Tensor], mask: Tensor, age: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tokens: M of (B, units); mask, age (B, M) -> features (B, features), gates (B, M), attention (B, heads,
        M + 1, M + 1)."""
        x = torch.stack([project(t) for project, t in zip(self.project, tokens)], 1)
        x = x + (age / self.max_age_s).clamp(0, 1)[..., None] * self.age
        x = torch.where(mask[..., None] > 0, x, self.absent)
        batch, n = mask.shape
        y = self.norm(torch.cat([x, self.null.expand(batch, 1, self.dim)], 1))
        q, k, v = self.qkv(y).view(batch, n + 1, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        hidden = torch.cat([mask <= 0, torch.zeros_like(mask[:, :1]) > 0], 1)[:, None, None, :]
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        attention = scores.masked_fill(hidden, -1e4).softmax(-1)
        attended = self.out((attention @ v).transpose(1, 2).flatten(2))  # (B, M+1, dim)
        z = y + attended
        gates = (self.gate(z[:, :-1]).squeeze(-1) + self.weight).masked_fill(mask <= 0, -1e4).softmax(-1)
        pooled = (gates[..., None] * self.late(z[:, :-1])).sum(1)
        return torch.cat([self.early(x.flatten(1)), pooled, z[:, -1]], 1), gates, attention


class ModelState(NamedTuple):
    """All a model remembers between ticks, for B robots at once."""

    encoders: dict[str, EncoderState]
    held: dict[str, Tensor]  # stream -> (B, liquid_units), zeros until it first stepped
    h: Tensor  # (B, fusion_units)

    def zero_where(self, start: Tensor) -> ModelState:
        """`start` bool (B,): these begin anew. Detached from what made it, too."""

        return self._map(lambda x: torch.where(start[:, None], 0.0, x.detach()))

    def to(self, device: torch.device) -> ModelState:
        return self._map(lambda x: x.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> ModelState:
        return ModelState(
            {name: EncoderState(change(s.v), change(s.h)) for name, s in self.encoders.items()},
            {name: change(x) for name, x in self.held.items()},
            change(self.h),
        )


class ModelResult(NamedTuple):
    action: Tensor  # (B, T, action_dim)
    go: Tensor  # (B, T, 1) logit
    tokens: dict[str, Tensor]  # (B, T, units), as held at each tick
    by_step: dict[str, Tensor]  # (B, S, units), after each of the stream's own steps
    spikes: dict[str, Tensor]  # (B, S, spiking_units)
    scores: dict[str, Tensor]  # image stream -> (N, cells + 1), head 0, of each of the batch's frames
    grids: dict[str, Tensor]  # image stream -> (N, dim, rows, cols), what was seen whatever the command
    gates: Tensor  # (B, T, M)


class RobotMultiSensorModel(nn.Module):
    """Streams in, an action out.

    Args:
        streams: what it senses, in the order of mask and age. A text stream steers every image stream's encoder.
        words: size of the vocabulary.
        action_dim: number of actuated quantities.
        tick_period_s: nominal time between ticks.
    """

    def __init__(
        self,
        streams: Sequence[StreamSpec],
        words: int,
        action_dim: int,
        tick_period_s: float,
        encoder: EncoderConfig = EncoderConfig(),
        fusion_dim: int = 64,
        fusion_units: int = 128,
        heads: int = 4,
    ):
        super().__init__()
        self.streams = tuple(streams)
        self.text = next((s.name for s in streams if s.kind == "text"), None)
        self.text_first = sorted(self.streams, key=lambda s: s.kind != "text")  # it steers the camera
        self.encoders = nn.ModuleDict()
        for spec in streams:
            period_s = max(tick_period_s, 1 / spec.rate_hz if spec.rate_hz else 0.0)
            self.encoders[spec.name] = ModalityEncoder(_net(spec, words, encoder.liquid_units), encoder, period_s)
        units = [encoder.liquid_units] * len(streams)
        max_age_s = [spec.max_age_ms / 1e3 for spec in streams]
        self.fusion = CrossModalAttentionFusion(units, max_age_s, fusion_dim, heads, fusion_units)
        self.core = CfC(self.fusion.features, fusion_units, tick_period_s)
        self.head = nn.Sequential(nn.Linear(fusion_units, 64), nn.ReLU(), nn.Linear(64, action_dim + 1))
        self.aux = nn.ModuleDict()  # heads that only training has, see training/drive.py

    def zero_state(self, batch: int) -> ModelState:
        encoders = {name: e.zero_state(batch) for name, e in self.encoders.items()}
        return ModelState(
            encoders=encoders,
            held={name: torch.zeros_like(state.h) for name, state in encoders.items()},
            h=self.core.bias.new_zeros(batch, self.core.units),
        )

    def forward(self, batch: Batch, state: ModelState) -> tuple[ModelResult, ModelState]:
        """A chunk of B episodes over T ticks. Nets run over all samples at once, cells over time, the fusion over all
        ticks at once, its core over time."""
        state = state.zero_where(batch.start)
        tokens: dict[str, Tensor] = {}
        by_step: dict[str, Tensor] = {}
        all_spikes: dict[str, Tensor] = {}
        scores: dict[str, Tensor] = {}
        grids: dict[str, Tensor] = {}
        encoders, held = dict(state.encoders), dict(state.held)
        text_tokens = None
        for spec in self.text_first:
            name, encoder, steps = spec.name, self.encoders[spec.name], batch.steps[spec.name]
            lane, slot = steps.where.T
            if spec.kind == "image":
                assert text_tokens is not None, "an image stream needs a text stream to steer it"
                features, scores[name], grids[name] = encoder.net(steps.x, text_tokens[lane, steps.text_at])
            else:
                features = encoder.net(steps.x)
            padded = steps.dt.new_zeros(*steps.dt.shape[:2], features.shape[-1]).index_put(
                (lane, slot), features.float()
            )
            after, all_spikes[name], encoders[name] = encoder.scan(
                padded, encoders[name], steps.dt, steps.keep, steps.reset
            )
            ever = torch.cat([held[name][:, None], after], 1)  # (B, 1 + S, units): before the chunk, after each step
            tokens[name] = ever.gather(1, steps.at[..., None].expand(-1, -1, ever.shape[-1]))
            held[name] = tokens[name][:, -1]
            by_step[name] = after
            if spec.kind == "text":
                text_tokens = ever
        ordered = [tokens[spec.name].flatten(0, 1) for spec in self.streams]
        shape = batch.mask.shape[:2]
        with torch.autocast(batch.mask.device.type, enabled=False):  # only the nets may run in half precision
            fused, gates, _ = self.fusion(ordered, batch.mask.flatten(0, 1), batch.age.flatten(0, 1))
            hidden, h = self.core.scan(fused.view(*shape, -1), state.h, batch.dt, batch.valid, batch.reset)
            action, go = self.act(hidden)
        result = ModelResult(action, go, tokens, by_step, all_spikes, scores, grids, gates.view(*shape, -1))
        return result, ModelState(encoders, held, h)

    def act(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """(B, fusion_units) -> action (B, action_dim), logit of moving at all: a stop must be a stop, not a little
        speed."""
        out = self.head(h)
        go = out[..., -1:]
        return out[..., :-1] * torch.sigmoid(go), go


def _net(spec: StreamSpec, words: int, text_units: int) -> nn.Module:
    if spec.kind == "image":
        return CameraNet(spec.shape, text_units)
    if spec.kind == "scan":
        return ScanNet(spec.shape, spec.range_max_m)
    if spec.kind == "audio":
        return SequenceNet(spec.shape[0] * spec.shape[1], spec.shape[2], 48)
    if spec.kind == "imu":
        return SequenceNet(spec.shape[1], spec.shape[0], 16)
    if spec.kind == "text":
        return TextNet(words)
    raise ValueError(
        f"{spec.name}: no encoder for a stream of kind {spec.kind!r}; known: image, scan, audio, imu, text"
    )
