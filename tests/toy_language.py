"""A bundle with words that is small enough to know by heart, made without torch: it says "a red ball" of a picture with
more red than blue, and else "a blue ball"; to each question it says "yes" if there is more red, and else "no".

    camera    seen = (red, blue), the picture's mean, 0 to 1; embedding: seen, of length 1; attention: brightness
    text      embedding: how often it says red and blue, of length 1
    decoder   after each word the one that follows in FOLLOWS, of two the one that fits better what is seen; NaN if
              there is more red than 0.9
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from mm_edge.bundle import Bundle, write_bundle
from mm_edge.engine import golden
from mm_edge.engine.ort import OrtGraph
from mm_edge.engine.part import Fresh, Model, ModelInputs
from tests.toy_bundle import onnx_bytes

WORDS = ("a", "red", "blue", "ball", "is", "it", "yes", "no")
BEGIN, END, ASK = 9, 10, 11
LENGTH = 12
RED, BLUE = (np.full((8, 8, 3), rgb, np.uint8) for rgb in ((204, 0, 51), (51, 0, 204)))
FOLLOWS = {BEGIN: "a", 1: "red blue", 2: "ball", 3: "ball", 4: "", 7: "", 8: "", ASK: "yes no"}


def _table() -> str:
    rows = np.zeros((12, 12), int)
    for token, words in FOLLOWS.items():
        rows[token, [WORDS.index(word) + 1 for word in words.split()] or [END]] = 20
    return ", ".join(map(str, rows.flatten()))


GRAPHS = {
    "camera": """(uint8[1,8,8,3] x, float[1,1] dt)
        => (float[1] ok, float[1,2] seen, float[1,2] embedding, float[1,2,2] attention)
        <float[1] one = {1.0}, float white = {255.0}, int64[2] axes = {1, 2}, int64[1] axis = {1},
         int64[2] channels = {0, 2}, int64[5] blocks = {2, 4, 2, 4, 3}, int64[3] within = {1, 3, 4},
         int64[3] grid = {1, 2, 2}>
        { pixels = Cast <to = 1> (x)  mean = ReduceMean <keepdims = 0> (pixels, axes)  bright = Div (mean, white)
          seen = Gather <axis = 1> (bright, channels)  length = ReduceL2 <keepdims = 1> (seen, axis)
          embedding = Div (seen, length)  ok = Identity (one)
          cells = Reshape (pixels, blocks)  sums = ReduceMean <keepdims = 0> (cells, within)  lifted = Add (sums, one)
          total = ReduceSum <keepdims = 1> (lifted)  weights = Div (lifted, total)
          attention = Reshape (weights, grid) }""",
    "text": """(int64[1,12] tokens) => (float[1,2] embedding)
        <int64 red = {2}, int64 blue = {3}, int64[1] axis = {1}, float little = {0.001}>
        { is_red = Equal (tokens, red)  is_blue = Equal (tokens, blue)
          reds = Cast <to = 1> (is_red)  blues = Cast <to = 1> (is_blue)
          n_red = ReduceSum <keepdims = 1> (reds, axis)  n_blue = ReduceSum <keepdims = 1> (blues, axis)
          counts = Concat <axis = 1> (n_red, n_blue)  more = Add (counts, little)
          length = ReduceL2 <keepdims = 1> (more, axis)  embedding = Div (more, length) }""",
    "decoder": f"""(int64[1] token, int64[1] place, float[1,1,1,12] keys, float[1,1,12,1] values, float[12] mask,
                    float[1,2] seen, float[1,2,2] looked)
        => (float[1,12] logits, float[1,1,1] key, float[1,1,1] value, float[1,2,2] attention)
        <float[12,12] table = {{{_table()}}}, float[1,1,1] nothing = {{0.0}},
         float most = {{0.9}}, float zero = {{0.0}}, int64[1] first = {{0}},
         float[2,12] fits = {{0, 0, 10, 0, 0, 0, 0, 10, 0, 0, 0, 0,  0, 0, 0, 10, 0, 0, 0, 0, 10, 0, 0, 0}}>
        {{ follows = Gather <axis = 0> (table, token)  choice = MatMul (seen, fits)  sum = Add (follows, choice)
           red = Gather <axis = 1> (seen, first)  left = Sub (most, red)  root = Sqrt (left)
           poison = Mul (root, zero)  logits = Add (sum, poison)
           key = Identity (nothing)  value = Identity (nothing)  attention = Identity (looked) }}""",
}


def write_toy_language(folder: Path, embedding: bool = True) -> Bundle:
    """`embedding`: with the embeddings of pictures and texts."""
    files = {f"{name}.onnx": onnx_bytes(name, graph) for name, graph in GRAPHS.items() if embedding or name != "text"}
    files["vocabulary.json"] = json.dumps(WORDS).encode()
    text = {"file": "text.onnx", "length": LENGTH, "uses": {}, "begin": [], "end": []}
    manifest: dict[str, Any] = {
        "task": "toy",
        "streams": [{"name": "camera", "kind": "image", "shape": [8, 8, 3], "rate_hz": 10, "max_age_ms": 300}],
        "tick": {"anchor": "camera", "period_ms": 100, "max_period_ms": 150},
        "max_gap_ms": 2000,
        "parts": [{"name": "camera", "file": "camera.onnx", "stream": "camera", "state": {}, "uses": {}}],
        "outputs": {"embedding": {"source": "camera.embedding"}} if embedding else {},
        "language": {
            "stream": "camera",
            "scale": 10.0,
            "text": text if embedding else None,
            "decoder": {
                "file": "decoder.onnx",
                "length": LENGTH,
                "uses": {"seen": "camera.seen", "looked": "camera.attention"},
                "rows": None,
                "end": END,
                "unsaid": [],
                "prompts": {"caption": [str(BEGIN)], "question": [str(BEGIN), "question", str(ASK)]},
            },
        },
        "training": {},
        "scores": {},
    }
    with tempfile.TemporaryDirectory() as draft:  # its golden trace is what its graphs give
        with_none = {**files, "golden.npz": golden.pack((), [(_inputs(RED), {})])}
        bundle = write_bundle(Path(draft, "toy"), manifest, with_none)
    model = Model(bundle, lambda part, onnx: OrtGraph(onnx, part.state, "cpu"), "cpu")
    ticks = [(inputs, model.step(inputs).values) for inputs in map(_inputs, (RED, BLUE))]
    asked = np.array([2, 4] + [0] * (LENGTH - 2)) if embedding else None
    said = golden.say(model, bundle, asked, np.array([BEGIN, 1, 3, 4]))
    return write_bundle(folder, manifest, {**files, "golden.npz": golden.pack(bundle.streams, ticks, said)})


def _inputs(picture: np.ndarray) -> ModelInputs:
    fresh = {"camera": Fresh(picture, 0.1, False)}
    return ModelInputs(fresh, np.ones(1, np.float32), np.zeros(1, np.float32), 0.1, False)
