"""Pretrained models become bundles that say what transformers says: tiny ones, with random weights."""

import importlib
import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="export needs torch")
transformers = pytest.importorskip("transformers", reason="pip install 'mm-edge[pretrained]'")
peft = pytest.importorskip("peft", reason="pip install 'mm-edge[pretrained]'")
for needed in ("onnxscript", "onnxruntime", "mujoco", "nltk", "accelerate", "cv2"):
    pytest.importorskip(needed, reason="pip install 'mm-edge[pretrained,test]'")

from export import from_hf
from export.from_hf import export_pretrained, main
from export.to_tensorrt import build_parts, build_rtx
from mm_edge.bundle import Bundle
from mm_edge.errors import BundleError, EdgeError, EngineError, SampleError
from mm_edge.language import (
    CaptionPipeline,
    GenerationPipeline,
    Language,
    QuestionPipeline,
    RetrievalPipeline,
    ZeroShotPipeline,
)
from tests import pretrained, test_coco
from training import finetune
from training.pretrained import merged, read_pretrained

MODELS = ("clip", "blip", "blip_vqa", "idefics3", "smolvlm")
CHATS = ("idefics3", "smolvlm")
GREEDY = {"max_new_tokens": 8, "do_sample": False, "num_beams": 1}
PX = pretrained.IMAGE_PX
IMAGES = [np.random.default_rng(i).integers(0, 256, (PX, PX, 3), np.uint8) for i in range(3)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    where = tmp_path_factory.mktemp("models")
    return {name: getattr(pretrained, name)(where / name) for name in MODELS}


@pytest.fixture(scope="module")
def bundles(folders):
    """Each made once."""
    out = folders["clip"].parents[0] / "bundles"
    for name, folder in folders.items():
        assert main([str(folder), str(out / name)]) == 0
    return {name: Language(out / name) for name in MODELS}


@pytest.fixture(scope="module")
def sources(folders):
    return {name: read_pretrained(str(folder)) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return test_coco.write(tmp_path_factory.mktemp("photos"), test_coco.contents("train"), "train")


def processed(kind: str, **more):
    """The own image processor of a kind in transformers."""
    module = importlib.import_module(f"transformers.models.{kind}.image_processing_pil_{kind}")
    name = {"clip": "CLIP", "blip": "Blip", "idefics3": "Idefics3"}[kind]
    colours = {key: pretrained.COLOURS[key] for key in ("image_mean", "image_std")}
    return getattr(module, f"{name}ImageProcessorPil")(**colours, **more)


def said(source, tokens) -> str:
    return source.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_each_bundle_says_what_it_was_made_of_and_how_near_it_is(bundles):
    for name, language in bundles.items():
        about = language.bundle.training
        assert about["source"] == name and about["license"] == "apache-2.0" and about["architecture"] in from_hf.MAKE
        assert len(about["parity"]) >= 2 and max(about["parity"].values()) < 1e-5
        card = (language.bundle.path / "README.md").read_text()
        assert f"# {name}" in card and "license: apache-2.0" in card and "max_image_error" in card


@torch.no_grad()
def test_clip_scores_labels_as_transformers_does(bundles, sources):
    source, labels = sources["clip"], ["a red ball", "the robot", "two blue box and one ball of this"]
    shown = processed("clip", size={"shortest_edge": PX}, crop_size={"height": PX, "width": PX})
    texts = source.tokenizer(labels, padding=True, return_tensors="pt")
    classify = ZeroShotPipeline(bundles["clip"], labels)
    for image in IMAGES:
        pixels = shown(image, return_tensors="pt").pixel_values
        logits = source.model(texts.input_ids, pixels, texts.attention_mask).logits_per_image
        got = classify(image)
        assert [got[label] for label in labels] == pytest.approx(logits.softmax(-1)[0].tolist(), abs=1e-5)
    assert bundles["clip"].spec.scale == pytest.approx(source.model.logit_scale.exp().item())


def test_clip_sees_the_middle_of_a_picture_and_finds_it(bundles):
    wide = np.concatenate([IMAGES[1][:, :8], IMAGES[0], IMAGES[2][:, :8]], 1)
    search = RetrievalPipeline(bundles["clip"])
    search.add(IMAGES, ["a red ball", "the robot"])
    first = search.search(wide)[0]
    assert first.number == 0 and first.score == pytest.approx(1, abs=1e-5)
    assert len(search.search("a red ball", k=2)) == 2 and len(search.texts_for(wide)) == 2


@torch.no_grad()
def test_blip_says_the_caption_that_transformers_does(bundles, sources):
    source, shown = sources["blip"], processed("blip", size={"height": PX, "width": PX})
    captions = set()
    for image in IMAGES:
        pixels = shown(image, return_tensors="pt").pixel_values
        want = said(source, source.model.generate(pixels, **GREEDY)[0])
        assert CaptionPipeline(bundles["blip"])(image, most=8).text == want
        captions.add(want)
        begin = source.tokenizer("the robot sees", return_tensors="pt").input_ids
        more = said(source, source.model.generate(pixels, begin, **GREEDY)[0, 4:])
        assert GenerationPipeline(bundles["blip"])(image, "the robot sees", most=8).text == f"the robot sees {more}"
    assert len(captions) > 1  # it does look


def test_blip_tells_where_it_looked(bundles):
    language = bundles["blip"]
    language.look(IMAGES[0])
    token = next(language.say(language.prompt("caption")))
    assert token.attention.shape == (4, 4) and 0 < token.attention.sum() < 1  # the rest is the class's token


@torch.no_grad()
def test_blip_answers_what_transformers_does(bundles, sources):
    source, shown = sources["blip_vqa"], processed("blip", size={"height": PX, "width": PX})
    answers = set()
    for image in IMAGES:
        for question in ("what is this ?", "how many blue box", "is the robot left of the red ball ?"):
            asked = source.tokenizer(question, return_tensors="pt").input_ids
            pixels = shown(image, return_tensors="pt").pixel_values
            want = said(source, source.model.generate(asked, pixels, **GREEDY)[0])
            assert QuestionPipeline(bundles["blip_vqa"])(image, question, most=8).text == want
            answers.add(want)
    assert len(answers) > 1
    with pytest.raises(SampleError, match="text: expected at most 38 tokens, got 60"):
        QuestionPipeline(bundles["blip_vqa"])(IMAGES[0], "ball " * 60)


def chat_inputs(source, images, *turns):
    """By transformers' own processor: questions, each behind its image, and the answers between them."""
    shown = processed(
        "idefics3", size={"longest_edge": PX}, max_image_size={"longest_edge": PX}, do_image_splitting=False
    )
    processor = transformers.Idefics3Processor(
        shown, source.tokenizer, image_seq_len=source.rows, chat_template=pretrained.CHAT
    )
    messages = [
        {"role": "assistant", "content": [{"type": "text", "text": text}]} if i % 2 else
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        for i, text in enumerate(turns)
    ]  # fmt: skip
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    return processor(text=prompt, images=[list(images)], return_tensors="pt")


@pytest.mark.parametrize("name", CHATS)
@torch.no_grad()
def test_a_chat_answers_what_transformers_does(name, bundles, sources):
    source, question = sources[name], "how many red ball?"
    bad = [[source.model.config.image_token_id]]
    for image in IMAGES:
        inputs = chat_inputs(source, [image], question)
        want = source.model.generate(**inputs, **GREEDY, bad_words_ids=bad)[0, inputs.input_ids.shape[1] :]
        assert QuestionPipeline(bundles[name])(image, question, most=8).text == said(source, want)
        inputs = chat_inputs(source, [image], "Can you describe this image?")
        want = source.model.generate(**inputs, **GREEDY, bad_words_ids=bad)[0, inputs.input_ids.shape[1] :]
        assert CaptionPipeline(bundles[name])(image, most=8).text == said(source, want)


@torch.no_grad()
def test_what_is_said_may_end_a_word_that_was_begun(bundles, sources):
    source, language, begin = sources["smolvlm"], bundles["smolvlm"], "It is a re"
    prompt, _ = language.about(IMAGES[0], "caption", begin=begin)
    image = source.model.config.image_token_id
    ids = torch.tensor([[image if token == -1 else token for token in prompt]])
    pixels = source.pixels(torch.from_numpy(IMAGES[0][None]))[None]
    more = source.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, bad_words_ids=[[image]], **GREEDY
    )
    want = said(source, [*source.tokens(begin), *more[0, len(prompt) :]])
    assert want[len(begin)] != " "
    assert GenerationPipeline(language)(IMAGES[0], begin, most=8).text == want


@pytest.mark.parametrize("name", CHATS)
@torch.no_grad()
def test_a_prompt_of_several_images_is_what_transformers_makes_of_it(name, bundles, sources):
    source, language, question = sources[name], bundles[name], "how many red ball?"
    examples = [(IMAGES[1], question, "It is one"), (IMAGES[2], "What is this?", "A blue box.")]
    inputs = chat_inputs(source, [IMAGES[1], IMAGES[2], IMAGES[0]], question, "It is one", "What is this?",
                         "A blue box.", question)  # fmt: skip
    prompt, rows = language.about(IMAGES[0], "question", question, examples=examples)
    image = source.model.config.image_token_id
    assert [image if token == -1 else token for token in prompt] == inputs.input_ids[0].tolist()
    decoder, row, want = from_hf.Decoder(language.model.graphs["decoder"]), iter(rows), source.model(**inputs).logits[0]
    for at, token in enumerate(prompt):
        got = decoder.feed(token, next(row) if token == -1 else None)["logits"][0]
        np.testing.assert_allclose(got, want[at], atol=1e-4)
    bad = [[source.model.config.image_token_id]]
    answer = source.model.generate(**inputs, **GREEDY, bad_words_ids=bad)[0, inputs.input_ids.shape[1] :]
    ask = QuestionPipeline(language)
    assert ask(IMAGES[0], question, most=8, examples=examples).text == said(source, answer)
    # What examples show matters.
    swapped, _ = language.about(IMAGES[0], "question", question, examples=examples[::-1])
    assert sorted(swapped) == sorted(prompt) and swapped != prompt


def test_captions_have_examples_too(bundles):
    language = bundles["smolvlm"]
    prompt, rows = language.about(IMAGES[0], "caption", examples=[(IMAGES[1], None, "A red ball.")])
    alone, _ = language.about(IMAGES[0], "caption")
    assert prompt.count(-1) == len(rows) == 2 * alone.count(-1)
    assert CaptionPipeline(language)(IMAGES[0], 4, [(IMAGES[1], "A red ball.")]).score > 0


def test_too_many_examples_are_refused_and_so_are_any_where_a_prompt_has_one_image(bundles):
    with pytest.raises(SampleError, match="less than 160 tokens with the prompt"):
        QuestionPipeline(bundles["smolvlm"])(IMAGES[0], "What is this?", examples=[(IMAGES[1], "how many", "two")] * 9)
    with pytest.raises(BundleError, match="expected a bundle that learns from examples, this one does not"):
        CaptionPipeline(bundles["blip"])(IMAGES[0], examples=[(IMAGES[1], "a red ball")])


def test_every_graph_builds_with_tensorrt(bundles):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'mm-edge[trt-rtx]'")
    for bundle in (language.bundle for language in bundles.values()):
        assert list(build_parts(bundle, build_rtx)) == [graph.name for graph in bundle.graphs()]


@pytest.mark.parametrize(("name", "method"), [("clip", "lora"), ("blip", "adalora")])
@torch.no_grad()
def test_an_adapter_is_merged_into_the_bundle(name, method, folders, bundles, photos, tmp_path):
    source = read_pretrained(str(folders[name]))
    with torch.enable_grad():
        losses = finetune.finetune(source, photos, tmp_path / "adapter", method, 30, batch=6, learning_rate=0.01)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    adapted = source.model  # peft has put the adapter into it
    assert any("lora" in key for key, _ in adapted.named_parameters())
    assert main([str(folders[name]), str(tmp_path / "bundle"), "--lora", str(tmp_path / "adapter")]) == 0
    language = Language(tmp_path / "bundle")
    assert language.bundle.training["adapter"] == "adapter"
    pixels = source.pixels(torch.from_numpy(IMAGES[0][None]))
    for model in (bundles[name], language):
        model.look(IMAGES[0])
    if name == "clip":
        want = torch.nn.functional.normalize(adapted.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        np.testing.assert_allclose(language.seen(), want[0], atol=1e-4)
        assert np.abs(language.seen() - bundles[name].seen()).max() > 1e-3
    else:
        tokens = [4, 6, 7, 8]
        want = adapted(pixel_values=pixels, input_ids=torch.tensor([tokens])).logits[0, -1]
        got, before = ([from_hf.Decoder(m.model.graphs["decoder"])] for m in (language, bundles[name]))
        got, before = ([d.feed(t)["logits"][0].copy() for t in tokens][-1] for (d,) in (got, before))
        np.testing.assert_allclose(got, want, atol=1e-4)
        assert np.abs(got - before).max() > 1e-3


@pytest.mark.parametrize("name", ["blip_vqa", "smolvlm"])
def test_what_answers_learns_from_questions(name, sources, folders, photos, tmp_path):
    source = read_pretrained(str(folders[name]))
    losses = finetune.finetune(source, photos, tmp_path / "adapter", steps=30, batch=6, learning_rate=0.02)
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    again = finetune.finetune(read_pretrained(str(folders[name])), photos, tmp_path / "b", steps=10, batch=6)
    same = finetune.finetune(read_pretrained(str(folders[name])), photos, tmp_path / "c", steps=10, batch=6)
    assert again == same  # the seed's


def test_graphs_that_do_otherwise_are_not_written(folders, tmp_path, monkeypatch):
    blind = from_hf.cached
    monkeypatch.setattr(from_hf, "cached", lambda q, k, v, keys, values, mask: blind(q, k, v, keys, values, mask - 9.0))
    with pytest.raises(EngineError, match=r"does not (do|say) what transformers does"):
        export_pretrained(str(folders["blip"]), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_model_that_is_too_large_for_a_file_is_refused(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(from_hf, "LARGEST", {".onnx": 9000})
    with pytest.raises(EngineError, match=r"decoder.onnx: 0.0 GB in fp32, no ONNX file can hold more than 0.0 GB"):
        export_pretrained(str(folders["blip"]), tmp_path / "b")


def edit(folder, name, **changes):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda f: (f / "config.json").unlink(), "expected config.json, No such file"),
        (lambda f: edit(f, "config.json", model_type="bert"), "a model_type of clip, blip, idefics3, smolvlm, got 'be"),
        (lambda f: edit(f, "config.json", architectures=["BlipModel"]), "expected a clip that is CLIPModel, got 'Bl"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "got pytorch_model.bin, a pickle, which"),
        (lambda f: (f / "model.safetensors").unlink(), r"expected weights as \*.safetensors, got none"),
        (lambda f: (f / "model.safetensors").write_bytes(b"xxxxxxxxxxxx"), "CLIPModel cannot be read: "),
        (lambda f: edit(f, "config.json", projection_dim=13), "CLIPModel cannot be read|weights of the whole model, 2"),
        (lambda f: (f / "tokenizer.json").unlink(), r"expected a tokenizer \(tokenizer.json, .*, got none"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "the tokenizer cannot be read"),
        (lambda f: (f / "preprocessor_config.json").unlink(), "expected preprocessor_config.json or processor_config"),
        (lambda f: edit(f, "preprocessor_config.json", size={"shortest_edge": 40}), "expected pictures of 32 x 32, as"),
        (lambda f: edit(f, "preprocessor_config.json", image_std=[1, 0, 1]), "image_mean and image_std of three"),
        (lambda f: edit(f, "preprocessor_config.json", rescale_factor="1/255"), "and a rescale_factor, got .* 1/255"),
        (lambda f: edit(f, "preprocessor_config.json", image_processor=7), "image_processor: expected an object"),
    ],
)  # fmt: skip
def test_what_is_no_model_is_refused_by_its_folder(spoil, why, folders, tmp_path, capsys):
    folder = shutil.copytree(folders["clip"], tmp_path / "spoilt")
    spoil(folder)
    with pytest.raises(EdgeError, match=f"{folder}.*({why})"):
        read_pretrained(str(folder))
    assert main([str(folder), str(tmp_path / "out")]) == 1
    assert str(folder) in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_chat_needs_its_template(folders, tmp_path):
    folder = shutil.copytree(folders["smolvlm"], tmp_path / "spoilt")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(EdgeError, match=f"{folder}: expected a chat template"):
        read_pretrained(str(folder))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'][1]['text'] }}")
    with pytest.raises(EdgeError, match="expected a chat template of images, questions and answers, got 'Xq0'"):
        from_hf.chat_prompts(read_pretrained(str(folder)))


def test_a_name_that_the_hub_does_not_give_is_refused(monkeypatch):
    import huggingface_hub

    def offline(name, **_):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        EdgeError, match=r"nobody/nothing: no such folder, and the hub does not give it \(no connection"
    ):
        read_pretrained("nobody/nothing")
    with pytest.raises(EdgeError, match=r"./nowhere: expected a folder of a model, or a name on the hub"):
        read_pretrained("./nowhere")


def test_what_is_no_adapter_of_the_model_is_refused(folders, sources, tmp_path):
    with pytest.raises(EdgeError, match=f"{tmp_path}: expected adapter_config.json, No such file"):
        merged(sources["blip"].model, tmp_path)
    other = read_pretrained(str(folders["clip"])).model
    peft.get_peft_model(other, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(EdgeError, match=f"{tmp_path}: not an adapter of this model: .*q_proj"):
        merged(read_pretrained(str(folders["blip"])).model, tmp_path)


def test_the_command_says_how_the_loss_fell_or_what_is_wrong(folders, photos, tmp_path, capsys):
    command = [str(folders["blip"]), "--data", str(photos), "--out", str(tmp_path / "mine"), "--batch", "6"]
    assert finetune.main([*command, "--steps", "10"]) == 0
    assert "loss" in capsys.readouterr().out and (tmp_path / "mine" / "adapter_model.safetensors").is_file()
    assert finetune.main([*command, "--steps", "9"]) == 1
    assert "at least 10, got 6 and 9" in capsys.readouterr().err


def test_pictures_without_what_is_learned_are_refused(sources, photos, tmp_path):
    with pytest.raises(EdgeError, match="expected at least a batch of 20 pictures with captions, got 6"):
        finetune.finetune(sources["blip"], photos, tmp_path, batch=20)
    with pytest.raises(ValueError, match="--batch of at least 2"):
        finetune.finetune(sources["clip"], photos, tmp_path, batch=1)


@pytest.mark.parametrize(
    ("name", "special"), [("blip_vqa", "[SEP]"), ("smolvlm", "<image>"), ("clip", "<|endoftext|>")]
)
def test_special_tokens_are_never_read_out_of_a_text(name, special, bundles, sources):
    (token,) = sources[name].tokens(special)
    assert sources[name].tokenizer.decode([token]) == special
    assert token not in bundles[name].tokens(f"a ball {special}")


def test_a_chats_prompts_are_read_off_its_template(bundles):
    prompts = bundles["smolvlm"].spec.decoder.prompts
    assert [piece for piece in prompts["question"] if not piece[0].isdigit()] == ["image", "question", " answer"]
    assert prompts["question"][1:] == prompts["next_question"][1:]
    assert bundles["smolvlm"].prompt("caption", begin="red") != bundles["smolvlm"].prompt("caption")


@pytest.mark.parametrize(
    ("prompts", "why"),
    [
        (
            {"joke": ["4"]},
            "prompts for caption and question, next_caption and next_question, got 'joke'",
        ),
        ({"caption": ["answer", "4"]}, "prompts.caption of question, image and tokens, and last answer, got 'answer'"),
        ({"question": ["4", "  question"]}, "prompts.question of question, image and tokens, and last"),
        ({"caption": ["4  5"]}, "prompts.caption of question, image and tokens, and last answer, got '4  5'"),
        ({"caption": ["4", "image"]}, "language.decoder.rows for the image in prompts.caption"),
        ({"caption": ["99"]}, "language.decoder names tokens beyond the"),
    ],
)
def test_prompts_that_cannot_be_are_refused(prompts, why, bundles, tmp_path):
    folder = shutil.copytree(bundles["blip"].bundle.path, tmp_path / "spoilt")
    language = json.loads((folder / "manifest.json").read_text())["language"]
    language["decoder"]["prompts"] = prompts
    edit(folder, "manifest.json", language=language)
    with pytest.raises(BundleError, match=f"{folder}.*{why}"):
        Bundle.read(folder)
