"""A bundle small enough to compute by hand, made without torch: what tests of bundle, engine, pipeline and nodes run.

With a(dt) = 1 - exp(-dt / TAU), the share by which a leaky integrator moves toward its input in dt:

    text     token' = the greatest token: go 1, stop 2, crash 3
    camera   v' = v + a(dt) (brightness * text - v), brightness 0 to 1; its token is v'
    imu      v' = v + a(dt) (mean acceleration x - v); its token is v'
    fusion   h' = h + a(dt) (camera, imu and text tokens that are present - h); action [h', sum of ages in s]

`Toy` below is the same in numpy. The camera yields NaN if its first value is 255, the fusion if the text is crash.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser

from mm_edge.bundle import Bundle, write_bundle
from mm_edge.engine import golden
from mm_edge.engine.part import Fresh, ModelInputs
from mm_edge.types import StreamSpec

TAU = 0.1

STREAMS = (
    StreamSpec("camera", "image", (8, 8, 3), rate_hz=10, max_age_ms=300),
    StreamSpec("imu", "imu", (4, 7), rate_hz=100, max_age_ms=100, window_ms=40),
    StreamSpec("text", "text", (3,), rate_hz=0, max_age_ms=1000, latched=True, required=True),
)

GRAPHS = {
    "text": """(int64[1,3] x, float[1,1] dt) => (float[1] ok, float[1,1] token)
        <float[1] one = {1.0}, int64[1] axis = {1}>
        { largest = ReduceMax (x, axis)  token = Cast <to = 1> (largest)  ok = Identity (one) }""",
    "camera": """(uint8[1,8,8,3] x, float[1,1] dt, float[1,1] v_in, float[1,1] text)
        => (float[1,1] v_out, float[1] ok, float[1,1] token, float[1,2,2] attention)
        <float minus_tau = {-0.1}, float one = {1.0}, float big = {1e30}, float white = {255.0}, float most = {254.5},
         float zero = {0.0}, int64[1] first = {0}, int64[1] scalar = {1}, int64[2] square = {1, 1},
         int64[1] flat = {-1}, int64[3] axes = {1, 2, 3}, int64[5] blocks = {2, 4, 2, 4, 3},
         int64[3] within = {1, 3, 4}, int64[3] grid = {1, 2, 2}>
        { pixels = Cast <to = 1> (x)
          mean = ReduceMean <keepdims = 0> (pixels, axes)  bright = Div (mean, white)
          row = Reshape (pixels, flat)  red = Gather <axis = 0> (row, first)
          below = Sub (most, red)  root = Sqrt (below)  poison = Mul (root, zero)
          seen = Mul (bright, text)  input = Add (seen, poison)
          t = Div (dt, minus_tau)  leak = Exp (t)  a = Sub (one, leak)
          away = Sub (input, v_in)  move = Mul (a, away)  v = Add (v_in, move)
          v_out = Reshape (v, square)  token = Reshape (v, square)
          size = Abs (v)  finite = Less (size, big)  finite_f = Cast <to = 1> (finite)  ok = Reshape (finite_f, scalar)
          cells = Reshape (pixels, blocks)  sums = ReduceMean <keepdims = 0> (cells, within)  lifted = Add (sums, one)
          total = ReduceSum <keepdims = 1> (lifted)  weights = Div (lifted, total)
          attention = Reshape (weights, grid) }""",
    "imu": """(float[1,4,7] x, float[1,1] dt, float[1,1] v_in) => (float[1,1] v_out, float[1] ok, float[1,1] token)
        <float minus_tau = {-0.1}, float one = {1.0}, float big = {1e30}, int64 first = {0}, int64[1] rows = {1},
         int64[1] scalar = {1}>
        { column = Gather <axis = 2> (x, first)  mean = ReduceMean <keepdims = 1> (column, rows)
          t = Div (dt, minus_tau)  leak = Exp (t)  a = Sub (one, leak)
          away = Sub (mean, v_in)  move = Mul (a, away)  v_out = Add (v_in, move)  token = Identity (v_out)
          size = Abs (v_out)  finite = Less (size, big)  finite_f = Cast <to = 1> (finite)
          ok = Reshape (finite_f, scalar) }""",
    "fusion": """(float[1,1] dt, float[1,3] mask, float[1,3] age, float[1,1] h_in,
                  float[1,1] camera, float[1,1] imu, float[1,1] text)
        => (float[1,1] h_out, float[1] ok, float[1,1,2] action, float[1,3] gates)
        <float minus_tau = {-0.1}, float one = {1.0}, float big = {1e30}, float zero = {0.0}, float most = {2.5},
         int64[1] axis = {1}, int64[3] chunk = {1, 1, 2}, int64[1] scalar = {1}>
        { tokens = Concat <axis = 1> (camera, imu, text)  gates = Mul (tokens, mask)
          total = ReduceSum <keepdims = 1> (gates, axis)  old = ReduceSum <keepdims = 1> (age, axis)
          below = Sub (most, text)  root = Sqrt (below)  poison = Mul (root, zero)  input = Add (total, poison)
          t = Div (dt, minus_tau)  leak = Exp (t)  a = Sub (one, leak)
          away = Sub (input, h_in)  move = Mul (a, away)  h_out = Add (h_in, move)
          both = Concat <axis = 1> (h_out, old)  action = Reshape (both, chunk)
          size = Abs (h_out)  finite = Less (size, big)  finite_f = Cast <to = 1> (finite)
          ok = Reshape (finite_f, scalar) }""",
}


def manifest() -> dict[str, Any]:
    """All of the manifest but what `write_bundle` adds; a new copy at each call, to be changed at will."""
    v, h = {"v": [1, 1]}, {"h": [1, 1]}
    uses = {"camera": "camera.token", "imu": "imu.token", "text": "text.token"}
    return {
        "task": "toy",
        "streams": [{k: list(v) if isinstance(v, tuple) else v for k, v in vars(spec).items()} for spec in STREAMS],
        "tick": {"anchor": "camera", "period_ms": 100, "max_period_ms": 150},
        "max_gap_ms": 2000,
        "parts": [
            {"name": "text", "file": "text.onnx", "stream": "text", "state": {}, "uses": {}},
            {"name": "camera", "file": "camera.onnx", "stream": "camera", "state": v, "uses": {"text": "text.token"}},
            {"name": "imu", "file": "imu.onnx", "stream": "imu", "state": v, "uses": {}},
            {"name": "fusion", "file": "fusion.onnx", "stream": None, "state": h, "uses": uses},
        ],
        "outputs": {
            "action": {
                "source": "fusion.action",
                "names": ["linear_x", "angular_z"],
                "units": ["m/s", "rad/s"],
                "dt_s": 0.1,
                "min": [-1, -2],
                "max": [2, 2],
                "max_rate": [1000, 1000],
            },
            "attention": {"source": "camera.attention", "stream": "camera"},
            "gates": {"source": "fusion.gates"},
        },
        "golden_atol": 1e-5,
        "training": {},
        "scores": {},
    }


def files() -> dict[str, bytes]:
    parts = {f"{name}.onnx": onnx_bytes(name) for name in GRAPHS}
    trace = golden.pack(STREAMS, golden_ticks())
    return {**parts, "vocabulary.json": b'["go", "stop", "crash"]', "golden.npz": trace}


def write_toy_bundle(folder: str | Path) -> Bundle:
    return write_bundle(folder, manifest(), files())


def onnx_bytes(part: str, graph: str = "") -> bytes:
    text = f'<ir_version: 9, opset_import: ["" : 20]> {part} {graph or GRAPHS[part]}'
    return onnx.parser.parse_model(text).SerializeToString()


class Toy:
    """The toy model in numpy, for comparison."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.text = self.camera = self.imu = self.h = 0.0
        self.attention = np.zeros((1, 2, 2), np.float32)

    def step(self, inputs: ModelInputs) -> dict[str, np.ndarray]:
        if inputs.reset:
            self.reset()
        for stream in ("text", "camera", "imu"):
            if stream in inputs.fresh:
                getattr(self, f"_{stream}")(*inputs.fresh[stream])
        tokens = np.array([self.camera, self.imu, self.text]) * inputs.mask
        self.h += share(inputs.dt_s) * (tokens.sum() - self.h)
        return {
            "action": np.array([[[self.h, inputs.age.sum()]]], np.float32),
            "attention": self.attention,
            "gates": np.float32(tokens[None]),
        }

    def _text(self, x: np.ndarray, dt_s: float, reset: bool) -> None:
        self.text = float(x.max())

    def _camera(self, x: np.ndarray, dt_s: float, reset: bool) -> None:
        before = 0.0 if reset else self.camera
        self.camera = before + share(dt_s) * (x.mean() / 255 * self.text - before)
        cells = x.reshape(2, 4, 2, 4, 3).mean(axis=(1, 3, 4)) + 1
        self.attention = np.float32(cells / cells.sum())[None]

    def _imu(self, x: np.ndarray, dt_s: float, reset: bool) -> None:
        before = 0.0 if reset else self.imu
        self.imu = before + share(dt_s) * (x[:, 0].mean() - before)


def share(dt_s: float) -> float:
    return 1 - math.exp(-dt_s / TAU)


def golden_ticks(k: int = 12) -> list[tuple[ModelInputs, dict[str, np.ndarray]]]:
    """Irregular ticks, with streams that come and go and resets, and what the toy makes of them."""
    random, toy, ticks = np.random.default_rng(0), Toy(), []
    for i in range(k):
        dt_s = float(random.uniform(0.02, 0.2))
        data = {
            "camera": random.integers(0, 255, (8, 8, 3), np.uint8),
            "imu": np.float32(random.normal(size=(4, 7))),
            "text": np.array([1 + i % 2, 1, 0]),
        }
        fresh = {name: Fresh(x, dt_s, i == 6) for name, x in data.items() if i == 0 or random.random() < 0.6}
        mask, age = np.float32(random.random(3) < 0.8), np.float32(random.random(3) * 0.1)
        inputs = ModelInputs(fresh, mask, age, dt_s, i == 9)
        ticks.append((inputs, toy.step(inputs)))
    return ticks
