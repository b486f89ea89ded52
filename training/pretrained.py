"""A pretrained model of pictures and words, of transformers, from a folder or the hub, read with care: weights only as
safetensors, no code of the model's own, nothing missing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm_edge.errors import EdgeError, needs
from mm_edge.types import StreamSpec

# By a config's model_type, the architectures that are known.
MODELS = {
    "clip": ("CLIPModel",),
    "blip": ("BlipForConditionalGeneration", "BlipForQuestionAnswering"),
    "idefics3": ("Idefics3ForConditionalGeneration",),
    "smolvlm": ("SmolVLMForConditionalGeneration",),
}
FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md")  # what is fetched: no pickle
TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CAPTION_QUESTION = "Can you describe this image?"  # by which a chat is asked for a caption
IMAGE, AROUND, WHOLE = "<image>", "<fake_token_around_image>", "<global-img>"  # Idefics3's tokens


class Pixels(nn.Module):
    """Pictures uint8 (n, h, w, 3), RGB -> float32 (n, 3, h, w), as the model was trained with."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], scale: float):
        super().__init__()
        self.scale = scale
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x.float().permute(0, 3, 1, 2) * self.scale - self.mean) / self.std


@dataclass(frozen=True)
class Pretrained:
    name: str
    architecture: str
    model: Any  # a transformers.PreTrainedModel, fp32, in eval mode
    tokenizer: Any  # a transformers tokenizer with a fast backend
    stream: StreamSpec
    pixels: Pixels
    about: dict[str, str]  # for a manifest: source, model_type, architecture, license, ...

    def tokens(self, text: str, special: bool = False) -> list[int]:
        """`special`: with those that the tokenizer puts around a text."""
        return self.tokenizer(text, add_special_tokens=special).input_ids

    @property
    def rows(self) -> int:
        """Of an image, in the prompt of an Idefics3."""
        vision = self.model.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2 // self.model.config.scale_factor**2

    def chat(self, *turns: str) -> str:
        """An Idefics3's prompt: questions, each behind a picture, and the answers between them. Behind a question it
        ends where the answer begins."""
        messages = [
            {"role": "assistant", "content": [{"type": "text", "text": said}]} if i % 2 else
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": said}]}
            for i, said in enumerate(turns)
        ]  # fmt: skip
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=len(turns) % 2 == 1)
        return text.replace(IMAGE, f"{AROUND}{WHOLE}{IMAGE * self.rows}{AROUND}")


def read_pretrained(source: str) -> Pretrained:
    """The model of a folder, or of a name on the hub. Raises EdgeError, naming the folder and what is wrong with it."""
    with needs("a pretrained model", "transformers", "pretrained"):
        import transformers
    folder = _folder(source)
    config = _json(folder, "config.json")
    kind, architecture = config.get("model_type"), (config.get("architectures") or [None])[0]
    if kind not in MODELS:
        raise EdgeError(f"{folder}: expected a model_type of {', '.join(MODELS)}, got {kind!r}")
    if architecture not in MODELS[kind]:
        raise EdgeError(f"{folder}: expected a {kind} that is {' or '.join(MODELS[kind])}, got {architecture!r}")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        got = f"{pickles[0]}, a pickle, which may run anything when it is read" if pickles else "none"
        raise EdgeError(f"{folder}: expected weights as *.safetensors, got {got}")
    tokenizer = _tokenizer(folder)
    try:
        model, found = getattr(transformers, architecture).from_pretrained(
            folder, use_safetensors=True, local_files_only=True, attn_implementation="eager", dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # OSError, ValueError, RuntimeError, safetensors' own without a common base
        raise EdgeError(f"{folder}: {architecture} cannot be read: {type(error).__name__}: {error}") from None
    wrong = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
    if wrong:
        raise EdgeError(f"{folder}: expected weights of the whole model, {len(wrong)} are missing, such as {wrong[0]}")
    stream, pixels = _preprocessing(folder, kind, model.config.vision_config.image_size)
    known = model.config.text_config.vocab_size
    if len(tokenizer) > known:
        raise EdgeError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model knows {known}")
    local = Path(source).is_dir()
    about = {
        "source": folder.resolve().name if local else source, "model_type": kind, "architecture": architecture,
        **({} if local else {"revision": folder.name}), **_license(folder), "transformers": transformers.__version__,
    }  # fmt: skip
    pretrained = Pretrained(about["source"], architecture, model.eval(), tokenizer, stream, pixels, about)
    if kind in ("idefics3", "smolvlm"):
        _check_idefics(folder, pretrained)
    return pretrained


def merged(model: nn.Module, adapter: Path) -> nn.Module:
    """The model with an adapter of peft (LoRA, AdaLoRA) in its weights. Raises EdgeError."""
    with needs("an adapter", "peft", "pretrained"):
        import peft
    _json(adapter, "adapter_config.json")
    if not (adapter / "adapter_model.safetensors").is_file():
        raise EdgeError(f"{adapter}: expected adapter_model.safetensors, got no such file")
    try:
        return peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().eval()
    except Exception as error:  # ValueError, RuntimeError, KeyError: whatever part of it does not fit
        raise EdgeError(f"{adapter}: not an adapter of this model: {type(error).__name__}: {error}") from None


def _folder(source: str) -> Path:
    """On this machine."""
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists() or source.startswith((".", "/", "~")):
        raise EdgeError(f"{source}: expected a folder of a model, or a name on the hub")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=list(FILES)))
    except Exception as error:  # of the network, the hub, its cache and its names
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EdgeError(
            f"{source}: no such folder, and the hub does not give it ({why}); download it where there is a network, "
            "and name the folder"
        ) from None


def _json(folder: Path, name: str) -> dict[str, Any]:
    try:
        data = json.loads((folder / name).read_bytes())
    except (OSError, ValueError) as error:
        raise EdgeError(f"{folder}: expected {name}, {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(data, dict):
        raise EdgeError(f"{folder / name}: expected an object, got {str(data)[:60]}")
    return data


def _preprocessing(folder: Path, kind: str, size: int) -> tuple[StreamSpec, Pixels]:
    """A picture's way to the model, as the folder's preprocessor_config.json or processor_config.json says."""
    name = next((n for n in ("preprocessor_config.json", "processor_config.json") if (folder / n).is_file()), None)
    if name is None:
        raise EdgeError(f"{folder}: expected preprocessor_config.json or processor_config.json, got neither")
    given = _json(folder, name)
    given = given.get("image_processor", given)
    if not isinstance(given, dict):
        raise EdgeError(f"{folder / name}: image_processor: expected an object, got {str(given)[:60]}")
    crop = bool(given.get("do_center_crop"))
    if kind in ("clip", "blip"):  # the others squash any, if they do not split it
        shown = given.get("crop_size" if crop else "size")
        shown = {shown} if isinstance(shown, int) else set((shown or {}).values())
        if crop:  # the whole of the shorter side is seen
            short = given.get("size")
            shown |= {short} if isinstance(short, int) else set((short or {}).values())
        if shown != {size}:
            raise EdgeError(f"{folder / name}: expected pictures of {size} x {size}, as the model has, got {shown}")
    mean, std = given.get("image_mean"), given.get("image_std")
    if not given.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    scale = given.get("rescale_factor", 1 / 255) if given.get("do_rescale", True) else 1.0
    lists = all(isinstance(v, list) and len(v) == 3 for v in (mean, std))
    if not lists or not all(isinstance(v, (int, float)) for v in (*mean, *std, scale)) or min(std) <= 0:
        raise EdgeError(f"{folder / name}: expected image_mean and image_std of three colours, above 0, and a "
                        f"rescale_factor, got {mean}, {std}, {scale}")  # fmt: skip
    fit = "crop" if crop else "stretch"
    stream = StreamSpec("camera", "image", (size, size, 3), rate_hz=0, max_age_ms=1000, fit=fit)
    return stream, Pixels(mean, std, scale)


def _tokenizer(folder: Path) -> Any:
    import transformers

    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise EdgeError(f"{folder}: expected a tokenizer ({', '.join(TOKENIZERS)}), got none")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        backend = tokenizer.backend_tokenizer
    except AttributeError:
        raise EdgeError(f"{folder}: its tokenizer has no fast class, and cannot become a tokenizer.json") from None
    except Exception as error:  # as above
        raise EdgeError(f"{folder}: the tokenizer cannot be read: {type(error).__name__}: {error}") from None
    backend.no_padding()
    backend.no_truncation()
    # Where older models keep it, and only a processor would look.
    if not tokenizer.chat_template and (folder / "chat_template.json").is_file():
        tokenizer.chat_template = _json(folder, "chat_template.json").get("chat_template")
    return tokenizer


def _check_idefics(folder: Path, pretrained: Pretrained) -> None:
    config, tokenizer = pretrained.model.config, pretrained.tokenizer
    if config.text_config.model_type != "llama":
        raise EdgeError(f"{folder}: expected a text model of llama's kind, got {config.text_config.model_type}")
    rope = pretrained.model.model.text_model.rotary_emb.rope_type
    if rope not in ("default", "linear", "llama3"):  # others' frequencies change with the length
        raise EdgeError(f"{folder}: expected a rotary embedding of default, linear or llama3, got {rope}")
    if not tokenizer.chat_template:
        raise EdgeError(f"{folder}: expected a chat template (chat_template.jinja), got none")
    if any(len(pretrained.tokens(token)) != 1 for token in (IMAGE, AROUND, WHOLE)):
        raise EdgeError(f"{folder}: expected a tokenizer that has {IMAGE}, {AROUND} and {WHOLE}")
    if tokenizer.convert_tokens_to_ids(IMAGE) != config.image_token_id:
        raise EdgeError(f"{folder}: {IMAGE} is not the image_token_id {config.image_token_id} of config.json")


def _license(folder: Path) -> dict[str, str]:
    """If the model card tells."""
    from huggingface_hub import metadata_load

    try:
        said = (metadata_load(folder / "README.md") or {}).get("license")
    except Exception:  # no card, or none that can be read
        return {}
    return {"license": str(said)} if said else {}
