"""Preprocessing nets: one sample of a modality in, features out.

    net = build_net(config, text_units)       # `config.type` and `config.preprocessing` say which
    features = net(x)                         # (N, net.features); a CameraNet also wants the command's token

A sample is what the robot's preprocessing makes (see mm_edge/preprocess.py), or what users of torch expect: an image is
uint8 (h, w, 3), or float (3, h, w), which is taken as it is and so must be what `centred` makes of uint8; sound is
log-mel (channels + 1, bands, hops) or a waveform (channels, samples), float within [-1, 1] or int16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_edge.preprocess import AUDIO_FRAME, AUDIO_HOP_S, hann, mel_bank
from mm_edge.types import StreamSpec

SCAN_RANGE_MAX_M = 10.0  # unless the config says it


class ModalityType(Enum):
    """What a modality's samples are. The values are the kinds of `StreamSpec`, but for the last two."""

    VISION = "image"
    AUDIO = "audio"
    TEXT = "text"
    SENSOR = "vector"
    SCAN = "scan"
    IMU = "imu"
    POINTS = "points"
    VIDEO = "video"
    CUSTOM = "custom"


@dataclass(frozen=True)
class ModalityConfig:
    """One modality of a model.

    Attributes:
        input_dim: shape of one sample: (3, h, w), of floats within [-2, 2], see `centred`; video (frames, 3, h, w);
            log-mel (channels + 1, bands, hops); text (tokens,); sensor (n,); scan (2, beams); imu (rows, 7); points
            (n, 4); custom any. An int is (n,).
        encoder_dim: features that the preprocessing net's are projected to; None: they are taken as they are.
        num_spike_steps: 1: one step of a leaky membrane that is carried from sample to sample, in real time; more: two
            layers of neurons over that many steps of each sample from rest, whose rates go on (training/spikes.py);
            0: no spikes, a rectified layer instead.
        beta: what is left of the membrane after a nominal period (or after a spike step), to which each sample's
            current is added; tau_s, if given: the membrane's time constant, and it leaks toward the current.
        backbone: the liquid cell: "cfc" or "ltc"; or what it is compared with: "gru", "gru_dt" (which is told the time
            between samples), "ncps" (that package's CfC) or "none" (no memory).
        preprocessing: vision: "simple", "resnet", "efficient" or "asked" (steered by the text); video: "conv3d",
            "frames" or "early"; sound: "conv1d", "conv2d" or "resnet"; text: "bag" (of words) or "sequence" (their
            order counts); custom: what makes the net, called with this config.
        vocabulary: words of a text, padding not counted. sample_rate_hz: of sound, if waveforms are to be taken: float
            within [-1, 1], as torchaudio and soundfile give them, or int16.
        period_s: nominal time between samples; None: the model's tick.
        max_age_s: at which age the fusion has it as oldest; 0: it does not age.
    """

    type: ModalityType
    input_dim: int | tuple[int, ...]
    encoder_dim: int | None = 512
    liquid_units: int = 256
    spiking_units: int = 128
    num_spike_steps: int = 1
    beta: float = 0.95
    tau_s: float | None = None
    backbone: str = "cfc"
    dropout: float = 0.0
    preprocessing: str | Callable[[Any], nn.Module] | None = None
    vocabulary: int = 0
    sample_rate_hz: int = 0
    range_max_m: float = 0.0
    period_s: float | None = None
    max_age_s: float = 0.3

    def __post_init__(self) -> None:
        if not isinstance(self.type, ModalityType):
            known = [kind.value for kind in ModalityType]
            if self.type not in known:
                raise ValueError(f"type: expected a ModalityType, or one of {known}, got {self.type!r}")
            object.__setattr__(self, "type", ModalityType(self.type))
        if not all(isinstance(size, Integral) for size in self.shape):
            raise ValueError(f"{self.type.name}: expected an input_dim of whole numbers, got {self.input_dim!r}")
        if not 0 <= self.max_age_s < math.inf:
            raise ValueError(f"{self.type.name}: expected max_age_s of 0 or more seconds, got {self.max_age_s}")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.input_dim) if isinstance(self.input_dim, Iterable) else (self.input_dim,)

    @classmethod
    def of(cls, spec: StreamSpec, tick_period_s: float, words: int = 0, **sizes: Any) -> ModalityConfig:
        """For a robot's stream; `sizes` are further fields."""
        return cls(
            type=ModalityType(spec.kind),
            input_dim=(spec.shape[-1], *spec.shape[:-1]) if spec.kind == "image" else spec.shape,
            vocabulary=words if spec.kind == "text" else 0,
            sample_rate_hz=spec.sample_rate_hz,
            range_max_m=spec.range_max_m,
            period_s=max(tick_period_s, 1 / spec.rate_hz if spec.rate_hz else 0.0),
            max_age_s=0.0 if spec.latched else spec.max_age_ms / 1e3,
            **sizes,
        )


def build_net(config: ModalityConfig, text_units: int = 0) -> nn.Module:
    """Raises ValueError for a preprocessing that the type does not have, or an input_dim that it cannot have."""
    shape, kind, how = config.shape, config.type, config.preprocessing
    if kind is ModalityType.CUSTOM or not (how is None or isinstance(how, str)):
        if how is None or isinstance(how, str):
            raise ValueError(f"a custom modality's preprocessing: expected a class of your own, got {how!r}")
        if isinstance(how, nn.Module):
            raise ValueError(
                f"a custom modality's preprocessing: expected the class, got one of it, {type(how).__name__}"
            )
        return how(config)
    sizes, known = _KNOWN[kind]
    fits = len(shape) == len(sizes) and all(want == n or isinstance(want, str) for want, n in zip(sizes, shape))
    if not fits or min(shape) < 1:
        want = ", ".join(map(str, sizes))
        raise ValueError(f"{kind.name}: expected an input_dim of ({want}), got {config.input_dim}")
    if (how or known[0]) not in known:
        raise ValueError(f"{kind.name}: expected preprocessing to be one of {known}, got {how!r}")
    if kind is ModalityType.VISION:
        if how == "asked":
            return CameraNet((*shape[1:], shape[0]), text_units)
        return VisionNet(shape, how or "simple")
    if kind is ModalityType.VIDEO:
        return VideoNet(shape, how or "conv3d")
    if kind is ModalityType.AUDIO:
        return AudioNet(shape, config.sample_rate_hz, how or "conv1d")
    if kind is ModalityType.SCAN:
        return ScanNet(shape, config.range_max_m or SCAN_RANGE_MAX_M)
    if kind is ModalityType.IMU:
        return SequenceNet(shape[1], shape[0], 16)
    if kind is ModalityType.POINTS:
        return PointsNet(shape)
    if kind is ModalityType.TEXT:
        if config.vocabulary < 1:
            raise ValueError(f"TEXT: expected a vocabulary of at least one word, got {config.vocabulary}")
        return TextNet(config.vocabulary, shape[0], how or "bag")
    return SensorNet(shape[0])


# input_dim, and what preprocessing there is; the first is the default.
_KNOWN: dict[ModalityType, tuple[tuple[str | int, ...], tuple[str, ...]]] = {
    ModalityType.VISION: (("channels", "height", "width"), ("simple", "resnet", "efficient", "asked")),
    ModalityType.VIDEO: (("frames", "channels", "height", "width"), ("conv3d", "frames", "early")),
    ModalityType.AUDIO: (("channels + 1", "bands", "hops"), ("conv1d", "conv2d", "resnet")),
    ModalityType.TEXT: (("tokens",), ("bag", "sequence")),
    ModalityType.SENSOR: (("n",), ("mlp",)),
    ModalityType.SCAN: ((2, "beams"), ("conv",)),
    ModalityType.IMU: (("rows", "columns"), ("conv",)),
    ModalityType.POINTS: (("n", 4), ("max",)),
}


def centred(x: Tensor) -> Tensor:
    """uint8 (N, h, w, 3) -> (N, 3, h, w) within [-2, 2], in the precision that the nets run in; floats as they are."""
    if x.dtype != torch.uint8:
        return x
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    return x.to(dtype).permute(0, 3, 1, 2).sub_(128).mul_(1 / 64)  # channels-last as it lies, which is fast


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
        height, width, channels = shape
        self.grid = (math.ceil(height / 8), math.ceil(width / 8))
        if channels != 3 or min(self.grid) < 4:  # fewer cells make no coarse map
            got = (channels, height, width)
            raise ValueError(f"'asked': expected an input_dim of (3, height, width) of at least 25 pixels, got {got}")
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
        seen = self.conv(centred(x))
        seen = F.relu(seen + self.context(seen))
        return (*self.ask(seen, text), seen)

    def ask(self, seen: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """What was seen (N, dim, rows, cols), text (N, text_units) -> features, and head 0's scores."""
        scale, shift = self.steer(text)[..., None, None].chunk(2, 1)
        grid = F.relu(seen * (1 + scale) + shift).float()
        n, cells = len(seen), self.grid[0] * self.grid[1]
        keys = self.key(grid).view(n, self.HEADS, self.KEY, cells)
        scores = (self.query(text).float().view(n, self.HEADS, 1, self.KEY) @ keys).squeeze(2) * self.KEY**-0.5
        scores = torch.cat([scores, self.nothing.expand(n, -1, -1)], -1)  # (n, heads, cells + 1)
        looked = scores.softmax(-1)[..., :-1]
        values = (grid.view(n, self.HEADS, self.KEY, cells) @ looked[..., None]).flatten(1)
        looked = looked.view(n, self.HEADS, *self.grid)
        columns, rows = looked.sum(2).flatten(1), looked.sum(3).flatten(1)
        return torch.cat([3 * columns, 3 * rows, values, self.around(grid)], 1), scores[:, 0]


class VisionNet(nn.Module):
    """Images -> features: a stage for each halving until the map is at most 8 pixels high and wide.

    "simple": a strided convolution a stage and one more at the end, the last map flattened. "resnet": residual blocks
    (He et al. 2016) and "efficient": inverted residuals with squeeze and excitation (Tan & Le 2019), averaged over the
    last map.
    """

    STEM, WIDEST = 32, 160

    def __init__(self, shape: Sequence[int], how: str):
        super().__init__()
        channels, height, width = shape
        stages = max(2, math.ceil(math.log2(max(height, width) / 8)))
        widths = [min(self.WIDEST, self.STEM * 2**i) for i in range(stages)]
        layers: list[nn.Module] = []
        block = {"simple": _strided, "resnet": _Residual, "efficient": _Inverted}[how]
        for before, after in zip([channels, *widths], widths):
            layers.append(block(before, after) if layers else _strided(before, after, kernel=7))
        flat = how == "simple"
        if flat:
            layers.append(_strided(widths[-1], widths[-1], stride=1))
        self.layers = nn.Sequential(*layers, *(() if flat else (_Mean(),)), nn.Flatten())
        side = [height, width]
        for _ in range(stages):
            side = [(n + 1) // 2 for n in side]
        self.features = widths[-1] * (side[0] * side[1] if flat else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(centred(x))


def _strided(before: int, after: int, kernel: int = 3, stride: int = 2) -> nn.Sequential:
    conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((-2, -1))


class _Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int = 2):
        super().__init__()
        self.body = nn.Sequential(
            _strided(before, after, stride=stride), nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        )
        self.skip: nn.Module = nn.Identity()
        if (before, stride) != (after, 1):
            self.skip = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


class _Inverted(nn.Module):
    EXPANSION = 4

    def __init__(self, before: int, after: int):
        super().__init__()
        wide = self.EXPANSION * before
        self.expand = nn.Sequential(nn.Conv2d(before, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.SiLU())
        self.depth = nn.Sequential(
            nn.Conv2d(wide, wide, 3, 2, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.SiLU()
        )
        self.squeeze = nn.Sequential(nn.Linear(wide, before), nn.SiLU(), nn.Linear(before, wide), nn.Sigmoid())
        self.reduce = nn.Sequential(nn.Conv2d(wide, after, 1, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        x = self.depth(self.expand(x))
        return self.reduce(x * self.squeeze(x.mean((-2, -1)))[..., None, None])


class VideoNet(nn.Module):
    """Clips (N, frames, 3, h, w) float, or uint8 (N, frames, h, w, 3) -> features. "conv3d": convolutions over time and
    space, averaged. "frames": each frame on its own through a VisionNet, then a convolution over time, averaged.
    "early": all frames as channels of one picture (early fusion, Karpathy et al. 2014), which is fast."""

    def __init__(self, shape: Sequence[int], how: str):
        super().__init__()
        frames, channels, height, width = shape
        self.frames = VisionNet(shape[1:], "resnet") if how == "frames" else None
        self.features = 128
        self.picture = VisionNet((frames * channels, height, width), "simple") if how == "early" else None
        if self.picture is not None:
            self.features = self.picture.features
            return
        if self.frames is not None:
            self.over_time = nn.Sequential(nn.Conv1d(self.frames.features, self.features, 3, 1, 1), nn.ReLU())
            return
        stages = max(2, math.ceil(math.log2(max(height, width) / 8)))
        widths = [min(self.features, 16 * 2**i) for i in range(stages - 1)] + [self.features]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(zip([channels, *widths], widths)):
            stride = (2 if i and frames >= 2 ** (i + 1) else 1, 2, 2)
            layers += [nn.Conv3d(before, after, 3, stride, 1, bias=False), nn.BatchNorm3d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        n, frames = x.shape[:2]
        images = centred(x.flatten(0, 1))
        if self.picture is not None:
            return self.picture(images.reshape(n, -1, *images.shape[-2:]))
        if self.frames is not None:
            return self.over_time(self.frames(images).view(n, frames, -1).transpose(1, 2)).mean(-1)
        return self.layers(images.view(n, frames, *images.shape[1:]).transpose(1, 2)).mean((-3, -2, -1))


class ScanNet(nn.Module):
    """(N, 2, beams): closeness and validity over the full circle -> features. What counts is how near the nearest
    things are, so that is spread out: exp(-range / 0.3 m) and exp(-range / 1 m) go in too."""

    def __init__(self, shape: Sequence[int], range_max_m: float):
        super().__init__()
        self.range_max_m = range_max_m
        if shape[1] < 7:
            raise ValueError(f"SCAN: expected at least 7 beams, got {shape[1]}")
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
    """Convolution over time: (N, rows, channels) -> features."""

    def __init__(self, channels: int, time: int, hidden: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv1d(channels, hidden, 3, 1, 1), nn.ReLU(), nn.Conv1d(hidden, hidden, 3, 2, 1), nn.ReLU(), nn.Flatten()
        )
        self.features = hidden * ((time + 1) // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2))


class AudioNet(nn.Module):
    """Log-mel (N, channels + 1, bands, hops) as mm_edge.preprocess.log_mel makes it, or waveforms (N, channels,
    samples), float within [-1, 1] or int16, from which it is made here -> features. "conv1d": convolution over time.
    "conv2d": over time and frequency, as over a picture. "resnet": residual, too, and averaged over all of it (Tang &
    Lin 2018): of words and sounds, which may come sooner or later, higher or lower."""

    STEM = 24

    def __init__(self, shape: Sequence[int], sample_rate_hz: int, how: str, hidden: int = 48):
        super().__init__()
        self.shape, self.sample_rate_hz = tuple(shape), sample_rate_hz
        if how == "resnet":
            widths = [self.STEM * k for k in (1, 1, 1, 2, 2, 4, 4)]
            blocks = [_Residual(before, after, 1 + (before < after)) for before, after in pairwise(widths)]
            self.features = widths[-1]
            # Means differ little from sound to sound: spikes must hear by how much.
            end = (nn.Dropout2d(0.1), _Mean(), nn.BatchNorm1d(self.features))
            self.conv = nn.Sequential(_strided(shape[0], self.STEM, kernel=5), *blocks, *end)
        elif how == "conv2d":
            picture = VisionNet(shape, "simple")
            self.conv, self.features = picture.layers, picture.features
        else:
            sequence = SequenceNet(shape[0] * shape[1], shape[2], hidden)
            self.conv, self.features = nn.Sequential(nn.Flatten(1, 2), sequence.conv), sequence.features

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 4:
            x = log_mel(x * 32768 if x.is_floating_point() else x, self.shape, self.sample_rate_hz)
        return self.conv(x)


def log_mel(sound: Tensor, shape: Sequence[int], sample_rate_hz: int) -> Tensor:
    """Waveforms (N, channels, samples), in the range of int16, -> log-mel of `shape` (channels + 1, bands, hops) of the
    last samples: what mm_edge.preprocess.log_mel makes of them, not normalised. Raises ValueError."""
    channels, (rows, bands, hops) = sound.shape[1], shape
    hop = round(AUDIO_HOP_S * sample_rate_hz)
    n = (hops - 1) * hop + AUDIO_FRAME
    if sample_rate_hz == 0 or channels != rows - 1:
        raise ValueError(f"expected {rows - 1} channels of sound at {sample_rate_hz} Hz, got {channels}")
    if sound.shape[-1] < n:  # what is not there was silent
        sound = F.pad(sound, (n - sound.shape[-1], 0))
    frames = sound[..., -n:].float().unfold(-1, AUDIO_FRAME, hop)
    window = torch.from_numpy(hann(AUDIO_FRAME)).to(sound.device)
    power = torch.view_as_real(torch.fft.rfft(frames * window)).square().sum(-1)
    mel = power @ torch.from_numpy(mel_bank(sample_rate_hz, AUDIO_FRAME, bands)).to(sound.device)
    log = (mel + 1e-6).log10().transpose(-1, -2)  # (N, channels, bands, hops)
    heard = torch.ones_like(log[:, :1])
    return torch.cat([log.mean(1, keepdim=True), log[:, :-1] - log[:, 1:], heard], 1)


def heard_as(sound: Tensor, spec: StreamSpec) -> Tensor:
    """Waveforms (N, channels, samples), in the range of int16 -> float (N, *spec.shape): what a robot's stream makes of
    them, normalised."""
    mel = log_mel(sound, spec.shape, spec.sample_rate_hz)
    mel[:, 0] = (mel[:, 0] - spec.mean[0]) / spec.std[0]
    return mel


class SensorNet(nn.Module):
    """(N, n) numbers -> features."""

    def __init__(self, n: int, features: int = 64):
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(n, features), nn.ReLU(), nn.Linear(features, features), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class PointsNet(nn.Module):
    """The nearest points (N, n, 4), the last column 1 where there is one -> features: the same layers for every point,
    and of each feature its greatest (Qi et al., PointNet, 2017)."""

    def __init__(self, shape: Sequence[int], features: int = 96):
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(shape[1], 64), nn.ReLU(), nn.Linear(64, features), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return (self.mlp(x) * x[..., 3:]).amax(1)


class TextNet(nn.Module):
    """int64 tokens (N, length), 0 = padding -> features. "bag": of words, whatever their order: commands here are short
    and unambiguous. "sequence": a convolution over them."""

    def __init__(self, words: int, length: int, how: str, hidden: int = 64):
        super().__init__()
        self.embed = nn.Embedding(words + 1, hidden, padding_idx=0)
        self.sequence = SequenceNet(hidden, length, 32) if how == "sequence" else None
        if self.sequence is not None:
            self.features = self.sequence.features
            return
        self.features = hidden
        self.mlp = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        words = self.embed(x)
        return self.mlp(words.sum(1)) if self.sequence is None else self.sequence(words)
