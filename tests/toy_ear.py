"""A bundle with one ear, small enough to compute by hand: a high tone says "stop", a low one "go".

With the level of a band as log10 of its power (about -2 for hiss, 3 for a tone):

    audio    token = greatest level in the low and in the high bands, over the last 100 ms
    fusion   values = softmax(4 (mask (level + 6) - 7) for go and stop, 0 for quiet)
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from toy_bundle import onnx_bytes

from mm_edge import preprocess
from mm_edge.bundle import Bundle, write_bundle
from mm_edge.engine import golden
from mm_edge.engine.part import Fresh, ModelInputs
from mm_edge.types import StreamSpec

RATE_HZ = 16000
GO_HZ, STOP_HZ = 500.0, 5500.0
NAMES = ("go", "stop", "quiet")
SPEC = StreamSpec(
    "audio", "audio", (2, 16, 24), rate_hz=50, max_age_ms=300, window_ms=500, sample_rate_hz=RATE_HZ, channels=1
)
LOW, HIGH = slice(2, 6), slice(12, 16)

GRAPHS = {
    "audio": """(float[1,2,16,24] x, float[1,1] dt) => (float[1] ok, float[1,2] token)
        <float[1] one = {1.0}, int64[3] low0 = {0, 2, 19}, int64[3] low1 = {1, 6, 24}, int64[3] high0 = {0, 12, 19},
         int64[3] high1 = {1, 16, 24}, int64[3] axes = {1, 2, 3}, int64[2] square = {1, 1}>
        { l = Slice (x, low0, low1, axes)  lm = ReduceMax <keepdims = 0> (l, axes)  lr = Reshape (lm, square)
          h = Slice (x, high0, high1, axes)  hm = ReduceMax <keepdims = 0> (h, axes)  hr = Reshape (hm, square)
          token = Concat <axis = 1> (lr, hr)  ok = Identity (one) }""",
    "fusion": """(float[1,1] dt, float[1,1] mask, float[1,1] age, float[1,2] audio) => (float[1] ok, float[1,3] values)
        <float[1] one = {1.0}, float six = {6.0}, float seven = {7.0}, float four = {4.0}, float[1,1] zero = {0.0}>
        { above = Add (audio, six)  there = Mul (above, mask)  over = Sub (there, seven)  loud = Mul (over, four)
          logits = Concat <axis = 1> (loud, zero)  values = Softmax <axis = 1> (logits)  ok = Identity (one) }""",
}


def write_toy_ear(folder: str | Path, sure: float = 0.8, ticks: int = 2) -> Bundle:
    stream = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(SPEC).items()}
    events = {"quiet": ["quiet"], "sure": sure, "ticks": ticks}
    manifest = {
        "task": "toy ear",
        "streams": [stream],
        "tick": {"anchor": "audio", "period_ms": 100, "max_period_ms": 150, "min_period_ms": 90},
        "max_gap_ms": 2000,
        "parts": [
            {"name": "audio", "file": "audio.onnx", "stream": "audio", "state": {}, "uses": {}},
            {"name": "fusion", "file": "fusion.onnx", "stream": None, "state": {}, "uses": {"audio": "audio.token"}},
        ],
        "outputs": {"values": {"source": "fusion.values", "names": list(NAMES), "events": events}},
        "golden_atol": 1e-4,
        "training": {},
        "scores": {},
    }
    files = {f"{name}.onnx": onnx_bytes(name, graph) for name, graph in GRAPHS.items()}
    return write_bundle(folder, manifest, {**files, "golden.npz": golden.pack((SPEC,), _golden())})


def tone(hz: float, seconds: float, loud: float = 0.3) -> np.ndarray:
    """int16 (n,)"""
    return np.int16(32767 * loud * np.sin(2 * math.pi * hz * np.arange(round(seconds * RATE_HZ)) / RATE_HZ))


def _golden() -> list[tuple[ModelInputs, dict[str, Any]]]:
    ticks, one = [], np.ones(1, np.float32)
    for i, hz in enumerate((GO_HZ, STOP_HZ, GO_HZ)):
        x = preprocess.log_mel(tone(hz, 0.5, 0.1 * (i + 1))[:, None], None, SPEC)
        level = np.array([x[0, LOW, 19:].max(), x[0, HIGH, 19:].max(), np.nan])
        logits = np.where(np.isnan(level), 0.0, 4 * (level + 6 - 7))
        shares = np.exp(logits - logits.max())
        inputs = ModelInputs({"audio": Fresh(x, 0.1, i == 0)}, one, np.zeros(1, np.float32), 0.1, i == 0)
        ticks.append((inputs, {"values": np.float32(shares / shares.sum())[None]}))
    return ticks
