"""Samples of the tasks on real data, made the same way each time.

draw = pair_digits(images, labels, clips, rng)      # written and spoken digits, both in noise
noisy = add_noise(samples, 0.0, rng)
speed_and_yaw_rate = motion(segment, at_s)          # what a car did
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from mm_edge.errors import EdgeError
from training.real_data import DigitClip, Segment
from training.recipe import Recipe

DIGIT_SAMPLES = 6000  # 0.75 s at 8 kHz
YAW_S = 0.1  # a yaw rate is the mean of the gyro's readings of so long


class DigitDraw(NamedTuple):
    images: np.ndarray  # float32 (n, 28, 28)
    sounds: np.ndarray  # float32 (n, 6000), 8 kHz
    labels: np.ndarray  # int64 (n,)
    clips: np.ndarray  # int64 (n,): which of the clips is heard


def add_noise(samples: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """samples (..., n) -> float32 of that shape plus white noise, not clipped. The power of the signal is its mean
    square over the n samples, each row by itself; silence of all zeros stays as it is."""
    samples = np.asarray(samples, np.float32)
    return samples + noise(samples.shape, power(samples), snr_db, rng)


def power(samples: np.ndarray) -> np.ndarray:
    """(..., n) -> (..., 1): each row's mean square."""
    return np.mean(np.square(samples, dtype=np.float64), -1, keepdims=True)


def noise(shape: tuple[int, ...], below: np.ndarray | float, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """float32 of that shape: white, so much below a power."""
    return rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(below / 10 ** (snr_db / 10)))


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
    return DigitDraw(images, sounds, labels, chosen)


def learned_from(recipe: Recipe, names: Iterable[str]) -> list[str]:
    """Those that data.held_out does not name. Raises ValueError if that is no list, leaves none, or has a name that is
    nearly another; of one that is not there, as of the recipe in another folder, it tells."""
    held_out, names = recipe.data["held_out"], list(names)
    if not isinstance(held_out, list):
        raise ValueError(f"data.held_out: expected a list, as in [{held_out}], got {held_out!r}")
    held_out = list(map(str, held_out))
    for name in held_out:
        # 4 is no slip of the pen for 14: another folder has other folds.
        if name not in names and not name.isdigit() and (close := difflib.get_close_matches(name, names, 1)):
            raise ValueError(f"data.held_out: there is no {name}; did you mean {close[0]}?")
    if unknown := set(held_out) - set(names):
        print(
            f"data.held_out: there is no {', '.join(sorted(unknown))} among {', '.join(sorted(names))}", file=sys.stderr
        )
    learned = [name for name in names if name not in held_out]
    if not learned:
        raise ValueError(f"data.held_out: {sorted(held_out)} leaves nothing to learn from")
    return learned


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
