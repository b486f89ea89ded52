"""Fine-tune a pretrained model of transformers on pictures of one's own, by an adapter of peft.

    python -m training.finetune models/blip --data FOLDER --out adapters/mine [--method adalora] [--steps 500]
    python -m export.from_hf models/blip bundles/mine --lora adapters/mine

FOLDER is in the layout of COCO (see `training.coco`). CLIP learns which caption is a picture's, BLIP and chats say the
caption; a BLIP for questions, and a chat where there are some, answers. The base model's weights stay as they are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mm_edge.errors import EdgeError, needs
from mm_edge.preprocess import fitted
from training import coco
from training.pretrained import CAPTION_QUESTION, Pretrained, read_pretrained

# What an adapter changes: what attention asks for and hands on, by the architecture's names.
TARGETS = {
    "CLIPModel": ["q_proj", "v_proj"],
    "BlipForConditionalGeneration": ["query", "value", "qkv"],
    "BlipForQuestionAnswering": ["query", "value", "qkv"],
    "Idefics3ForConditionalGeneration": r".*text_model.*\.(q_proj|v_proj)",
    "SmolVLMForConditionalGeneration": r".*text_model.*\.(q_proj|v_proj)",
}
METHODS = ("lora", "adalora")
RANK = 8
IGNORED = -100  # a label that no loss is of


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or a name on the hub")
    parser.add_argument("--data", type=Path, required=True, help="folder of pictures and captions, as COCO's")
    parser.add_argument("--out", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--method", choices=METHODS, default="lora")
    parser.add_argument("--steps", type=int, default=500, help="10 or more")
    parser.add_argument("--batch", type=int, default=8, help="pictures a step")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    try:
        losses = finetune(
            read_pretrained(args.model), args.data, args.out, args.method, args.steps, args.batch, args.learning_rate,
            args.seed,
        )  # fmt: skip
    except (EdgeError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{args.out}: loss {np.mean(losses[:5]):.3f} of the first five steps, {np.mean(losses[-5:]):.3f} of the last")
    return 0


def finetune(
    source: Pretrained,
    data: Path,
    out: Path,
    method: str = "lora",
    steps: int = 500,
    batch: int = 8,
    learning_rate: float = 1e-4,
    seed: int = 1,
) -> list[float]:
    """Write the adapter; each step's loss. Raises EdgeError for data that cannot be learned from, ValueError for a step
    or batch that is too few."""
    with needs("fine-tuning", "peft", "pretrained"):
        import peft
    least = 2 if source.architecture == "CLIPModel" else 1  # others' captions are what is wrong
    if batch < least or steps < 10:
        raise ValueError(f"expected --batch of at least {least} and --steps of at least 10, got {batch} and {steps}")
    torch.manual_seed(seed)
    lessons = _lessons(source, data, batch, np.random.default_rng(seed))
    same: dict[str, Any] = {"target_modules": TARGETS[source.architecture], "lora_alpha": 2 * RANK, "lora_dropout": 0.0}
    if method == "lora":
        config = peft.LoraConfig(r=RANK, **same)
    else:  # it starts with more ranks, and leaves the least important ones out as it goes
        config = peft.AdaLoraConfig(
            init_r=RANK * 3 // 2, target_r=RANK, tinit=steps // 10, tfinal=steps // 3, deltaT=max(1, steps // 100),
            total_step=steps, **same,
        )  # fmt: skip
    model = peft.get_peft_model(source.model, config).train()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    source.pixels.to(device)
    loss_of, losses = LOSSES[source.architecture], list[float]()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), learning_rate)
    for step in (bar := tqdm(range(steps), unit="step")):
        images, asked, said = next(lessons)
        pixels = source.pixels(torch.from_numpy(images).to(device))
        loss = loss_of(source, model, pixels, asked, said)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if method == "adalora":  # reads the gradients
            model.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
        losses.append(loss.item())
        if not np.isfinite(losses[-1]):
            raise ValueError(f"the loss of step {step + 1} is {losses[-1]}: expected a lower learning rate")
        bar.set_postfix_str(f"loss {np.mean(losses[-10:]):.3f}", refresh=False)
    model.eval().cpu()
    source.pixels.cpu()
    model.save_pretrained(out)
    return losses


def _lessons(
    source: Pretrained, data: Path, batch: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, list[str], list[str]]]:
    """Batches without an end: pictures uint8 (n, h, w, 3), what each is asked, and what is said. Raises EdgeError."""
    found = coco.read(data, "train")
    asks = source.architecture != "CLIPModel" and source.architecture != "BlipForConditionalGeneration"
    questions = [[(q.text, q.answer) for q in picture.questions] if asks else [] for picture in found]
    captions = [[(CAPTION_QUESTION, text) for text in picture.captions] for picture in found]
    if source.architecture == "BlipForQuestionAnswering":
        captions = [[] for _ in found]
    told = [(picture.file, q + c) for picture, q, c in zip(found, questions, captions) if q + c]
    if len(told) < batch:
        what = "questions" if source.architecture == "BlipForQuestionAnswering" else "captions"
        raise EdgeError(f"{data}: expected at least a batch of {batch} pictures with {what}, got {len(told)}")

    def batches() -> Iterator[tuple[np.ndarray, list[str], list[str]]]:
        while True:
            order = rng.permutation(len(told))
            for at in range(0, len(order) - batch + 1, batch):
                some = [told[i] for i in order[at : at + batch]]
                pairs = [texts[rng.integers(len(texts))] for _, texts in some]
                images = np.stack([fitted(source.stream, _image(file)) for file, _ in some])
                yield images, [asked for asked, _ in pairs], [said for _, said in pairs]

    return batches()


def _image(file: Path) -> np.ndarray:
    image = cv2.imread(str(file), cv2.IMREAD_COLOR)
    if image is None:
        raise EdgeError(f"{file}: expected an image, got {file.stat().st_size} bytes that are none")
    return np.ascontiguousarray(image[..., ::-1])


def _padded(rows: list[list[int]], value: int, like: Tensor) -> Tensor:
    """int64 (n, longest), `value` behind what is shorter, on the device of another tensor."""
    rows_of = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return nn.utils.rnn.pad_sequence(rows_of, batch_first=True, padding_value=value).to(like.device)


def _clip(source: Pretrained, model: nn.Module, pixels: Tensor, asked: list[str], said: list[str]) -> Tensor:
    most = source.model.config.text_config.max_position_embeddings
    rows = [source.tokens(text, special=True) for text in said]
    rows = [row if len(row) <= most else [*row[: most - 1], row[-1]] for row in rows]
    there = _padded([[1] * len(row) for row in rows], 0, pixels)
    tokens = _padded(rows, 0, pixels)
    return model(input_ids=tokens, attention_mask=there, pixel_values=pixels, return_loss=True).loss


def _blip(source: Pretrained, model: nn.Module, pixels: Tensor, asked: list[str], said: list[str]) -> Tensor:
    config = source.model.config.text_config
    most = config.max_position_embeddings - 2
    rows = [[config.bos_token_id, *source.tokens(text)[:most], config.sep_token_id] for text in said]
    there, labels = _padded([[1] * len(row) for row in rows], 0, pixels), _padded(rows, IGNORED, pixels)
    tokens = labels.clamp(min=0)
    if source.architecture == "BlipForConditionalGeneration":
        return model(pixel_values=pixels, input_ids=tokens, attention_mask=there, labels=labels).loss
    questions = [source.tokens(text, special=True) for text in asked]
    return model(
        pixel_values=pixels, input_ids=_padded(questions, 0, pixels),
        attention_mask=_padded([[1] * len(row) for row in questions], 0, pixels),
        decoder_input_ids=tokens, decoder_attention_mask=there, labels=labels,
    ).loss  # fmt: skip


def _chat(source: Pretrained, model: nn.Module, pixels: Tensor, asked: list[str], said: list[str]) -> Tensor:
    """Only of what is answered."""
    rows, labels = [], []
    for question, answer in zip(asked, said):
        row, prompt = source.tokens(source.chat(question, answer)), source.tokens(source.chat(question))
        rows.append(row)
        labels.append([IGNORED] * len(prompt) + row[len(prompt) :])
    there = _padded([[1] * len(row) for row in rows], 0, pixels)
    tokens = _padded(rows, 0, pixels)
    return model(
        input_ids=tokens, attention_mask=there, pixel_values=pixels[:, None], labels=_padded(labels, IGNORED, pixels)
    ).loss


LOSSES: dict[str, Callable[..., Tensor]] = {
    "CLIPModel": _clip, "BlipForConditionalGeneration": _blip, "BlipForQuestionAnswering": _blip,
    "Idefics3ForConditionalGeneration": _chat, "SmolVLMForConditionalGeneration": _chat,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
