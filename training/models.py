"""The family of multi-sensor liquid-spike models.

Each modality: preprocessing net -> LIF spikes -> liquid cell -> a token that is held until the modality's next sample.
Fusion of the tokens with mask and age, a liquid cell that remembers across ticks, and a head.

    model = MultiModalFusionNetwork(
        {"camera": ModalityConfig(ModalityType.VISION, (3, 96, 128)), "imu": ModalityConfig(ModalityType.IMU, (20, 7))},
        FusionStrategy.HYBRID, fusion_dim=128, output_dim=7,
    )
    result = model({"camera": frames, "imu": rows}, return_attention_maps=True)     # regular sequences
    result, state = model.scan(batch, state)                                        # irregular time, as robots have it
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_edge.preprocess import AUDIO_FRAME, AUDIO_HOP_S
from mm_edge.types import StreamSpec
from training.batches import Batch, StepBatch, regular_batch, regular_steps
from training.cells import CELLS, LIF
from training.fusion import FusionStrategy, build_fusion
from training.nets import ModalityConfig, ModalityType, build_net, centred
from training.spikes import SpikeEncoder


class EncoderState(NamedTuple):
    v: Tensor  # (B, spiking_units) membrane; (B, 0) of neurons that start from rest with each sample
    h: Tensor  # (B, liquid_units)
    clip: Tensor  # (B, n) a robot's last frames but the newest, of a video; else (B, 0)


class ModalityEncoder(nn.Module):
    """Preprocessing net -> spikes -> liquid cell. Its token is the liquid cell's state.

    Everything the fusion learns of the modality passes through the spikes.

    Args:
        config: see `ModalityConfig`. tick_period_s: the nominal time between its samples unless the config says it.
        text_units: of the token of the text, which an "asked" net wants.

    Raises ValueError for a config that makes no sense.
    """

    def __init__(self, config: ModalityConfig, tick_period_s: float = 1 / 15, text_units: int = 0):
        super().__init__()
        if config.backbone not in CELLS:
            raise ValueError(f"backbone: expected one of {list(CELLS)}, got {config.backbone!r}")
        for size in ("encoder_dim", "liquid_units", "spiking_units"):
            _expect_size(size, getattr(config, size))
        for time, value in {"period_s": config.period_s, "tau_s": config.tau_s, "tick_period_s": tick_period_s}.items():
            _expect_time(time, value)
        if not isinstance(config.num_spike_steps, Integral) or config.num_spike_steps < 0:
            raise ValueError(f"num_spike_steps: expected 0 or more, whole, got {config.num_spike_steps}")
        if not (isinstance(config.beta, Real) and 0 < config.beta < 1):
            raise ValueError(f"beta: expected a share between 0 and 1, got {config.beta!r}")
        self.config, self.shape = config, config.shape
        self.period_s = config.period_s or tick_period_s
        self.net = build_net(config, text_units)
        features = getattr(self.net, "features", None)
        if not isinstance(features, int):
            got = type(features).__name__
            raise ValueError(f"{type(self.net).__name__}.features: expected how many it puts out, an int, got {got}")
        self.project = nn.Identity()
        if config.encoder_dim is not None:
            self.project = nn.Sequential(nn.Linear(features, config.encoder_dim), nn.ReLU())
            features = config.encoder_dim
        self.dropout = nn.Dropout(config.dropout)
        if config.num_spike_steps > 1:
            self.spikes = SpikeEncoder(features, config.spiking_units, config.num_spike_steps, config.beta)
        else:
            units, tau_s = config.spiking_units, config.tau_s or -self.period_s / math.log(config.beta)
            self.current = nn.Sequential(nn.Linear(features, units), nn.LayerNorm(units))
            nn.init.constant_(self.current[1].bias, 0.4)
            if config.num_spike_steps:
                self.lif = LIF(units, tau_s, plain=config.tau_s is None)
        self.liquid = CELLS[config.backbone](config.spiking_units, config.liquid_units, self.period_s)

    def forward(self, x: Tensor, dt: Tensor | None = None, text: Tensor | None = None) -> Tensor:
        """A regular sequence from rest: x (B, T, *input_dim), dt (B, T, 1) seconds, the nominal period; of an "asked"
        net also the text's token at each time, (B, T, text_units) -> tokens (B, T, liquid_units). Raises ValueError."""
        if not _has_time(self.config, x):
            raise ValueError(f"expected {_wanted(self.config, 'time,')}, got {_kind(x)} {tuple(x.shape)}")
        if dt is None:
            dt = torch.full((*x.shape[:2], 1), self.period_s, device=x.device)
        features, _, _ = self.features(x.flatten(0, 1), None if text is None else text.flatten(0, 1))
        keep = torch.ones_like(dt, dtype=torch.bool)
        return self.scan(features.unflatten(0, x.shape[:2]), self.zero_state(len(x)), dt, keep, ~keep)[0]

    @property
    def units(self) -> int:
        """Of its token."""
        return self.liquid.units

    @property
    def fires(self) -> bool:
        """Whether it has spikes."""
        return self.config.num_spike_steps > 0

    @property
    def asks(self) -> bool:
        """Whether its net wants the text's token, too."""
        return self.config.preprocessing == "asked"

    def zero_state(self, batch: int) -> EncoderState:
        neurons = self.lif.units if hasattr(self, "lif") else 0
        frames = math.prod(self.shape) // self.shape[0] * (self.shape[0] - 1) if self.of_frames else 0
        zeros = next(self.liquid.parameters()).new_zeros
        return EncoderState(zeros(batch, neurons), zeros(batch, self.units), zeros(batch, frames))

    @property
    def of_frames(self) -> bool:
        """Whether its samples are clips, of which a robot gives one frame after the other."""
        return self.config.type is ModalityType.VIDEO

    def receive(self, x: Tensor, clip: Tensor) -> tuple[Tensor, Tensor]:
        """What a robot's stream gives, (B, ...) -> a sample, and the clip from now on."""
        if not self.of_frames:
            return x, clip
        frames = torch.cat([clip.view(len(x), -1, *self.shape[1:]), centred(x)[:, None]], 1)
        return frames, frames[:, 1:].flatten(1)

    def features(self, x: Tensor, text: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Samples (N, ...) -> features (N, features); of an "asked" net also its scores and its grid. Raises ValueError
        if a net of the user's own does not put out as many as it says."""
        features, scores, grid = self.net(x, text) if self.asks else (self.net(x), None, None)
        if features.shape[1:] != (self.net.features,):
            net, got = type(self.net).__name__, tuple(features.shape)
            raise ValueError(f"{net}: expected (n, {self.net.features}) of it, as its features say, got {got}")
        return self.dropout(self.project(features)), scores, grid

    def step(self, features: Tensor, state: EncoderState, dt: Tensor) -> tuple[Tensor, Tensor, EncoderState]:
        """features (B, ...) -> token (B, liquid_units), spikes or rates (B, spiking_units), state."""
        if hasattr(self, "lif"):
            spikes, v = self.lif.step(self.current(features), state.v, dt)
        else:
            spikes, v = self.spikes(features) if self.fires else F.relu(self.current(features)), state.v
        h = self.liquid.step(spikes, state.h, dt)
        return h, spikes, EncoderState(v, h, state.clip)

    def scan(
        self, features: Tensor, state: EncoderState, dt: Tensor, keep: Tensor, reset: Tensor
    ) -> tuple[Tensor, Tensor, EncoderState]:
        """features (B, T, ...) -> tokens (B, T, liquid_units), spikes (B, T, spiking_units), state; see `LIF.scan`."""
        with torch.autocast(features.device.type, enabled=False):  # half precision in the current flips spikes
            if hasattr(self, "lif"):
                spikes, v = self.lif.scan(self.current(features), state.v, dt, keep, reset)
            elif self.fires:
                spikes, v = self.spikes(features.flatten(0, 1)).view(*features.shape[:2], -1), state.v
            else:
                spikes, v = F.relu(self.current(features)), state.v
            tokens, h = self.liquid.scan(spikes, state.h, dt, keep, reset)
        return tokens, spikes, EncoderState(v, h, state.clip)


class ModelState(NamedTuple):
    """All a model remembers between ticks, for B robots at once."""

    encoders: dict[str, EncoderState]
    held: dict[str, Tensor]  # stream -> (B, liquid_units), zeros until it first stepped
    h: Tensor  # (B, fusion_units)
    stepped: Tensor  # (B, M), 1 of those streams of which anything is remembered

    def zero_where(self, start: Tensor) -> ModelState:
        """`start` bool (B,): these begin anew. Detached from what made it, too."""

        return self.map(lambda x: torch.where(start[:, None], 0.0, x.detach()))

    def without(self, gone: Tensor) -> ModelState:
        """`gone` bool (B, M): of these modalities nothing is remembered, as on a robot after a long silence."""

        def left(i: int, x: Tensor) -> Tensor:
            return torch.where(gone[:, [i]], 0.0, x)

        encoders = {n: EncoderState(*(left(i, x) for x in s)) for i, (n, s) in enumerate(self.encoders.items())}
        held = {n: left(i, x) for i, (n, x) in enumerate(self.held.items())}
        return ModelState(encoders, held, self.h, self.stepped.masked_fill(gone, 0.0))

    def map(self, change: Callable[[Tensor], Tensor]) -> ModelState:
        return ModelState(
            {name: EncoderState(*map(change, s)) for name, s in self.encoders.items()},
            {name: change(x) for name, x in self.held.items()},
            change(self.h),
            change(self.stepped),
        )


class ModelResult(NamedTuple):
    """Of a chunk of B episodes over T ticks."""

    output: Tensor  # (B, T, output_dim)
    raw: Tensor  # (B, T, ...), what the head said, see `act`
    tokens: dict[str, Tensor]  # (B, T, units), as held at each tick
    by_step: dict[str, Tensor]  # (B, S, units), after each of the modality's own steps
    spikes: dict[str, Tensor]  # (B, S, spiking_units), of the modalities that have any
    scores: dict[str, Tensor]  # of an "asked" net (N, cells + 1), head 0, of each of the batch's frames
    grids: dict[str, Tensor]  # (N, dim, rows, cols), what was seen whatever the command
    gates: Tensor  # (B, T, M)
    attention: Tensor  # (B, T, heads, M + 1, M + 1), the last: the null token
    features: dict[str, Tensor]  # (N, features), of each of the batch's samples, before the spikes


class FusionResult(NamedTuple):
    output: Tensor  # (B, T, output_dim); (B, output_dim) where no input had a time axis
    modality_features: dict[str, Tensor] | None  # (B, T, liquid_units), or without T
    attention_maps: dict[str, Tensor] | None  # "fusion" (B, T, heads, M + 1, M + 1), the last: the null token; an asked
    # camera (B, T, rows, cols)
    modality_weights: Tensor  # (B, T, M), each one's share where the strategy weighs them: of HYBRID in its late part


class MultiModalFusionNetwork(nn.Module):
    """Modalities in, a vector out.

    Args:
        modality_configs: by name, in the order of mask and age. A text steers every "asked" camera.
        fusion_strategy: see `FusionStrategy`.
        fusion_dim: of a token in the fusion. num_attention_heads: fusion_dim is a multiple of it.
        output_dim: of what comes out: logits of classes, a prediction, an action.
        fusion_units: of the liquid cell behind the fusion (fusion_dim).
        core: which cell that is, as the backbone of a config.
        tick_period_s: nominal time between ticks.

    Raises ValueError, which names the modality, for configs that make no sense.
    """

    def __init__(
        self,
        modality_configs: Mapping[str, ModalityConfig],
        fusion_strategy: FusionStrategy = FusionStrategy.HYBRID,
        fusion_dim: int = 512,
        num_attention_heads: int = 8,
        output_dim: int = 10,
        *,
        fusion_units: int | None = None,
        core: str = "cfc",
        tick_period_s: float = 1 / 15,
    ):
        super().__init__()
        if core not in CELLS:
            raise ValueError(f"core: expected one of {list(CELLS)}, got {core!r}")
        sizes = {"fusion_dim": fusion_dim, "num_attention_heads": num_attention_heads, "output_dim": output_dim}
        for size, value in {**sizes, "fusion_units": fusion_units}.items():
            _expect_size(size, value)
        _expect_time("tick_period_s", tick_period_s)
        if not isinstance(modality_configs, Mapping):
            raise ValueError(f"modality_configs: expected configs by name, got {type(modality_configs).__name__}")
        self.names, self.configs = tuple(modality_configs), dict(modality_configs)
        if not self.names:
            raise ValueError("modality_configs: expected at least one modality")
        self.tick_period_s, self.output_dim, self.strategy = tick_period_s, output_dim, FusionStrategy(fusion_strategy)
        types = [config.type for config in self.configs.values()]
        self.text = next((n for n, c in self.configs.items() if c.type is ModalityType.TEXT), None)
        self.text_first = sorted(self.names, key=lambda n: n != self.text)  # it steers the camera
        text_units = self.configs[self.text].liquid_units if self.text else 0
        self.encoders = nn.ModuleDict()
        for name, config in self.configs.items():
            if name in ("", "fusion") or "." in name or hasattr(self.encoders, name):
                what = "names without dots, other than 'fusion' and the attributes of a torch ModuleDict"
                raise ValueError(f"modality_configs: expected {what}, got {name!r}")
            try:
                self.encoders[name] = ModalityEncoder(config, tick_period_s, text_units)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            if self.encoders[name].asks and not self.text:
                raise ValueError(f"{name}: preprocessing 'asked' needs a TEXT modality that asks")
        units, max_age_s = [e.units for e in self.encoders.values()], [c.max_age_s for c in self.configs.values()]
        fusion_units = fusion_units or fusion_dim
        self.fusion = build_fusion(
            self.strategy, types, units, max_age_s, fusion_dim, num_attention_heads, fusion_units
        )
        self.core = CELLS[core](self.fusion.features, fusion_units, tick_period_s)
        self.head = self._head(fusion_units, output_dim)
        self.aux = nn.ModuleDict()  # heads that only training has

    def _head(self, units: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(units, 64), nn.ReLU(), nn.Linear(64, outputs))

    def act(self, raw: Tensor) -> Tensor:
        """What the head said (..., n) -> output (..., output_dim)."""
        return raw

    def zero_state(self, batch: int) -> ModelState:
        encoders = {name: e.zero_state(batch) for name, e in self.encoders.items()}
        zeros = next(self.core.parameters()).new_zeros
        return ModelState(
            encoders=encoders,
            held={name: torch.zeros_like(state.h) for name, state in encoders.items()},
            h=zeros(batch, self.core.units),
            stepped=zeros(batch, len(self.names)),
        )

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        mask: Tensor | None = None,
        dt: Tensor | None = None,
        return_modality_features: bool = False,
        return_attention_maps: bool = False,
    ) -> FusionResult:
        """Regular sequences from rest.

        Args:
            inputs: by name (B, T, *input_dim), or (B, *input_dim): one sample, at the first tick, held until it is
                max_age_s old. Images are uint8 (h, w, 3), as a robot's, or float (3, h, w) as `nets.centred` makes them
                of those, (x - 128) / 64; sound may also be waveforms (B, [T,] channels, samples), (B, samples), float
                within [-1, 1] or int16. What is not given is absent.
            mask: (B, T, M) or (B, M), 1 where a modality is present; it is absent where it was not given. What is
                absent is not looked at.
            dt: (B, T, 1) seconds between ticks; the nominal period.

        Raises ValueError, which names the modality, what was expected and what came.
        """
        for name, x in inputs.items():
            if not isinstance(x, Tensor):
                raise ValueError(f"{name}: expected a tensor, got {type(x).__name__}")
        inputs = {name: self._channels(name, x) for name, x in inputs.items()}
        lanes, ticks, one = self._sizes(inputs)
        for name, x in inputs.items():
            if mask is None and x.is_floating_point() and not x.isfinite().all():
                raise ValueError(f"{name}: expected finite numbers, or a mask that says where it is absent")
        _expect("mask", mask, (lanes, ticks, len(self.names)), (lanes, len(self.names)))
        _expect("dt", dt, (lanes, ticks, 1))
        if dt is not None and not ((dt >= 0) & dt.isfinite()).all():
            raise ValueError("dt: expected finite seconds, none below 0")
        batch = self._regular(inputs, lanes, ticks, mask, dt)
        result, _ = self.scan(batch, self.zero_state(lanes))

        def shown(x: Tensor) -> Tensor:
            return x[:, 0] if one else x

        features = maps = None
        if return_modality_features:
            features = {name: shown(token) for name, token in result.tokens.items()}
        if return_attention_maps:
            maps = {"fusion": shown(result.attention)}
            for name, scores in result.scores.items():
                if name not in inputs:
                    continue
                at = batch.steps[name].at
                looked = scores[:, :-1].softmax(-1).view(lanes, -1, *self.encoders[name].net.grid)
                looked = looked[torch.arange(lanes)[:, None], (at - 1).clamp(min=0)]
                maps[name] = shown(looked * (at > 0)[..., None, None])
        return FusionResult(shown(result.output), features, maps, shown(result.gates))

    def _channels(self, name: str, x: Tensor) -> Tensor:
        """A waveform (B, samples) of one channel is one of (B, 1, samples)."""
        config = self.configs.get(name)
        wave = config is not None and config.type is ModalityType.AUDIO and config.sample_rate_hz and x.dim() == 2
        return x[:, None] if wave else x

    def _sizes(self, inputs: Mapping[str, Tensor]) -> tuple[int, int, bool]:
        """Lanes, ticks, and whether no input has a time axis."""
        if unknown := [name for name in inputs if name not in self.names]:
            raise ValueError(f"{unknown[0]}: expected one of the modalities {list(self.names)}")
        if not inputs:
            raise ValueError(f"expected at least one of the modalities {list(self.names)}, got none")
        sizes: dict[str, tuple[int, int | None]] = {}
        for name, x in inputs.items():
            config = self.configs[name]
            timed = _has_time(config, x)
            if timed is None:
                raise ValueError(f"{name}: expected {_wanted(config, '[time,]')}, got {_kind(x)} {tuple(x.shape)}")
            if config.vocabulary and ((x < 0) | (x > config.vocabulary)).any():
                raise ValueError(f"{name}: expected tokens from 0 to {config.vocabulary}, got {x.min()} to {x.max()}")
            sizes[name] = len(x), x.shape[1] if timed else None
            if 0 in x.shape[: 1 + timed]:
                raise ValueError(f"{name}: expected at least one sample, got {tuple(x.shape)}")
        lanes, ticks = next(iter(sizes.values()))[0], [t for _, t in sizes.values() if t is not None]
        for name, (batch, t) in sizes.items():
            if batch != lanes or (t is not None and t != ticks[0]):
                want = f"a batch of {lanes}" + (f" and {ticks[0]} time steps" if ticks else "")
                raise ValueError(f"{name}: expected {want} as the others have, got {tuple(inputs[name].shape)}")
        return lanes, ticks[0] if ticks else 1, not ticks

    def _regular(
        self, inputs: Mapping[str, Tensor], lanes: int, ticks: int, mask: Tensor | None, dt: Tensor | None
    ) -> Batch:
        """Regular sequences as a batch of irregular time: as a robot would have them, every modality steps at each tick
        where it is present; or at the first alone, and from then on it ages until it is absent."""
        device = next(iter(inputs.values())).device
        if dt is None:
            dt = torch.full((lanes, ticks, 1), self.tick_period_s, device=device)
        if mask is None:
            mask = torch.ones(lanes, len(self.names), device=device)
        present = (mask if mask.dim() == 3 else mask[:, None]).expand(lanes, ticks, -1) > 0
        since_s = (dt.cumsum(1) - dt[:, :1]).squeeze(-1)  # the first tick
        steps, there, ages, text_steps = {}, [], [], self._text_steps(inputs, ticks)
        for i, (name, config) in enumerate(self.configs.items()):
            x, age = inputs.get(name, _blank(config, lanes, device)), torch.zeros_like(since_s)
            if not _has_time(config, x):
                x, age = x[:, None], since_s
            every = regular_steps(x, dt, ticks, self.encoders[name].period_s, text_steps)
            steps[name] = _taken(every, present[..., i], since_s)
            there.append(present[..., i] & (steps[name].at > 0) & (age <= (config.max_age_s or math.inf)))
            ages.append(age.clamp(max=config.max_age_s))
        batch = regular_batch(steps, torch.stack(there, -1).to(dt.dtype), dt, {})
        return replace(batch, age=torch.stack(ages, -1))

    def _text_steps(self, inputs: Mapping[str, Tensor], ticks: int) -> int:
        if self.text not in inputs:
            return 0
        return ticks if inputs[self.text].dim() == 3 else 1

    def scan(self, batch: Batch, state: ModelState) -> tuple[ModelResult, ModelState]:
        """A chunk of B episodes over T ticks. Nets run over all samples at once, cells over time, the fusion over all
        ticks at once, its core over time."""
        state = state.zero_where(batch.start)
        tokens: dict[str, Tensor] = {}
        by_step: dict[str, Tensor] = {}
        all_spikes: dict[str, Tensor] = {}
        scores: dict[str, Tensor] = {}
        grids: dict[str, Tensor] = {}
        all_features: dict[str, Tensor] = {}
        encoders, held = dict(state.encoders), dict(state.held)
        text_tokens = None
        for name in self.text_first:
            encoder, steps = self.encoders[name], batch.steps[name]
            lane, slot = steps.where.T
            asked = text_tokens[lane, steps.text_at] if encoder.asks and text_tokens is not None else None
            try:
                features, looked, grid = encoder.features(steps.x, asked)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            all_features[name] = features.float()
            if looked is not None and grid is not None:
                scores[name], grids[name] = looked, grid
            padded = steps.dt.new_zeros(*steps.dt.shape[:2], features.shape[-1]).index_put(
                (lane, slot), features.float()
            )
            after, spikes, encoders[name] = encoder.scan(padded, encoders[name], steps.dt, steps.keep, steps.reset)
            if encoder.fires:
                all_spikes[name] = spikes
            ever = torch.cat([held[name][:, None], after], 1)  # (B, 1 + S, units): before the chunk, after each step
            tokens[name] = ever.gather(1, steps.at[..., None].expand(-1, -1, ever.shape[-1]))
            held[name] = tokens[name][:, -1]
            by_step[name] = after
            if name == self.text:
                text_tokens = ever
        ordered = [tokens[name].flatten(0, 1) for name in self.names]
        shape = batch.mask.shape[:2]
        with torch.autocast(batch.mask.device.type, enabled=False):  # only the nets may run in half precision
            fused, gates, attention = self.fusion(ordered, batch.mask.flatten(0, 1), batch.age.flatten(0, 1))
            hidden, h = self.core.scan(fused.view(*shape, -1), state.h, batch.dt, batch.valid, batch.reset)
            raw = self.head(hidden)
        result = ModelResult(
            self.act(raw), raw, tokens, by_step, all_spikes, scores, grids, gates.view(*shape, -1),
            attention.view(*shape, *attention.shape[1:]), all_features,
        )  # fmt: skip
        now = torch.cat([batch.steps[name].keep.any(1) for name in self.names], -1)
        return result, ModelState(encoders, held, h, state.stepped.masked_fill(now, 1.0))


def _taken(steps: StepBatch, present: Tensor, since_s: Tensor) -> StepBatch:
    """Of a regular batch's steps those where their modality is present (B, T); `since_s` (B, T) is each tick's time. As
    on a robot, a step's dt is the time since the one before that was taken."""
    keep = steps.keep & present[:, : steps.keep.shape[1], None]
    slot = torch.arange(keep.shape[1], device=keep.device)
    last = ((slot[:, None] + 1) * keep).squeeze(-1).cummax(1).values  # (B, S), counted from 1; 0: none was taken yet
    before = F.pad(last[:, :-1], (1, 0))
    gap_s = since_s[:, : len(slot)] - since_s.gather(1, (before - 1).clamp(min=0))
    gap_s = torch.where(before > 0, gap_s, steps.dt[:, :1, 0])
    dt = torch.where((before == slot)[..., None], steps.dt, gap_s[..., None])
    return replace(steps, keep=keep, dt=dt, at=last.expand(steps.at.shape))


def _expect_size(name: str, value: int | None) -> None:
    """Raises ValueError."""
    if value is not None and not (isinstance(value, Integral) and value > 0):
        raise ValueError(f"{name}: expected a whole number above 0, got {value!r}")


def _expect_time(name: str, value: float | None) -> None:
    """Raises ValueError."""
    if value is not None and not value > 0:
        raise ValueError(f"{name}: expected more than 0, got {value}")


def _expect(name: str, x: Tensor | None, *shapes: tuple[int, ...]) -> None:
    """Raises ValueError."""
    if x is not None and not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x is not None and tuple(x.shape) not in shapes:
        raise ValueError(f"{name}: expected {' or '.join(map(str, shapes))}, got {tuple(x.shape)}")


def _layouts(config: ModalityConfig) -> list[tuple[str, tuple[int | None, ...]]]:
    """What one sample of a modality may be: a type of numbers and a shape, in which None is any."""
    shape = config.shape
    if config.type is ModalityType.VISION:
        return [("uint8", (*shape[1:], shape[0])), ("float32", shape)]
    if config.type is ModalityType.VIDEO:
        return [("uint8", (shape[0], *shape[2:], shape[1])), ("float32", shape)]
    if config.type is ModalityType.AUDIO and config.sample_rate_hz:
        wave = (shape[0] - 1, None)
        return [("float32", shape), ("float32", wave), ("int16", wave)]
    return [("int64" if config.type is ModalityType.TEXT else "float32", shape)]


def _wanted(config: ModalityConfig, time: str) -> str:
    """Batches of what one sample may be, in words."""
    layouts = (f"{kind} (batch, {time} {', '.join(map(str, shape))})" for kind, shape in _layouts(config))
    return " or ".join(layouts).replace("None", "n")


def _kind(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _has_time(config: ModalityConfig, x: Tensor) -> bool | None:
    """Whether x is (B, T, ...) or (B, ...) of what the modality takes; None if it is neither."""
    for before, has in ((2, True), (1, False)):
        for kind, shape in _layouts(config):
            right = config.type is ModalityType.CUSTOM or kind == _kind(x)
            got = x.shape[before:]
            if right and len(got) == len(shape) and all(want in (None, n) for n, want in zip(got, shape)):
                return has
    return None


def _blank(config: ModalityConfig, lanes: int, device: torch.device) -> Tensor:
    """No samples at all, (lanes, 0, ...)."""
    dtype = torch.int64 if config.type is ModalityType.TEXT else torch.float32
    return torch.zeros(lanes, 0, *config.shape, dtype=dtype, device=device)


class RobotMultiSensorModel(MultiModalFusionNetwork):
    """A camera and other sensors in, an action of any dimension out (wheels: 2; an arm with gripper: 7).

    Args:
        camera_size: (3, h, w). num_sensors: numbers that come together, such as joint positions.
        modalities: instead of these two, by name. sizes: further arguments of `MultiModalFusionNetwork`.
    """

    def __init__(
        self,
        camera_size: tuple[int, int, int] = (3, 224, 224),
        num_sensors: int = 10,
        fusion_dim: int = 512,
        action_dim: int = 7,
        *,
        modalities: Mapping[str, ModalityConfig] | None = None,
        num_attention_heads: int = 4,
        **sizes: Any,
    ):
        super().__init__(
            modalities
            or {
                "camera": ModalityConfig(ModalityType.VISION, camera_size),
                "sensors": ModalityConfig(ModalityType.SENSOR, num_sensors),
            },
            fusion_dim=fusion_dim, num_attention_heads=num_attention_heads, output_dim=action_dim, **sizes,
        )  # fmt: skip

    def _head(self, units: int, outputs: int) -> nn.Module:
        return super()._head(units, outputs + 1)

    def act(self, raw: Tensor) -> Tensor:
        """The last of what the head said is the logit of moving at all: a stop must be a stop, not a little speed."""
        return raw[..., :-1] * torch.sigmoid(raw[..., -1:])


class TriModalModel(MultiModalFusionNetwork):
    """Picture, text and sound in, logits of classes out. Sound is a waveform, float within [-1, 1] or int16, or log-mel
    as a robot has it. `sizes`: further arguments of `MultiModalFusionNetwork`."""

    def __init__(
        self,
        image_size: tuple[int, int, int] = (3, 224, 224),
        text_vocab_size: int = 10_000,
        audio_sample_rate: int = 16_000,
        fusion_dim: int = 512,
        num_classes: int = 10,
        *,
        text_length: int = 32,
        audio_s: float = 1.0,
        **sizes: Any,
    ):
        super().__init__(
            {
                "image": ModalityConfig(ModalityType.VISION, image_size),
                "text": ModalityConfig(ModalityType.TEXT, text_length, vocabulary=text_vocab_size, max_age_s=0),
                "audio": sound(audio_sample_rate, audio_s),
            },
            fusion_dim=fusion_dim, output_dim=num_classes, **sizes,
        )  # fmt: skip


class AudioVideoModel(MultiModalFusionNetwork):
    """Frames and the sound with them in, logits of classes out, after each frame: liquid over the frames, so that what
    happens is told while it does. With each frame comes the window of sound that ends with it.

    Args:
        video_frames: of a clip that is told of as a whole. frame_size: (3, h, w). frame_rate_hz: nominal.
        audio_s: how much of the sound comes with each frame. channels: of the sound.
        modalities: a picture and a sound, by other names or of other sizes, instead of these two.
        sizes: further arguments of `MultiModalFusionNetwork`.
    """

    def __init__(
        self,
        video_frames: int = 16,
        audio_sample_rate: int = 16_000,
        fusion_dim: int = 512,
        num_classes: int = 400,
        *,
        frame_size: tuple[int, int, int] = (3, 112, 112),
        frame_rate_hz: float = 8.0,
        audio_s: float = 0.5,
        channels: int = 1,
        modalities: Mapping[str, ModalityConfig] | None = None,
        fusion_strategy: FusionStrategy = FusionStrategy.HIERARCHICAL,
        **sizes: Any,
    ):
        super().__init__(
            modalities
            or {
                "video": ModalityConfig(ModalityType.VISION, frame_size),
                "audio": sound(audio_sample_rate, audio_s, channels),
            },
            fusion_strategy, fusion_dim, output_dim=num_classes, tick_period_s=1 / frame_rate_hz, **sizes,
        )  # fmt: skip
        self.video_frames, self.samples_a_frame = video_frames, audio_sample_rate / frame_rate_hz
        (self.picture, _), (self.sound, config) = self.configs.items()
        self.window = (config.shape[2] - 1) * round(AUDIO_HOP_S * audio_sample_rate) + AUDIO_FRAME

    def forward(self, video: Tensor, audio: Tensor, **more: Any) -> FusionResult:  # type: ignore[override]
        """A clip from its begin; its output (B, num_classes) is what is said after the last frame.

        Args:
            video: (B, video_frames, 3, h, w) float, or (B, video_frames, h, w, 3) uint8.
            audio: waveforms of the same time (B, samples) or (B, channels, samples), float within [-1, 1] or int16.
            more: see `MultiModalFusionNetwork.forward`.

        Raises ValueError for what does not fit.
        """
        audio = audio[:, None] if audio.dim() == 2 else audio
        if video.dim() != 5 or video.shape[1] != self.video_frames:
            raise ValueError(f"{self.picture}: expected (batch, {self.video_frames}, ...), got {tuple(video.shape)}")
        least = round(self.video_frames * self.samples_a_frame)
        if audio.dim() != 3 or audio.shape[-1] < least:
            raise ValueError(f"{self.sound}: expected (batch, [channels,] {least} or more), got {tuple(audio.shape)}")
        windows = self.aligned(audio)
        result = super().forward({self.picture: video, self.sound: windows}, **more)
        return result._replace(output=result.output[:, -1])

    def aligned(self, audio: Tensor) -> Tensor:
        """(B, channels, samples) -> (B, video_frames, channels, window): what was to be heard until each frame, silence
        before the begin."""
        ends = [round((k + 1) * self.samples_a_frame) for k in range(self.video_frames)]
        padded = F.pad(audio, (self.window, 0))
        return torch.stack([padded[..., end : end + self.window] for end in ends], 1)


def sound(sample_rate_hz: int, seconds: float, channels: int = 1, bands: int = 40, **sizes: Any) -> ModalityConfig:
    """Of a modality that hears the last `seconds`."""
    hops = 1 + int((seconds - AUDIO_FRAME / sample_rate_hz) / AUDIO_HOP_S + 1e-6)
    return ModalityConfig(ModalityType.AUDIO, (channels + 1, bands, hops), sample_rate_hz=sample_rate_hz, **sizes)


def captioning(
    vocabulary: int, image_size: tuple[int, int, int] = (3, 224, 224), **sizes: Any
) -> MultiModalFusionNetwork:
    """What comes next in a caption: picture and words so far in, logits of the vocabulary (and of the end, 0) out."""
    text = ModalityConfig(ModalityType.TEXT, 32, vocabulary=vocabulary, preprocessing="sequence", max_age_s=0)
    modalities = {"image": ModalityConfig(ModalityType.VISION, image_size), "text": text}
    return MultiModalFusionNetwork(modalities, output_dim=vocabulary + 1, **sizes)


def video(
    num_classes: int,
    clip: tuple[int, int, int, int] = (16, 3, 112, 112),
    fusion_strategy: FusionStrategy = FusionStrategy.HIERARCHICAL,
    **sizes: Any,
) -> MultiModalFusionNetwork:
    """Clips with sound in, logits of classes out."""
    modalities = {"video": ModalityConfig(ModalityType.VIDEO, clip), "audio": sound(16_000, 1.0)}
    return MultiModalFusionNetwork(modalities, fusion_strategy, output_dim=num_classes, **sizes)


def robot_control(action_dim: int = 7, **sizes: Any) -> RobotMultiSensorModel:
    return RobotMultiSensorModel(action_dim=action_dim, **sizes)


def moderation(text_vocab_size: int = 10_000, num_classes: int = 2, **sizes: Any) -> TriModalModel:
    """Picture, text and sound in; whether it may be shown."""
    return TriModalModel(text_vocab_size=text_vocab_size, num_classes=num_classes, **sizes)


PRESETS: dict[str, Callable[..., MultiModalFusionNetwork]] = {
    "captioning": captioning,
    "video": video,
    "robot_control": robot_control,
    "moderation": moderation,
}


def modalities_of(
    streams: Sequence[StreamSpec], words: int, tick_period_s: float, **sizes: Any
) -> dict[str, ModalityConfig]:
    """Configs of a robot's streams. A text steers the cameras; `sizes` are further fields of all of them."""
    asked = any(spec.kind == "text" for spec in streams)
    configs = {spec.name: ModalityConfig.of(spec, tick_period_s, words, **sizes) for spec in streams}
    for name, config in configs.items():
        if asked and config.type is ModalityType.VISION:
            configs[name] = replace(config, preprocessing="asked")
    return configs
