"""Other voices and other microphones: what a few speakers say, as many more would."""

from __future__ import annotations

import numpy as np


def faster(samples: np.ndarray, speed: float) -> np.ndarray:
    """float32 (n,) -> as if played faster, and so higher, or below 1 slower and lower."""
    at = np.arange(0, len(samples) - 1, speed)
    return np.interp(at, np.arange(len(samples)), samples).astype(np.float32)


def another_voice(mel: np.ndarray, rng: np.random.Generator, tract: float, microphone: float) -> np.ndarray:
    """Log-mel (n, 2, bands, hops) as of longer or shorter throats (vocal tract length perturbation by a share of up to
    `tract`, Jaitly & Hinton 2013), by other microphones (`microphone`: how far they are from flat, in the units of the
    log-mel), and with a few bands and hops that say nothing (SpecAugment, Park et al. 2019)."""
    n, _, bands, hops = mel.shape
    level = mel[:, 0]
    at = np.clip(np.arange(bands) * (1 + rng.uniform(-tract, tract, (n, 1))), 0, bands - 1)
    low = np.minimum(at.astype(int), bands - 2)
    share = np.float32(at - low)[..., None]
    row = np.arange(n)[:, None]
    level = level[row, low] * (1 - share) + level[row, low + 1] * share
    tones = rng.normal(0, microphone, (n, 5))
    heard_as = np.stack([np.interp(np.linspace(0, 4, bands), np.arange(5), tone) for tone in tones])
    level += np.float32(heard_as)[..., None]
    mean = level.mean((1, 2))
    for i in range(n):
        band, hop = rng.integers(bands), rng.integers(hops)
        level[i, band : band + rng.integers(8)] = mean[i]
        level[i, :, hop : hop + rng.integers(8)] = mean[i]
    return np.stack([level, mel[:, 1]], 1)
