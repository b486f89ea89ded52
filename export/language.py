"""Export a model of pictures and words: an image's graph with its state, a text's, and a decoder of one step with its
cache as inputs. `export.to_onnx` calls it for our own, `export.from_hf` for pretrained ones.
"""

from __future__ import annotations

import io
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export.graph import MAX_ERROR, Session, export_graph, finite
from mm_edge.bundle import Bundle, write_bundle
from mm_edge.engine import golden, load
from mm_edge.engine.decoder import NEVER, Decoder
from mm_edge.engine.ort import OrtGraph
from mm_edge.engine.part import Fresh, Model, ModelInputs
from mm_edge.errors import EngineError
from mm_edge.manifest import GOLDEN, VOCABULARY
from mm_edge.types import StreamSpec
from training.vision_language import PADDING, Block, VisionLanguageModel

TICKS, GOLDEN_TICKS, GOLDEN_TOKENS = 200, 4, 8


class ImagePart(nn.Module):
    """A frame's step: what the decoder will look at, the embedding, and the state after it."""

    def __init__(self, model: VisionLanguageModel):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, dt: Tensor, v: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        cells, current = self.model.image.look(x)
        seen = self.model.image.remember(cells, current[:, None], (v, h), dt[:, None])
        keys, values = memory(self.model.decoder, seen.cells)
        return seen.embedding, keys, values, *seen.state, finite(*seen.state, seen.embedding)


def memory(blocks: Sequence[Block], cells: Tensor) -> tuple[Tensor, Tensor]:
    """What each layer looks at in cells (1, N, dim): keys (layers, heads, d, N), values (layers, heads, N, d)."""
    pairs = []
    for block in blocks:
        attention = block.cross_attention
        both = attention.key_value(cells)[0].unflatten(-1, (2, attention.heads, -1))  # (N, 2, heads, d)
        pairs.append(both.permute(1, 2, 0, 3))
    keys, values = torch.stack(pairs, 1)
    return keys.transpose(-1, -2), values


class TextPart(nn.Module):
    def __init__(self, model: VisionLanguageModel):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens)


class DecoderPart(nn.Module):
    """One step of the decoder of a `VisionLanguageModel`."""

    def __init__(self, model: VisionLanguageModel):
        super().__init__()
        self.model, self.grid = model, model.image.grid

    def forward(
        self, token: Tensor, place: Tensor, keys: Tensor, values: Tensor, mask: Tensor,
        memory_keys: Tensor, memory_values: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        x, own = self.model.word(token) + self.model.place[place], []
        for i, block in enumerate(self.model.decoder):
            attention = block.self_attention
            normed = attention.norm(x)
            q = attention.query(normed).view(attention.heads, 1, -1)
            k, v = attention.key_value(normed).view(2, attention.heads, -1)
            x = x + attention.out(cached(q, k, v, keys[i], values[i], mask))
            own.append((k, v))
            attention = block.cross_attention
            q = attention.query(attention.norm(x)).view(attention.heads, 1, -1)
            looked = (q @ memory_keys[i] * q.shape[-1] ** -0.5).softmax(-1)  # (heads, 1, N)
            x = x + attention.out((looked @ memory_values[i]).view(1, -1))
            x = x + block.feed_forward(x)
        logits = self.model.to_logits(self.model.norm(x))
        key, value = (torch.stack(those) for those in zip(*own))
        return logits, key, value, looked[:1, 0, :-1].view(1, *self.grid)  # the head that learned where to look


def cached(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of one token (heads, 1, d) to those before it and to itself, k and v (heads, d): (1, heads * d). Of
    queries that share a head's keys there may be several, (heads, n, d)."""
    before, self_score = q @ keys + mask, (q * k[:, None]).sum(-1, keepdim=True)
    share = (torch.cat([before, self_score], -1) * q.shape[-1] ** -0.5).softmax(-1)
    return (share[..., :-1] @ values + share[..., -1:] * v[:, None]).reshape(1, -1)


def export_vision_language(
    model: VisionLanguageModel,
    stream: StreamSpec,
    out: Path,
    *,
    words: Sequence[str],
    tick: dict[str, Any],
    max_gap_ms: float,
    task: str = "vlm",
    training: dict[str, Any] | None = None,
    scores: dict[str, Any] | None = None,
    card: str | None = None,
) -> dict[str, Any]:
    """Write the bundle of a model; what of parity is worth knowing is returned. Raises EngineError if the graphs do not
    do what torch does; then nothing is written."""
    model = model.cpu().eval()
    layers, heads, length = len(model.decoder), model.decoder[0].self_attention.heads, model.length
    d, cells = model.dim // heads, model.image.grid[0] * model.image.grid[1] + 1
    state = {name: torch.zeros(1, units) for name, units in _state(model).items()}
    looked_at = {
        "memory_keys": torch.zeros(layers, heads, d, cells), "memory_values": torch.zeros(layers, heads, cells, d),
    }  # fmt: skip
    cache = {
        "keys": torch.zeros(layers, heads, d, length), "values": torch.zeros(layers, heads, length, d),
        "mask": torch.full((length,), NEVER),
    }  # fmt: skip
    x = torch.zeros(1, *stream.shape, dtype=torch.uint8)
    one, number = torch.ones(1, 1), torch.zeros(1, dtype=torch.int64)
    files = {
        "image.onnx": export_graph(
            ImagePart(model), (x, one, *state.values()), ["x", "dt", "v_in", "h_in"],
            ["embedding", *looked_at, "v_out", "h_out", "ok"],
        ),
        "text.onnx": export_graph(TextPart(model), (number.new_ones(1, length),), ["tokens"], ["embedding"]),
        "decoder.onnx": export_graph(
            DecoderPart(model), (number, number + 1, *cache.values(), *looked_at.values()),
            ["token", "place", *cache, *looked_at], ["logits", "key", "value", "attention"],
        ),
    }  # fmt: skip
    name = stream.name
    begin, end, ask, hidden = (model.special(s) for s in ("begin", "end", "ask", "hidden"))
    manifest = {
        "task": task,
        "streams": [asdict(stream)],
        "tick": tick,
        "max_gap_ms": max_gap_ms,
        "parts": [
            {"name": name, "file": "image.onnx", "stream": name, "uses": {},
             "state": {k: list(v.shape) for k, v in state.items()}},
        ],
        "outputs": {"embedding": {"source": f"{name}.embedding"}},
        "language": {
            "stream": name, "scale": round(min(math.exp(model.log_scale.item()), 100.0), 3),
            "text": {"file": "text.onnx", "length": length, "uses": {}, "begin": [], "end": []},
            "decoder": {
                "file": "decoder.onnx", "length": length, "uses": {k: f"{name}.{k}" for k in looked_at}, "rows": None,
                "end": end, "unsaid": [PADDING, begin, ask, hidden],
                "prompts": {"caption": [str(begin)], "question": [str(begin), "question", str(ask)]},
            },
        },
        "scores": scores or {},
    }  # fmt: skip
    files[VOCABULARY] = json.dumps(list(words)).encode()
    if card:
        files["README.md"] = card.encode()
    frames = pictures(stream)
    report = _parity(model, files, frames)
    text = np.zeros(length, np.int64)
    text[:3] = 1, 2, 3
    said = np.array([begin, *range(1, GOLDEN_TOKENS)])
    write_language(out, {**manifest, "training": {**(training or {}), "parity": report}}, files, frames, text, said)
    return report


def pictures(stream: StreamSpec) -> list[np.ndarray]:
    """What no robot sees, uint8 (h, w, 3): patches of colours, with noise."""
    rng, (height, width, _) = np.random.default_rng(0), stream.shape
    shown = []
    for _ in range(16):
        patches = rng.integers(0, 256, (-(-height // 16), -(-width // 16), 3), np.uint8)
        image = patches.repeat(16, 0).repeat(16, 1)[:height, :width]
        shown.append((image // 2 + rng.integers(0, 128, image.shape, np.uint8)).astype(np.uint8))
    return shown


@contextmanager
def drafted(manifest: dict[str, Any], files: dict[str, bytes]) -> Iterator[tuple[Bundle, Model]]:
    """A bundle, but for its golden trace, as it will run in ONNX Runtime."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_bundle(Path(folder, "draft"), manifest, {**files, GOLDEN: _npz()})
        yield bundle, Model(bundle, lambda part, onnx: OrtGraph(onnx, part.state, "cpu"), "cpu")


def write_language(
    out: Path,
    manifest: dict[str, Any],
    files: dict[str, bytes],
    frames: Sequence[np.ndarray],
    text: np.ndarray | None,
    said: np.ndarray | None,
) -> None:
    """Write a bundle with a language. Its golden trace is what its graphs make of some frames one after the other, of
    `text`, tokens (length,) for the text's graph, and of `said`, tokens that the decoder is fed."""
    with drafted(manifest, files) as (bundle, model):
        ticks, one, zero = [], np.ones(1, np.float32), np.zeros(1, np.float32)
        period_s = bundle.tick.period_ms / 1e3
        for i, frame in enumerate(frames[:GOLDEN_TICKS]):
            fresh = {bundle.streams[0].name: Fresh(frame, period_s * (i + 1), i == 0)}
            inputs = ModelInputs(fresh, one, zero, period_s, i == 0)
            ticks.append((inputs, model.step(inputs).values))
        trace = golden.say(model, bundle, text, said)
        files[GOLDEN] = golden.pack(bundle.streams, ticks, trace)
    write_bundle(out, manifest, files)
    load(Bundle.read(out), "cpu")


@torch.no_grad()
def _parity(model: VisionLanguageModel, files: dict[str, bytes], frames: Sequence[np.ndarray]) -> dict[str, Any]:
    """The whole model in torch against the graphs in ONNX Runtime: frames one after the other with state carried and
    irregular time, texts, and what comes after each token."""
    rng, length = np.random.default_rng(0), model.length
    image, text = Session(files["image.onnx"]), Session(files["text.onnx"])
    graph = OrtGraph(files["decoder.onnx"], (), "cpu")
    decoder = Decoder(graph)
    worst = {"embedding": 0.0, "text": 0.0, "logits": 0.0, "attention": 0.0}
    flips = neurons = 0

    def compare(name: str, got: np.ndarray, want: Tensor) -> None:
        worst[name] = float(np.maximum(worst[name], np.abs(got - want.numpy()).max()))  # of NumPy: it keeps NaN

    for tick in range(TICKS):
        if tick % 67 == 0:
            state, carried = None, {f"{k}_in": np.zeros((1, n), np.float32) for k, n in _state(model).items()}
        frame, dt = frames[tick % len(frames)][None], np.float32([[rng.uniform(0.5, 4) * model.period_s]])
        seen = model.encode_image(torch.from_numpy(frame), state, torch.from_numpy(dt)[None])
        state = seen.state
        out = image(x=frame, dt=dt, **carried)
        carried = {f"{k}_in": out[f"{k}_out"] for k in _state(model)}
        compare("embedding", out["embedding"], seen.embedding)
        # A spike that differs leaves the membrane a threshold apart.
        flips, neurons = flips + int((np.abs(out["v_out"] - state[0].numpy()) > 0.5).sum()), neurons + out["v_out"].size
        if tick % 25:
            continue
        for name in ("memory_keys", "memory_values"):
            graph.inputs[name][...] = out[name]
        tokens = rng.integers(1, model.tokens, (1, length))
        compare("text", text(tokens=tokens)["embedding"], model.encode_text(torch.from_numpy(tokens)))
        short = np.where(np.arange(length) < 5, tokens, PADDING)
        compare("text", text(tokens=short)["embedding"], model.encode_text(torch.from_numpy(short)))
        whole = model.decode(torch.from_numpy(tokens), seen)
        looked = whole.attention[-1][0, 0, :, :-1].unflatten(-1, model.image.grid)
        decoder.reset()
        for at, token in enumerate(tokens[0].tolist()):
            now = decoder.feed(token)
            compare("logits", now["logits"][0], whole.logits[0, at])
            compare("attention", now["attention"][0], looked[at])
    report = {"ticks": TICKS, **{f"max_{k}_error": v for k, v in worst.items()}, "spike_disagreement": flips / neurons}
    scale = max(1.0, float(whole.logits.abs().max()))  # logits are no probabilities
    if not all(error <= MAX_ERROR for error in {**worst, "logits": worst["logits"] / scale}.values()):
        raise EngineError(f"ONNX Runtime does not do what torch does: {report}")
    return report


def _state(model: VisionLanguageModel) -> dict[str, int]:
    return {"v": model.image.lif.units, "h": model.image.units}


def _npz() -> bytes:
    """An empty one."""
    buffer = io.BytesIO()
    np.savez(buffer)
    return buffer.getvalue()
