"""The vocabulary: what goes in (`Sample` of a stream described by `StreamSpec`) and what comes out (`Output`).

Time is integer nanoseconds everywhere (`*_ns`); differences become float seconds (`*_s`) only after subtraction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

NS = 1_000_000_000  # in a second
FITS = ("stretch", "crop")  # how an image becomes one of another shape: squashed, or its middle
KINDS = ("image", "audio", "scan", "points", "imu", "vector", "text")


class Sample(NamedTuple):
    """One reading of one stream.

    `stamp_ns` is when it was captured, `arrival_ns` when this computer had it; both on the robot's clock.
    `data` by kind of stream:
        image   uint8 (height, width, 3), RGB
        audio   `Audio`; the stamp is the time of its first sample
        scan    `Scan`
        points  float32 (n, 3), metres
        imu     float32 (6,): acceleration x y z in m/s^2, angular velocity x y z in rad/s
        vector  float32 (n,)
        text    str
    """

    stream: str
    stamp_ns: int
    arrival_ns: int
    data: Any


class Audio(NamedTuple):
    """A chunk of sound. Samples are numbered since the microphone started: a gap shows as a jump of `first_sample`."""

    samples: np.ndarray  # int16 (n, channels)
    first_sample: int
    sample_rate_hz: int


class Scan(NamedTuple):
    """A planar range scan. `ranges[i]` lies at `angle_min + i * angle_increment` rad, counter-clockwise, 0 = ahead.
    As in REP 117, +inf is "nothing within range_max", -inf "closer than range_min" and NaN "no measurement"."""

    ranges: np.ndarray  # float32 (n,), metres
    angle_min: float
    angle_increment: float
    range_min: float
    range_max: float


@dataclass(frozen=True)
class StreamSpec:
    """What a model expects of a stream; part of a bundle's manifest.

    `shape` is the model's input after preprocessing, without the batch axis. By kind:
        image (h, w, 3); audio (channels + 1, mel bands, hops); scan (2, beams); points (n, 4); imu (n, 7);
        vector (n,); text (tokens,). See preprocess.py.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rate_hz: float
    max_age_ms: float
    window_ms: float = 0.0  # audio and imu: how much of the past the model sees
    latched: bool = False  # a command in force until the next one: never goes stale
    required: bool = False  # without it the robot does not act
    # From here on a sensor is lying, or late; 0: not checked.
    frozen_ms: float = 0.0  # the same data for so long, though their stamps go on
    max_latency_ms: float = 0.0  # from capture to arrival: beyond it the link is slow, or its clock is wrong
    max_jitter_ms: float = 0.0  # between the least and the greatest latency of six samples
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    sample_rate_hz: int = 0  # audio
    channels: int = 0  # audio
    range_max_m: float = 0.0  # scan, points
    frame: str = ""  # mounting frame the model was trained with
    fov_deg: float = 0.0  # horizontal field of view the model was trained with
    fit: str = "stretch"  # image: one of FITS
    joints: tuple[str, ...] = ()  # vector: names, by which a message about joints is put in order; empty: as it comes

    @property
    def dtype(self) -> str:
        """Of the model's input."""
        return {"image": "uint8", "text": "int64"}.get(self.kind, "float32")


@dataclass(frozen=True)
class Action:
    """What to do. `values` float32 (horizon, dims), row k meant for `dt_s * k` after the output's stamp."""

    names: tuple[str, ...]
    values: np.ndarray
    dt_s: float


@dataclass(frozen=True)
class Attention:
    """Where the model looked: `weights` float32 (rows, cols), summing to 1, over the whole image of `stream`."""

    stream: str
    stamp_ns: int
    weights: np.ndarray


@dataclass(frozen=True)
class Caption:
    text: str
    score: float


@dataclass(frozen=True)
class Event:
    label: str
    score: float
    start_ns: int


@dataclass(frozen=True)
class Output:
    """What a tick yields: always sources, mask and ages; then an action, or the reasons why there is none.

    `reasons` name what kept the model from acting; `notes` name what is wrong but did not (a masked sensor, a reset).
    """

    stamp_ns: int
    sources: dict[str, int]  # stream -> stamp_ns of the sample used; absent if none was ever seen
    mask: dict[str, bool]  # stream -> present and fresh
    ages_s: dict[str, float]  # stream -> age, inf if never seen
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    action: Action | None = None
    attention: tuple[Attention, ...] = ()
    caption: Caption | None = None
    events: tuple[Event, ...] = ()
    gates: dict[str, float] = field(default_factory=dict)  # stream -> weight the fusion gave it
    values: dict[str, float] = field(default_factory=dict)  # class -> probability, or the numbers that it predicts
