"""What a token costs: `OMP_NUM_THREADS=1 python -m tests.benchmarks.decode [--json]`

A language model of the kind that chats have (Llama: 256 wide, 4 layers, 8 heads, 4,096 tokens, random weights) says 128
tokens after a prompt of eight: by transformers' `generate`, with its cache; by the exported step in ONNX Runtime, as
`mm_edge.engine.decoder` runs it; and by the same with weights of eight bits. One thread, CPU time, in turns; ratios are
of medians. In fp32 the tokens are the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
import transformers
from tqdm import tqdm

from export.from_hf import GREEDY, LlamaDecoder, _graph, _step
from export.quantize import eight_bits
from mm_edge.engine.decoder import Decoder
from mm_edge.engine.ort import OrtGraph

WIDTH, LAYERS, HEADS, TOKENS, ROOM, SAID = 256, 4, 8, 4096, 256, 128
PROMPT = [1, 17, 400, 23, 9, 88, 1033, 5]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    llama = model()
    chat = SimpleNamespace(model=SimpleNamespace(text_model=llama.model), lm_head=llama.lm_head)
    step = _step(LAYERS, HEADS, WIDTH // HEADS, ROOM) | {"row": torch.zeros(1, WIDTH)}
    onnx = _graph(LlamaDecoder(chat, ROOM), step, ["logits", "key", "value"], "decoder.onnx")
    ways: dict[str, Callable[[], list[int]]] = {"generate": lambda: generated(llama)}
    for name, graph in (("fp32", onnx), ("int8", eight_bits(onnx))):
        decoder = Decoder(OrtGraph(graph, (), "cpu"))
        ways[name] = lambda decoder=decoder: said(decoder)
    want, times = generated(llama), {name: list[float]() for name in ways}
    same = {name: sum(a == b for a, b in zip(way(), want)) for name, way in ways.items()}
    for _ in tqdm(range(args.rounds), "rounds", leave=False):
        for name, way in ways.items():
            begun = time.thread_time()
            way()
            times[name].append(time.thread_time() - begun)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "tokens_per_s": {name: round(SAID / s) for name, s in seconds.items()},
        "fp32_vs_generate": round(seconds["generate"] / seconds["fp32"], 2),
        "int8_vs_generate": round(seconds["generate"] / seconds["int8"], 2),
        "same_tokens": {name: f"{n} of {SAID}" for name, n in same.items()},
    }
    print(json.dumps(result) if args.json else "\n".join(f"{name:18}{value}" for name, value in result.items()))
    return 0 if same["fp32"] == SAID else 1


def model() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=TOKENS, hidden_size=WIDTH, intermediate_size=688, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=ROOM, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():  # or it says the same token again and again
        for parameter in llama.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return llama


def generated(llama: transformers.LlamaForCausalLM) -> list[int]:
    prompt = torch.tensor([PROMPT])
    with torch.inference_mode():
        out = llama.generate(
            prompt, attention_mask=torch.ones_like(prompt), **{**GREEDY, "max_new_tokens": SAID, "use_cache": True}
        )
    return out[0, len(PROMPT) :].tolist()


def said(decoder: Decoder) -> list[int]:
    decoder.reset()
    for token in PROMPT:
        logits = decoder.feed(token)["logits"][0]
    tokens = [int(logits.argmax())]
    while len(tokens) < SAID:
        tokens.append(int(decoder.feed(tokens[-1])["logits"][0].argmax()))
    return tokens


if __name__ == "__main__":
    raise SystemExit(main())
