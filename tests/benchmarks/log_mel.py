"""What the log-mel of one more 20 ms hop costs, in us, as the words model hears it, beside librosa for the same hop.

`ours` makes the whole window, of which one hop is new. `librosa` makes that hop alone, as its users would; `basis` by
librosa's spectrum and a bank of filters that is made once. All take turns; `equal_to` is the greatest
difference.

    OMP_NUM_THREADS=1 .venv/bin/python -m tests.benchmarks.log_mel --json
"""

from __future__ import annotations

import argparse
import json
import time

import librosa
import numpy as np

from mm_edge.align import View
from mm_edge.preprocess import AUDIO_FRAME, LogMel
from mm_edge.types import StreamSpec

RATE_HZ, HOP, BANDS, HOPS, BLOCK = 16000, 320, 40, 49, 50
SPEC = StreamSpec("audio", "audio", (2, BANDS, HOPS), 50, 500, window_ms=1000, sample_rate_hz=RATE_HZ, channels=1)
STFT = {"n_fft": AUDIO_FRAME, "hop_length": HOP, "window": np.hanning(AUDIO_FRAME), "center": False}
MEL = {"n_mels": BANDS, "fmin": 100.0, "fmax": 0.475 * RATE_HZ, "htk": True, "norm": None}
BASIS = librosa.filters.mel(sr=RATE_HZ, n_fft=AUDIO_FRAME, **MEL)


def by_librosa(frame: np.ndarray) -> np.ndarray:
    return np.log10(librosa.feature.melspectrogram(y=frame, sr=RATE_HZ, **STFT, **MEL) + 1e-6)


def by_basis(frame: np.ndarray) -> np.ndarray:
    return np.log10(BASIS @ np.abs(librosa.stft(frame, **STFT)) ** 2 + 1e-6)


def measure(hops: int) -> dict[str, float]:
    sound = np.random.default_rng(0).integers(-9000, 9000, ((hops + 60) * HOP, 1), np.int16)
    floats, valid, ear = sound[:, 0] / np.float32(32768), np.ones(RATE_HZ, bool), LogMel(SPEC)
    us: dict[str, list[float]] = {"ours": [], "librosa": [], "basis": []}  # of each block, of one hop
    differs = 0.0
    for first in range(0, hops, BLOCK):
        ends = [RATE_HZ + i * HOP for i in range(first, first + BLOCK)]
        views = [View(sound[e - RATE_HZ : e], valid, 1, 0.0, 0.0, True, True, 0.02, False, 0.0, e) for e in ends]
        frames = [floats[e - AUDIO_FRAME : e] for e in ends]
        made = {}
        for name, make, given in (("ours", ear, views), ("librosa", by_librosa, frames), ("basis", by_basis, frames)):
            begun_ns = time.perf_counter_ns()
            made[name] = [make(one) for one in given]
            us[name].append((time.perf_counter_ns() - begun_ns) / 1e3 / BLOCK)
        ours = np.stack([x[0, :, -1:] for x in made["ours"]])
        differs = max(differs, *(float(np.abs(ours - np.stack(made[name])).max()) for name in ("librosa", "basis")))
    median = {name: float(np.median(values[1:])) for name, values in us.items()}
    return {
        **{f"{name}_us": round(value, 1) for name, value in median.items()},
        "faster_than_librosa": round(median["librosa"] / median["ours"], 1),
        "faster_than_basis": round(median["basis"] / median["ours"], 1),
        "equal_to": differs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hops", type=int, default=3000, help="how many (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a line")
    args = parser.parse_args()
    result = measure(args.hops)
    if args.json:
        print(json.dumps(result))
        return
    print("{ours_us} us; librosa {librosa_us} us: {faster_than_librosa} x; equal to {equal_to:.1e}".format(**result))


if __name__ == "__main__":
    main()
