"""Export a pretrained model of transformers to a bundle.

    python -m export.from_hf openai/clip-vit-base-patch32 bundles/clip           # a name on the hub, or a folder
    python -m export.from_hf models/blip bundles/blip --lora adapters/mine       # with an adapter merged into it

CLIP compares, BLIP captions or answers questions, Idefics3 and SmolVLM do both, after examples if there are. The graphs
must do what transformers does, with random pictures and tokens, or nothing is written.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.graph import MAX_ERROR, export_graph, finite
from export.language import cached, drafted, pictures, write_language
from mm_edge.bundle import LARGEST
from mm_edge.engine.decoder import NEVER, Decoder
from mm_edge.engine.golden import held
from mm_edge.errors import EdgeError, EngineError
from mm_edge.language import Language
from mm_edge.manifest import TOKENIZER
from training.pretrained import CAPTION_QUESTION, IMAGE, Pixels, Pretrained, merged, read_pretrained

CAPTION_ROOM, CHAT_ROOM = 128, 1024  # tokens of a prompt and what is said: the cache's size
QUESTION_TOKENS = 40  # of BLIP's; what is behind them is computed, too, each time
PICTURES, SAID = 3, 12  # that are compared
GREEDY = {"max_new_tokens": SAID, "do_sample": False, "num_beams": 1}
GOLDEN_TOKENS = 4  # after a prompt


class Made(NamedTuple):
    """What becomes of a model."""

    graphs: dict[str, bytes]
    manifest: dict[str, Any]  # outputs and language
    check: Callable[[Language, Sequence[np.ndarray], Parity], None]
    text: np.ndarray | None  # tokens for the golden trace
    said: np.ndarray | None


@dataclass
class Parity:
    """The largest difference between the graphs and transformers, as a share of the largest value above 1."""

    errors: dict[str, float] = field(default_factory=dict)

    def compare(self, name: str, got: np.ndarray, want: Tensor) -> None:
        off = float(np.abs(got - want.numpy()).max() / max(1.0, float(want.abs().max())))
        self.errors[name] = off if math.isnan(off) else max(self.errors.get(name, 0.0), off)


class ClipImage(nn.Module):
    def __init__(self, clip: Any, pixels: Pixels):
        super().__init__()
        self.vision, self.projection, self.pixels = clip.vision_model, clip.visual_projection, pixels

    def forward(self, x: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        embedding = F.normalize(self.projection(self.vision(pixel_values=self.pixels(x)).pooler_output), dim=-1)
        return embedding, finite(embedding, dt)


class ClipText(nn.Module):
    def __init__(self, clip: Any):
        super().__init__()
        self.text, self.projection = clip.text_model, clip.text_projection

    def forward(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.projection(self.text(input_ids=tokens).pooler_output), dim=-1)


class BlipImage(nn.Module):
    """For a decoder that looks at the image, what it looks at; or the cells for a question's encoder."""

    def __init__(self, vision: Any, pixels: Pixels, decoder: Any = None):
        super().__init__()
        self.vision, self.pixels = vision, pixels
        self.looks = None if decoder is None else looks(decoder)

    def forward(self, x: Tensor, dt: Tensor) -> tuple[Tensor, ...]:
        cells = self.vision(pixel_values=self.pixels(x)).last_hidden_state
        return *((cells,) if self.looks is None else memory(self.looks, cells)), finite(cells, dt)


def looks(decoder: Any) -> nn.ModuleList:
    """The cross attention of each layer of a BLIP's decoder."""
    return nn.ModuleList(layer.crossattention.self for layer in decoder.bert.encoder.layer)


def memory(attentions: Sequence[Any], cells: Tensor) -> tuple[Tensor, Tensor]:
    """As `export.language.memory`, of cells (1, N, dim)."""
    keys = torch.stack([a.key(cells)[0].unflatten(-1, (a.num_attention_heads, -1)) for a in attentions])
    values = torch.stack([a.value(cells)[0].unflatten(-1, (a.num_attention_heads, -1)) for a in attentions])
    return keys.permute(0, 2, 3, 1), values.permute(0, 2, 1, 3)


class BlipQuestion(nn.Module):
    """A question, read with the image in sight: what the decoder looks at, and where the question's words looked."""

    def __init__(self, blip: Any):
        super().__init__()
        self.encoder, self.looks = blip.text_encoder, looks(blip.text_decoder)
        self.side = grid(blip)

    def forward(self, tokens: Tensor, cells: Tensor) -> tuple[Tensor, ...]:
        there = (tokens != 0).float()
        mask = (1 - there) * NEVER
        x = self.encoder.embeddings(tokens)
        for layer in self.encoder.encoder.layer:
            x, _ = layer.attention(x, attention_mask=mask)
            x, looked = layer.crossattention(x, encoder_hidden_states=cells)
            x = layer.feed_forward_chunk(x)
        looked = (looked.mean(1)[0, :, 1:] * there[0, :, None]).sum(0) / there.sum()
        return *memory(self.looks, x), mask[0], looked.view(1, self.side, self.side)


def grid(blip: Any) -> int:
    """Rows and columns of an image's patches; a class's token comes before them."""
    return blip.config.vision_config.image_size // blip.config.vision_config.patch_size


class BlipDecoder(nn.Module):
    """One step. `rest`: of a question the mask of its words, and where it looked."""

    def __init__(self, blip: Any):
        super().__init__()
        self.bert, self.head = blip.text_decoder.bert, blip.text_decoder.cls
        self.side = grid(blip)

    def forward(
        self, token: Tensor, place: Tensor, keys: Tensor, values: Tensor, mask: Tensor,
        memory_keys: Tensor, memory_values: Tensor, *rest: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        embed, own = self.bert.embeddings, []
        x = embed.LayerNorm(embed.word_embeddings(token) + embed.position_embeddings(place))
        for i, layer in enumerate(self.bert.encoder.layer):
            attention = layer.attention.self
            heads = attention.num_attention_heads
            q, k, v = (f(x).view(heads, -1) for f in (attention.query, attention.key, attention.value))
            x = layer.attention.output(cached(q[:, None], k, v, keys[i], values[i], mask), x)
            own.append((k, v))
            q = layer.crossattention.self.query(x).view(heads, 1, -1)
            scores = q @ memory_keys[i] * q.shape[-1] ** -0.5
            looked = (scores + rest[0] if rest else scores).softmax(-1)
            x = layer.crossattention.output((looked @ memory_values[i]).view(1, -1), x)
            x = layer.feed_forward_chunk(x)
        key, value = (torch.stack(those) for those in zip(*own))
        where = rest[1] * 1 if rest else looked.mean(0)[:, 1:].reshape(1, self.side, self.side)
        return self.head(x), key, value, where


class IdeficsImage(nn.Module):
    """The rows that go into a prompt."""

    def __init__(self, model: Any, pixels: Pixels):
        super().__init__()
        self.vision, self.connector, self.pixels = model.vision_model, model.connector, pixels
        places = []  # of a whole picture's patches, as the model itself computes them
        embeddings, size = self.vision.embeddings, model.config.vision_config.image_size
        hook = embeddings.position_embedding.register_forward_hook(lambda _, __, out: places.append(out))
        try:
            side = size // model.config.vision_config.patch_size
            embeddings(torch.zeros(1, 3, size, size), torch.ones(1, side, side, dtype=torch.bool))
        finally:
            hook.remove()
        self.register_buffer("places", places[0].detach(), persistent=False)

    def forward(self, x: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        x = self.vision.embeddings.patch_embedding(self.pixels(x)).flatten(2).transpose(1, 2) + self.places
        for layer in self.vision.encoder.layers:
            x = layer(x, None)
        rows = self.connector(self.vision.post_layernorm(x))
        return rows, finite(rows, dt)


def joined(*layers: nn.Linear) -> nn.Linear:
    """Layers of one input as one, which is one product instead of several."""
    whole = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers), layers[0].bias is not None)
    whole.weight.data = torch.cat([layer.weight.data for layer in layers])
    if layers[0].bias is not None:
        whole.bias.data = torch.cat([layer.bias.data for layer in layers])
    return whole


class LlamaDecoder(nn.Module):
    """One step of a Llama."""

    def __init__(self, model: Any, length: int):
        super().__init__()
        self.text, self.head = model.model.text_model, model.lm_head
        attend = [layer.self_attn for layer in self.text.layers]
        self.qkv = nn.ModuleList(joined(a.q_proj, a.k_proj, a.v_proj) for a in attend)
        self.gate_up = nn.ModuleList(joined(layer.mlp.gate_proj, layer.mlp.up_proj) for layer in self.text.layers)
        cos, sin = self.text.rotary_emb(torch.zeros(1), torch.arange(length)[None])
        self.register_buffer("cos", cos[0].clone(), persistent=False)
        self.register_buffer("sin", sin[0].clone(), persistent=False)

    def forward(
        self, token: Tensor, place: Tensor, keys: Tensor, values: Tensor, mask: Tensor, row: Tensor
    ) -> tuple[Tensor, ...]:
        cos, sin, own = self.cos[place], self.sin[place], []
        x = torch.where(token[:, None] == -1, row, self.text.embed_tokens(token.clamp(min=0)))
        for i, layer in enumerate(self.text.layers):
            attention = layer.self_attn
            d, normed = attention.head_dim, layer.input_layernorm(x)
            heads = self.qkv[i](normed).view(-1, d)  # of queries, keys and values
            turned = heads * cos + torch.cat([-heads[:, d // 2 :], heads[:, : d // 2]], -1) * sin
            n = keys.shape[1]
            q, k, v = turned[: -2 * n], turned[-2 * n : -n], heads[-n:]
            q = q.view(n, -1, d)  # several share a key
            x = x + attention.o_proj(cached(q, k, v, keys[i], values[i], mask))
            gate, up = self.gate_up[i](layer.post_attention_layernorm(x)).chunk(2, -1)
            x = x + layer.mlp.down_proj(layer.mlp.act_fn(gate) * up)
            own.append((k, v))
        key, value = (torch.stack(those) for those in zip(*own))
        return self.head(self.text.norm(x)), key, value


def _graph(part: nn.Module, args: dict[str, Tensor], outputs: list[str], name: str) -> bytes:
    """Raises EngineError if it is too large for one file."""
    tensors = {id(t): t.numel() * t.element_size() for t in [*part.parameters(), *part.buffers()]}
    size, most = sum(tensors.values()), LARGEST[".onnx"]
    if size < most:
        for parameter in part.parameters():
            parameter.requires_grad_(False)
        onnx = export_graph(part, tuple(args.values()), list(args), outputs)
        size = len(onnx)
        if size <= most:
            return onnx
    raise EngineError(f"{name}: {size / 1e9:.1f} GB in fp32, no ONNX file can hold more than {most / 1e9:.1f} GB")


def _step(layers: int, heads: int, d: int, length: int) -> dict[str, Tensor]:
    """A decoder's inputs, to be traced with."""
    number = torch.zeros(1, dtype=torch.int64)
    return {
        "token": number, "place": number + 1, "keys": torch.zeros(layers, heads, d, length),
        "values": torch.zeros(layers, heads, length, d), "mask": torch.full((length,), NEVER),
    }  # fmt: skip


def _see(source: Pretrained) -> dict[str, Tensor]:
    return {"x": torch.zeros(1, *source.stream.shape, dtype=torch.uint8), "dt": torch.ones(1, 1)}


def _around(source: Pretrained) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts before and behind each text. Raises EdgeError if it does more than that."""
    bare, whole = source.tokens("a"), source.tokens("a", special=True)
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), None)
    if not bare or at is None:
        raise EdgeError(f"{source.name}: expected a tokenizer that puts tokens before and behind a text, "
                        f"got {bare} and with them {whole}")  # fmt: skip
    return whole[:at], whole[at + len(bare) :]


def _padded(tokens: Sequence[int], length: int) -> np.ndarray:
    return np.array([*tokens, *[0] * (length - len(tokens))], np.int64)


def _some_tokens(source: Pretrained, n: int, seed: int) -> list[int]:
    """Any but special ones."""
    known = np.setdiff1d(np.arange(1, len(source.tokenizer)), source.tokenizer.all_special_ids)
    return np.random.default_rng(seed).choice(known, n).tolist()


def _clip(source: Pretrained) -> Made:
    clip, length = source.model, source.model.config.text_config.max_position_embeddings
    begin, end = _around(source)
    text = {"tokens": torch.zeros(1, length, dtype=torch.int64)}
    graphs = {
        "image.onnx": _graph(ClipImage(clip, source.pixels), _see(source), ["embedding", "ok"], "image.onnx"),
        "text.onnx": _graph(ClipText(clip), text, ["embedding"], "text.onnx"),
    }
    manifest = {
        "outputs": {"embedding": {"source": "camera.embedding"}},
        "language": {
            "stream": "camera", "scale": clip.logit_scale.exp().item(),
            "text": {"file": "text.onnx", "length": length, "uses": {}, "begin": begin, "end": end},
        },
    }  # fmt: skip

    def check(language: Language, frames: Sequence[np.ndarray], parity: Parity) -> None:
        for frame in frames:
            language.look(frame)
            seen = clip.get_image_features(pixel_values=_pixels(source, [frame])).pooler_output
            parity.compare("image", language.seen(), F.normalize(seen, dim=-1)[0])
        for n in (1, length // 2, length - len(begin) - len(end)):
            tokens = [*begin, *_some_tokens(source, n, n), *end]
            read = clip.get_text_features(input_ids=torch.tensor([tokens])).pooler_output
            got = language.model.read(_padded(tokens, length))["embedding"][0]
            parity.compare("text", got, F.normalize(read, dim=-1)[0])

    return Made(graphs, manifest, check, _padded([*begin, *_some_tokens(source, 3, 0), *end], length), None)


def _blip_decoder(source: Pretrained, looked_at: dict[str, Tensor]) -> tuple[bytes, dict[str, Any]]:
    """The graph, and what the manifest says of it but for `uses` and `prompts`."""
    config = source.model.config.text_config
    length, heads = min(CAPTION_ROOM, config.max_position_embeddings), config.num_attention_heads
    step = _step(config.num_hidden_layers, heads, config.hidden_size // heads, length) | looked_at
    onnx = _graph(BlipDecoder(source.model), step, ["logits", "key", "value", "attention"], "decoder.onnx")
    return onnx, {
        "file": "decoder.onnx", "length": length, "rows": None, "end": config.sep_token_id, "unsaid": [],
    }  # fmt: skip


def _memory(source: Pretrained, n: int) -> dict[str, Tensor]:
    config = source.model.config.text_config
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    d = config.hidden_size // heads
    return {"memory_keys": torch.zeros(layers, heads, d, n), "memory_values": torch.zeros(layers, heads, n, d)}


def _caption(source: Pretrained) -> Made:
    blip = source.model
    begin = blip.config.text_config.bos_token_id
    looked_at = _memory(source, grid(blip) ** 2 + 1)
    image = BlipImage(blip.vision_model, source.pixels, blip.text_decoder)
    decoder, spec = _blip_decoder(source, looked_at)
    spec |= {"uses": {name: f"camera.{name}" for name in looked_at}, "prompts": {"caption": [str(begin)]}}
    graphs = {"image.onnx": _graph(image, _see(source), [*looked_at, "ok"], "image.onnx"), "decoder.onnx": decoder}

    def check(language: Language, frames: Sequence[np.ndarray], parity: Parity) -> None:
        for i, frame in enumerate(frames):
            language.look(frame)
            cells = blip.vision_model(_pixels(source, [frame])).last_hidden_state
            for name, want in zip(looked_at, memory(looks(blip.text_decoder), cells)):
                parity.compare("image", held(language.model, f"camera.{name}"), want)
            tokens = [begin, *_some_tokens(source, SAID, i)]
            whole = blip.text_decoder(torch.tensor([tokens]), encoder_hidden_states=cells, output_attentions=True)
            looked = whole.cross_attentions[-1].mean(1)[0, :, 1:].unflatten(-1, (grid(blip), -1))
            _compare_steps(language, tokens, whole.logits[0], parity, attention=looked)
            said = blip.generate(_pixels(source, [frame]), **GREEDY)
            _compare_said(language, [begin], said[0, 1:].tolist())

    return Made(
        graphs, {"outputs": {}, "language": {"stream": "camera", "decoder": spec}}, check, None,
        np.array([begin, *_some_tokens(source, GOLDEN_TOKENS, 0)]),
    )  # fmt: skip


def _answer(source: Pretrained) -> Made:
    blip, (before, behind) = source.model, _around(source)
    if blip.config.text_config.pad_token_id != 0:
        raise EdgeError(f"{source.name}: expected a pad_token_id of 0, got {blip.config.text_config.pad_token_id}")
    begin, side = blip.config.text_config.bos_token_id, grid(blip)
    length = min(QUESTION_TOKENS, blip.config.text_config.max_position_embeddings)
    cells = {"cells": torch.zeros(1, side**2 + 1, blip.config.vision_config.hidden_size)}
    read = _memory(source, length) | {"memory_mask": torch.zeros(length), "looked": torch.zeros(1, side, side)}
    decoder, spec = _blip_decoder(source, read)
    spec |= {"uses": {name: f"text.{name}" for name in read}, "prompts": {"question": [str(begin)]}}
    question = {"tokens": torch.zeros(1, length, dtype=torch.int64)} | cells
    graphs = {
        "image.onnx": _graph(BlipImage(blip.vision_model, source.pixels), _see(source), ["cells", "ok"], "image.onnx"),
        "text.onnx": _graph(BlipQuestion(blip), question, list(read), "text.onnx"),
        "decoder.onnx": decoder,
    }
    text = {"file": "text.onnx", "length": length, "uses": {"cells": "camera.cells"}, "begin": before, "end": behind}

    def check(language: Language, frames: Sequence[np.ndarray], parity: Parity) -> None:
        for i, frame in enumerate(frames):
            language.look(frame)
            cells = blip.vision_model(_pixels(source, [frame])).last_hidden_state
            parity.compare("image", held(language.model, "camera.cells"), cells)
            asked = [*before, *_some_tokens(source, 3 + 5 * i, i), *behind]
            language.model.read(_padded(asked, length))
            states = blip.text_encoder(torch.tensor([asked]), encoder_hidden_states=cells, output_attentions=True)
            tokens = [begin, *_some_tokens(source, SAID, 9 + i)]
            whole = blip.text_decoder(torch.tensor([tokens]), encoder_hidden_states=states.last_hidden_state)
            looked = states.cross_attentions[-1].mean((0, 1, 2))[1:].unflatten(-1, (side, -1))
            looked = looked.expand(len(tokens), side, side)
            _compare_steps(language, tokens, whole.logits[0], parity, attention=looked)
            said = blip.generate(torch.tensor([asked]), _pixels(source, [frame]), **GREEDY)
            _compare_said(language, [begin], said[0, 1:].tolist())

    return Made(
        graphs, {"outputs": {}, "language": {"stream": "camera", "text": text, "decoder": spec}}, check,
        _padded([*before, *_some_tokens(source, 3, 0), *behind], length),
        np.array([begin, *_some_tokens(source, GOLDEN_TOKENS, 0)]),
    )  # fmt: skip


def _chat(source: Pretrained) -> Made:
    model, config = source.model, source.model.config.text_config
    length, d = min(CHAT_ROOM, config.max_position_embeddings), model.model.text_model.layers[0].self_attn.head_dim
    prompts = chat_prompts(source)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends if ends is not None else source.tokenizer.eos_token_id]
    after = int(prompts["next_question"][0].split()[0])  # what a chat has behind an answer
    bad = model.generation_config.bad_words_ids or []
    spec = {
        "file": "decoder.onnx", "length": length, "uses": {}, "rows": "camera.rows",
        "end": after if after in ends else ends[0], "unsaid": sorted({w[0] for w in bad if len(w) == 1}),
        "prompts": prompts,
    }  # fmt: skip
    step = _step(config.num_hidden_layers, config.num_key_value_heads, d, length)
    step["row"] = torch.zeros(1, config.hidden_size)
    image = IdeficsImage(model.model, source.pixels)
    graphs = {
        "image.onnx": _graph(image, _see(source), ["rows", "ok"], "image.onnx"),
        "decoder.onnx": _graph(LlamaDecoder(model, length), step, ["logits", "key", "value"], "decoder.onnx"),
    }

    def check(language: Language, frames: Sequence[np.ndarray], parity: Parity) -> None:
        """Two images in one prompt, and one."""
        first, last = frames[:2]
        for frame in frames:
            language.look(frame)
            rows = model.get_image_features(_pixels(source, [frame])[None]).pooler_output[0]
            parity.compare("image", language.rows(), rows)
        prompt, rows = language.about(last, "question", "What is this?", "It", [(first, "What is this?", "A ball")])
        tokens = [*prompt, *_some_tokens(source, SAID, 0)]
        ids = torch.tensor([[config_id if t == -1 else t for t in tokens]])
        whole = model(input_ids=ids, pixel_values=_pixels(source, [first, last])[None])
        _compare_steps(language, tokens, whole.logits[0], parity, rows)
        for frame in frames:
            prompt, rows = language.about(frame, "question", "What is this?")
            ids = torch.tensor([[config_id if t == -1 else t for t in prompt]])
            said = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=_pixels(source, [frame])[None],
                eos_token_id=spec["end"], **GREEDY,
            )  # fmt: skip
            _compare_said(language, prompt, said[0, len(prompt) :].tolist(), rows)

    config_id = model.config.image_token_id
    asked = [
        t for piece in prompts["caption"] if piece.strip() != "answer"
        for t in ([-1] * source.rows if piece == "image" else map(int, piece.split()))
    ]  # fmt: skip
    return Made(
        graphs, {"outputs": {}, "language": {"stream": "camera", "decoder": spec}}, check, None,
        np.array([*asked, *_some_tokens(source, GOLDEN_TOKENS, 0)]),
    )  # fmt: skip


def chat_prompts(source: Pretrained) -> dict[str, list[str]]:
    """The prompts of a chat, as `DecoderSpec` has them, read off its template with other texts in it. Raises EdgeError
    if it cannot be taken to pieces."""
    asked, said, again = "Xq0", "Xa0", "Xq1"
    whole, images = source.chat(asked, said, again), IMAGE * source.rows
    parts, rest = list[str](), whole
    for mark in (images, asked, said, images, again):
        part, found, rest = rest.partition(mark)
        if not found:
            raise EdgeError(f"{source.name}: expected a chat template of images, questions and answers, got {whole!r}")
        parts.append(part)
    first, between, told, following, between_again = parts
    blank = told[len(rest) :]
    if between != between_again or not told.startswith(rest) or blank not in ("", " "):
        raise EdgeError(f"{source.name}: expected a chat template that is the same at each turn, got {whole!r}")

    def text(said: str) -> str:
        return " ".join(map(str, source.tokens(said)))

    middle, space = between.rstrip(" "), between[len(between.rstrip(" ")) :]
    ask = [text(middle), f"{space}question", text(rest), f"{blank}answer"]
    tell = [text(middle), text(space + CAPTION_QUESTION), text(rest), f"{blank}answer"]
    prompts = {
        "caption": [text(first), "image", *tell], "next_caption": [text(following), "image", *tell],
        "question": [text(first), "image", *ask], "next_question": [text(following), "image", *ask],
    }  # fmt: skip
    # The pieces are what the whole is: no token reaches from one into the next.
    asked, said, again = "What is this?", "A red ball", CAPTION_QUESTION
    pieces = [*prompts["question"], *prompts["next_caption"]]
    texts = iter([asked, said])
    tokens = list[int]()
    for piece in pieces[:-1]:
        if piece == "image":
            tokens += source.tokens(images)
        elif piece.strip() in ("question", "answer"):
            tokens += source.tokens(" " * (piece[0] == " ") + next(texts))
        else:
            tokens += map(int, piece.split())
    if tokens != source.tokens(source.chat(asked, said, again)):
        raise EdgeError(f"{source.name}: expected a tokenizer that reads a chat's texts alike alone and in it")
    return prompts


def _pixels(source: Pretrained, frames: Sequence[np.ndarray]) -> Tensor:
    return source.pixels(torch.from_numpy(np.stack(frames)))


def _compare_steps(
    language: Language, tokens: Sequence[int], logits: Tensor, parity: Parity, rows: np.ndarray | None = None,
    attention: Tensor | None = None,
) -> None:  # fmt: skip
    """One token after the other, from an empty cache, with all at once."""
    decoder, row = Decoder(language.model.graphs["decoder"]), iter(() if rows is None else rows)
    for at, token in enumerate(tokens):
        now = decoder.feed(token, next(row) if token == -1 else None)
        parity.compare("logits", now["logits"][0], logits[at])
        if attention is not None:
            parity.compare("attention", now["attention"][0], attention[at])


def _compare_said(
    language: Language, prompt: Sequence[int], want: Sequence[int], rows: np.ndarray | None = None
) -> None:
    """The likeliest token after the other. Raises EngineError."""
    decoder, row = Decoder(language.model.graphs["decoder"]), iter(() if rows is None else rows)
    spec = language.spec.decoder
    assert spec is not None
    for token in prompt:
        logits = decoder.feed(token, next(row) if token == -1 else None)["logits"][0]
    said = list[int]()
    while len(said) < SAID and spec.end not in said:
        logits[list(spec.unsaid)] = -np.inf
        said.append(int(logits.argmax()))
        logits = decoder.feed(said[-1])["logits"][0]
    if said != list(want):
        raise EngineError(f"ONNX Runtime does not say what transformers does: {said}, expected {want}")


MAKE = {
    "CLIPModel": _clip, "BlipForConditionalGeneration": _caption, "BlipForQuestionAnswering": _answer,
    "Idefics3ForConditionalGeneration": _chat, "SmolVLMForConditionalGeneration": _chat,
}  # fmt: skip


@torch.no_grad()
def export_pretrained(source: str, out: Path, adapter: Path | None = None) -> dict[str, Any]:
    """Write the bundle of a model; what of parity is worth knowing is returned. Raises EdgeError for a model that is
    not known or complete, EngineError if the graphs do not do what transformers does; then nothing is written."""
    pretrained = read_pretrained(source)
    if adapter:
        about = {**pretrained.about, "adapter": adapter.resolve().name}
        pretrained = dataclasses.replace(pretrained, model=merged(pretrained.model, adapter), about=about)
    made = MAKE[pretrained.architecture](pretrained)
    manifest = {
        "task": "vlm", "streams": [asdict(pretrained.stream)],
        "tick": {"anchor": "camera", "period_ms": 100, "max_period_ms": 1000}, "max_gap_ms": 2000,
        "parts": [{"name": "camera", "file": "image.onnx", "stream": "camera", "uses": {}, "state": {}}],
        **made.manifest, "training": pretrained.about, "scores": {},
    }  # fmt: skip
    files = {**made.graphs, TOKENIZER: pretrained.tokenizer.backend_tokenizer.to_str().encode()}
    frames, parity = pictures(pretrained.stream), Parity()
    with drafted(manifest, files) as (bundle, model):
        made.check(Language(bundle, model=model), frames[:PICTURES], parity)
    report = {f"max_{name}_error": error for name, error in parity.errors.items()}
    if not all(error <= MAX_ERROR for error in parity.errors.values()):
        raise EngineError(f"{source}: ONNX Runtime does not do what transformers does: {report}")
    manifest["training"] = {**pretrained.about, "parity": report}
    files["README.md"] = _card(pretrained, manifest, report).encode()
    write_language(out, manifest, files, frames, made.text, made.said)
    return report


def _card(source: Pretrained, manifest: dict[str, Any], report: dict[str, Any]) -> str:
    can = {"embedding": "compares pictures and texts"} if manifest["outputs"] else {}
    for name in manifest["language"].get("decoder", {}).get("prompts", {}):
        can[name] = {"caption": "captions", "question": "answers questions"}.get(
            name, "learns from examples in a prompt"
        )
    height, width, _ = source.stream.shape
    fit = {"crop": "its middle, as much as has that shape", "stretch": "the whole, squashed, never in parts"}
    about = "\n".join(f"- {name}: {value}" for name, value in source.about.items())
    parity = "\n".join(f"- {name}: {value:.2g}" for name, value in report.items())
    return f"""# {source.name}

Made by `python -m export.from_hf` from a pretrained model. It {", ".join(dict.fromkeys(can.values()))}.

{about}
{"" if "license" in source.about else "- license: the model's card does not tell; ask before you use it"}

A picture becomes {width} x {height} ({fit[source.stream.fit]}), by area means and linear
interpolation, not by the filter of the model's own processor; the graphs take its bytes and do the rest. Weights are
float32. Nothing was measured of how well it does on a robot.

Largest differences between the graphs in ONNX Runtime and transformers, as a share of the largest value above 1, on
random pictures and tokens; what was said, token after token, was the same:

{parity}
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or a name on the hub")
    parser.add_argument("out", type=Path, help="folder of the bundle; replaced if it is there")
    parser.add_argument(
        "--lora", type=Path, metavar="ADAPTER", help="folder of an adapter of peft, to be merged into it"
    )
    args = parser.parse_args(argv)
    try:
        report = export_pretrained(args.model, args.out, args.lora)
    except (EdgeError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    size = sum(f.stat().st_size for f in args.out.iterdir()) / 1e6
    print(f"{args.out}: {size:.2f} MB")
    for name, value in report.items():
        print(f"{name:20} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
