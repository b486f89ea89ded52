"""Tiny models of transformers with random weights, as folders such as the hub has."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXT_OF_WORDS = "a an the red blue ball box robot sees is this what how many one two left right of and"
TEXTS = [TEXT_OF_WORDS, "What is this? Can you describe this image? A ball. User: Assistant: It is a red ball."]
IMAGE_PX, PATCH_PX = 32, 8
CHAT = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}{% if message['content'][0]['type'] == "
    "'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}{% for line in message['content'] %}{% if line['type'] == "
    "'text' %}{{ line['text'] }}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**TEXT, "image_size": IMAGE_PX, "patch_size": PATCH_PX}
COLOURS = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "rescale_factor": 1 / 255}


def clip(folder: Path) -> Path:
    tokenizer = _bytes(["<|startoftext|>", "<|endoftext|>"])
    begin, end = (tokenizer.token_to_id(token) for token in ("<|startoftext|>", "<|endoftext|>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", begin), ("<|endoftext|>", end)]
    )
    config = transformers.CLIPConfig(
        text_config={
            **TEXT, "vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 20, "bos_token_id": begin,
            "eos_token_id": end,
        },
        vision_config=VISION, projection_dim=12,
    )  # fmt: skip
    shown = {"size": {"shortest_edge": IMAGE_PX}, "crop_size": {"height": IMAGE_PX, "width": IMAGE_PX}}
    shown["do_center_crop"] = True
    return _save(folder, transformers.CLIPModel, config, tokenizer, shown, pad="<|endoftext|>")


def blip(folder: Path, architecture: str = "BlipForConditionalGeneration") -> Path:
    vocabulary = {
        w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]", "?", *TEXT_OF_WORDS.split()])
    }
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]"])
    config = transformers.BlipConfig(
        text_config={
            **TEXT, "vocab_size": len(vocabulary), "encoder_hidden_size": 16, "max_position_embeddings": 48,
            "bos_token_id": 4, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0,
        },
        vision_config=VISION, image_text_hidden_size=16,
    )  # fmt: skip
    shown = {"size": {"height": IMAGE_PX, "width": IMAGE_PX}}
    return _save(folder, getattr(transformers, architecture), config, tokenizer, shown)


def blip_vqa(folder: Path) -> Path:
    return blip(folder, "BlipForQuestionAnswering")


def smolvlm(folder: Path, kind: str = "SmolVLM") -> Path:
    special = ["<pad>", "<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>"]
    tokenizer = _bytes(special)
    end, image = (tokenizer.token_to_id(token) for token in ("<end_of_utterance>", "<image>"))
    llama = transformers.LlamaConfig(
        **{**TEXT, "num_attention_heads": 4}, num_key_value_heads=2, vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=160, pad_token_id=tokenizer.token_to_id("<pad>"), bos_token_id=1, eos_token_id=end,
    )  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(
        text_config=llama, vision_config=VISION, scale_factor=2, image_token_id=image, tie_word_embeddings=True,
        pad_token_id=tokenizer.token_to_id("<pad>"),
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForConditionalGeneration")
    shown = {"size": {"longest_edge": 4 * IMAGE_PX}, "max_image_size": {"longest_edge": IMAGE_PX}}
    _save(folder, model, config, tokenizer, shown, eos_token_id=end, bad_words_ids=[[image]])
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


def idefics3(folder: Path) -> Path:
    return smolvlm(folder, "Idefics3")


def _bytes(special: list[str]) -> Tokenizer:
    """Of pieces of bytes, as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _save(folder, architecture, config, tokenizer, shown, pad=None, **generation) -> Path:
    torch.manual_seed(0)
    model = architecture(config).eval()
    with torch.no_grad():  # what is fresh says the same of all that it sees
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.2 * parameter[0].numel() ** -0.5)
    for name, value in generation.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**COLOURS, **shown}))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    return folder
