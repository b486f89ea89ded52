"""Samples of the tasks on real data, made the same way each time: what goes in, what is asked, what to be better than.

    draw = pair_digits(images, labels, clips, rng)      # written and spoken digits, both in noise
    noisy = add_noise(samples, 0.0, rng)                # words and sounds
    windows = lidar_velocity_windows(log)               # the last second of scans -> velocity
    windows = imu_can_windows(segment)                  # the last second of IMU and CAN -> speed, yaw rate 1 s ahead

Rows of irregular time lie at the end of their axis, the newest last; `valid` says which there are, `dt_s` how long
after the row before each came (the first: after the start of the window, or the row before if that is in it).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mm_edge.errors import EdgeError
from training.real_data import DigitClip, LaserLog, Segment

DIGIT_SAMPLES = 6000  # 0.75 s at 8 kHz
YAW_S = 0.1  # a yaw rate is the mean of the gyro's readings of so long


class DigitDraw(NamedTuple):
    images: np.ndarray  # float32 (n, 28, 28)
    sounds: np.ndarray  # float32 (n, 6000), 8 kHz
    labels: np.ndarray  # int64 (n,)


class Rows(NamedTuple):
    x: np.ndarray  # float32 (n, rows, d), 0 where not valid
    dt_s: np.ndarray  # float32 (n, rows), 0 where not valid
    valid: np.ndarray  # bool (n, rows)


class VelocityWindows(NamedTuple):
    scans: Rows  # metres
    target: np.ndarray  # float32 (n, 2) m/s forward, rad/s to the left, at the newest scan
    previous: np.ndarray  # float32 (n, 2) the same one scan before: the last known velocity
    stamps_s: np.ndarray  # float64 (n,) of the newest scan


class DrivingWindows(NamedTuple):
    streams: dict[str, Rows]  # accel (d=3), gyro (3), speed (1), steering (1); units as in Segment
    target: np.ndarray  # float32 (n, 2) m/s, rad/s to the left, horizon_s after the window's end
    present: np.ndarray  # float32 (n, 2) the same at the window's end
    ends_s: np.ndarray  # float64 (n,)


def add_noise(samples: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """samples (..., n) -> float32 of that shape plus white noise, not clipped. The power of the signal is its mean
    square over the n samples, each row by itself; silence of all zeros stays as it is."""
    samples = np.asarray(samples, np.float32)
    power = np.mean(np.square(samples, dtype=np.float64), -1, keepdims=True)
    return samples + rng.standard_normal(samples.shape, np.float32) * np.float32(np.sqrt(power / 10 ** (snr_db / 10)))


def pair_digits(
    digits_images: np.ndarray,
    labels: np.ndarray,
    clips: Sequence[DigitClip],
    rng: np.random.Generator,
    image_noise: float = 1.2,
    snr_db: float = 0.0,
) -> DigitDraw:
    """uint8 images (n, 28, 28) and labels (n,), each with a random clip of its digit, both in noise.

    Image: pixels / 255 plus Gaussian noise of standard deviation `image_noise`. Sound: the clip cut or padded with
    zeros to 0.75 s, plus white noise of `snr_db` below the mean square of all that.
    EdgeError: lengths that differ, a clip not at 8 kHz, a digit that no clip says.
    """
    labels = np.asarray(labels, np.int64)
    if len(digits_images) != len(labels):
        raise EdgeError(f"digits: expected a label for each of {len(digits_images)} images, got {len(labels)}")
    rates = {clip.sample_rate_hz for clip in clips}
    if rates - {8000}:
        raise EdgeError(f"digits: expected clips at 8000 Hz, got {sorted(rates)}")
    chosen = np.zeros(len(labels), np.int64)
    for digit in np.unique(labels):
        spoken = [i for i, clip in enumerate(clips) if clip.digit == digit]
        if not spoken:
            raise EdgeError(f"digits: expected a clip of each digit, got none of {digit} among {len(clips)}")
        here = labels == digit
        chosen[here] = rng.choice(spoken, int(here.sum()))
    sounds = np.zeros((len(labels), DIGIT_SAMPLES), np.float32)
    for i, clip in enumerate(chosen.tolist()):
        kept = clips[clip].samples[:DIGIT_SAMPLES]
        sounds[i, : len(kept)] = kept
    sounds = add_noise(sounds, snr_db, rng)
    images = np.float32(digits_images) / np.float32(255)
    images += np.float32(image_noise) * rng.standard_normal(images.shape, np.float32)
    return DigitDraw(images, sounds, labels)


def lidar_velocity_windows(log: LaserLog, scans: int = 8, window_s: float = 1.0) -> VelocityWindows:
    """A window at each scan whose velocity, and that of the scan before, is known: the newest `scans` scans of
    `window_s`. Scans whose stamps do not rise are left out. More than 8 scans come in 4 % of Intel's seconds and in
    0.1 % of aces'; half of them hold 5 and 6 or less.

    The velocity is a difference over the last 0.5 to 1 s (`real_data.odometry_velocity`), so that `previous` shares
    most of it: the last known velocity is hard to beat.
    """
    stamps_s, ranges = log.stamps_s[log.rising], log.ranges[log.rising]
    velocity = np.stack([log.linear_mps, log.angular_radps], -1)[log.rising]
    known = np.isfinite(velocity).all(-1)
    at = np.flatnonzero(known[1:] & known[:-1]) + 1
    rows = _rows(stamps_s, ranges, stamps_s[at], window_s, scans)
    return VelocityWindows(rows, np.float32(velocity[at]), np.float32(velocity[at - 1]), stamps_s[at])


def imu_can_windows(
    segment: Segment, horizon_s: float = 1.0, window_s: float = 1.0, step_s: float = 0.1, rows: int = 128
) -> DrivingWindows:
    """A window every `step_s`: the newest `rows` samples of `window_s` of each stream. 128 hold a second of each (IMU
    104 Hz, CAN 83 Hz). Speed is the newest of CAN; yaw rate, to the left, the mean of the last 0.1 s of the gyro.
    Windows whose speed or yaw rate is not known, for want of a sample in those 0.1 s, are left out."""
    streams = {name: getattr(segment, name) for name in ("accel", "gyro", "speed", "steering")}
    start_s = max(series.stamps_s[0] for series in streams.values()) + window_s
    last_s = min(segment.speed.stamps_s[-1], segment.gyro.stamps_s[-1]) - horizon_s
    ends_s = start_s + step_s * np.arange(max(int((last_s - start_s) / step_s) + 1, 0))
    present, target = motion(segment, ends_s), motion(segment, ends_s + horizon_s)
    known = np.isfinite(present).all(-1) & np.isfinite(target).all(-1)
    present, target, ends_s = present[known], target[known], ends_s[known]
    windows = {k: _rows(series.stamps_s, series.values, ends_s, window_s, rows) for k, series in streams.items()}
    return DrivingWindows(windows, np.float32(target), np.float32(present), ends_s)


def motion(segment: Segment, at_s: np.ndarray) -> np.ndarray:
    """Speed and yaw rate (n, 2) of what was measured until `at_s` (n,); NaN where that is older than YAW_S."""
    t, speed = segment.speed
    newest = np.searchsorted(t, at_s, side="right") - 1
    speed_mps = np.where((newest >= 0) & (at_s - t[newest] <= YAW_S), speed[newest, 0], np.nan)
    t, gyro = segment.gyro
    first, end = (np.searchsorted(t, edge_s, side="right") for edge_s in (at_s - YAW_S, at_s))
    total = np.concatenate([[0.0], np.cumsum(-gyro[:, 2])])  # z is down, so that it turns to the right
    count = np.where(end > first, end - first, np.nan)
    return np.stack([speed_mps, (total[end] - total[first]) / count], -1)


def _rows(stamps_s: np.ndarray, values: np.ndarray, ends_s: np.ndarray, window_s: float, rows: int) -> Rows:
    """Of rising stamps (m,) and values (m, d) the newest `rows` in (end - window_s, end], for each of ends_s (n,)."""
    index = np.searchsorted(stamps_s, ends_s, side="right")[:, None] + np.arange(-rows, 0)
    starts_s = ends_s[:, None] - window_s
    at_s = np.where(index >= 0, stamps_s[index.clip(0)], -np.inf)
    before_s = np.where(index >= 1, stamps_s[(index - 1).clip(0)], -np.inf)
    valid = at_s > starts_s
    dt_s = np.where(valid, at_s - np.maximum(before_s, starts_s), 0)
    x = np.where(valid[..., None], values[index.clip(0)], 0)
    return Rows(np.float32(x), np.float32(dt_s), valid)
