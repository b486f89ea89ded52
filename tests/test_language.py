"""A bundle with a language: what it says is what torch says, and every text is read or refused with a reason."""

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxscript", reason="the bundle is exported here")

from export.language import export_vision_language
from export.quantize import main as quantize
from export.to_tensorrt import build_parts, build_rtx
from mm_edge import engine
from mm_edge.bundle import SHIPPED_VLM, Bundle
from mm_edge.errors import BundleError, EdgeError, EngineError, SampleError
from mm_edge.language import (
    CaptionPipeline,
    GenerationPipeline,
    Language,
    Pieces,
    QuestionPipeline,
    RetrievalPipeline,
    ZeroShotPipeline,
    clean,
)
from mm_edge.types import StreamSpec
from tests import toy_language
from training.vision_language import VisionLanguageModel

WORDS = ["a", "red", "blue", "ball", "box", "is", "it", "yes", "no"]
STREAM = StreamSpec(name="camera", kind="image", shape=(32, 48, 3), rate_hz=10, max_age_ms=1000)
PICTURE = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
OTHER = PICTURE[::-1].copy()


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(1)
    model = VisionLanguageModel(
        (3, 32, 48), text_vocab_size=len(WORDS), text_seq_length=12, fusion_dim=16, heads=2, layers=2,
        spiking_units=24, liquid_units=8,
    )  # fmt: skip
    with torch.no_grad():  # or it says the same word again and again
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def bundle(net, tmp_path_factory):
    folder = tmp_path_factory.mktemp("language") / "bundle"
    tick = {"anchor": "camera", "period_ms": 100, "max_period_ms": 1000}
    report = export_vision_language(net, STREAM, folder, words=WORDS, tick=tick, max_gap_ms=2000)
    assert max(v for k, v in report.items() if k.startswith("max_")) < 1e-4
    return folder


@pytest.fixture(scope="module")
def language(bundle):
    return Language(bundle)


def seen(net, picture=PICTURE):
    return net.encode_image(torch.from_numpy(picture)[None])


@torch.no_grad()
def test_a_caption_is_what_torch_says(net, language):
    said = net.generate(seen(net), net.begin(1), most=9)[0]
    want = [WORDS[t - 1] for t in said.tolist() if 0 < t <= len(WORDS)]
    caption = CaptionPipeline(language)(PICTURE, most=9)
    assert caption.text.split() == want and len(want) > 1
    logits = net.decode(torch.cat([net.begin(1), said[None]], 1), seen(net)).logits[0]
    logits[:, [0, net.special("begin"), net.special("ask"), net.special("hidden")]] = -torch.inf
    sure = logits.log_softmax(-1).max(-1).values[: len(said)].mean().exp()
    assert caption.score == pytest.approx(float(sure), rel=1e-4)


@torch.no_grad()
def test_a_question_is_answered_as_torch_does(net, language):
    asked = torch.tensor([[net.special("begin"), 6, 7, 1, 2, 4, net.special("ask")]])
    said = net.generate(seen(net), asked, most=3)[0]
    want = [WORDS[t - 1] for t in said.tolist() if 0 < t <= len(WORDS)]
    assert QuestionPipeline(language)(PICTURE, "Is it a red ball?", most=3).text.split() == want


@torch.no_grad()
def test_each_word_comes_with_where_the_model_looked(net, language):
    language.look(PICTURE)
    tokens = list(language.say(language.prompt("caption"), most=3))
    assert [len(token.text.split()) for token in tokens] == [1, 2, 3]
    whole = torch.tensor([[net.special("begin"), *(WORDS.index(w) + 1 for w in tokens[1].text.split())]])
    looked = net.decode(whole, seen(net)).attention[-1][0, 0, :, :-1]
    np.testing.assert_allclose([t.attention.ravel() for t in tokens], looked.numpy(), atol=1e-5)


def test_what_is_said_goes_on_from_what_was_begun(language):
    whole = CaptionPipeline(language)(PICTURE, most=6).text
    begin = " ".join(whole.split()[:2])
    assert GenerationPipeline(language)(PICTURE, begin, most=4).text == whole
    assert GenerationPipeline(language)(PICTURE, "", most=6).text == whole


@torch.no_grad()
def test_pictures_and_texts_find_each_other(net, language):
    find = RetrievalPipeline(language)
    find.add([PICTURE, OTHER], ["a red ball", "a blue box"])
    pictures = torch.cat([seen(net).embedding, seen(net, OTHER).embedding])
    scores = pictures @ net.encode_text(torch.tensor([[1, 3, 5]]))[0]
    found = find.search("a blue box", k=2)
    assert [m.number for m in found] == scores.argsort(descending=True).tolist()
    assert [m.score for m in found] == pytest.approx(sorted(scores.tolist(), reverse=True), abs=1e-5)
    assert find.search(OTHER, k=1)[0] == (1, pytest.approx(1, abs=1e-5))
    assert len(find.texts_for(PICTURE, k=5)) == 2


def test_labels_have_scores_that_sum_to_one_the_likeliest_first(language):
    scores = ZeroShotPipeline(language, ["a red ball", "a blue box", "no"])(PICTURE)
    assert sum(scores.values()) == pytest.approx(1) and list(scores.values()) == sorted(scores.values(), reverse=True)
    for labels in ([], ["no", "no"]):
        with pytest.raises(ValueError, match="labels: expected at least one, and each once"):
            ZeroShotPipeline(language, labels)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "expected some words"),
        (" \n\x00\x1b ", "expected some words"),
        ("is it a giraffe", r"expected words that the model knows, got unknown \['giraffe'\]"),
        ("这是什么", "expected words that the model knows"),
        ("a " * 600, "expected at most 1000 characters, got 1200"),
        ("a red ball " * 4, "expected less than 12 tokens with the prompt, got 14"),
    ],
)
def test_a_question_that_cannot_be_read_is_refused_with_the_reason(language, text, why):
    with pytest.raises(SampleError, match=why):
        QuestionPipeline(language)(PICTURE, text)


def test_a_search_may_leave_out_what_nobody_taught(language):
    assert language.unknown("a red ball near the wall") == ["near", "the", "wall"]
    np.testing.assert_array_equal(
        language.embed("red ball!", lenient=True), language.embed("the RED ball", lenient=True)
    )
    with pytest.raises(SampleError, match="unknown"):
        language.embed("the wall", lenient=True)


def test_texts_are_cleaned():
    assert clean("  a\tred\x07  ball\u200b \r\n") == "a red ball"
    assert clean("cafe\u0301") == "caf\u00e9"


def test_frames_one_after_the_other_are_remembered_and_a_picture_alone_is_not(language):
    language.look(OTHER)
    language.look(PICTURE)
    alone = language.seen()
    language.look(PICTURE)
    np.testing.assert_array_equal(language.seen(), alone)


def test_what_is_not_finite_is_told_and_forgotten_with_the_next_picture(language):
    caption = CaptionPipeline(language)
    before = caption(PICTURE)
    language.model.graphs["decoder"].inputs["memory_values"].fill(np.nan)
    with pytest.raises(EngineError, match="the decoder's logits are not finite"):
        list(language.say(language.prompt("caption")))
    assert caption(PICTURE) == before


def test_of_a_picture_that_the_model_cannot_bear_nothing_is_said(bundle, monkeypatch):
    language = Language(bundle)
    language.look(PICTURE)
    graph = language.model.parts["camera"].graph
    run = graph.run
    monkeypatch.setattr(graph, "run", lambda: {**run(), "ok": np.zeros(1, np.float32)})
    with pytest.raises(EngineError, match="what the model makes of this picture is not finite"):
        CaptionPipeline(language)(OTHER)
    with pytest.raises(EngineError, match="expected an embedding of length 1, got one of 0"):
        language.seen()


def test_a_speech_ends_as_the_model_looks_or_speaks_anew(language):
    language.look(PICTURE)
    for interrupt in (lambda: language.look(OTHER), lambda: next(language.say(language.prompt("caption")))):
        speech = language.say(language.prompt("caption"), most=4)
        next(speech)
        interrupt()
        with pytest.raises(EdgeError, match="all that is said before the model looks or speaks anew"):
            next(speech)


def test_a_tokenizer_that_is_damaged_is_refused_and_so_is_a_text_that_it_cannot_read(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="pip install 'mm-edge[language]'")
    path = tmp_path / "tokenizer.json"
    whole = json.loads(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="?")).to_str())
    pieces = Pieces(path, json.dumps(whole).encode())
    assert pieces.encode("a") == ([0], []) and pieces.decode([0]) == "a"
    with pytest.raises(BundleError, match=f"{path}: .*Missing .UNK."):
        pieces.encode("b")
    panics = {**whole, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}
    for data in (b"{}", b"\xff", json.dumps(panics).encode()):
        with pytest.raises(BundleError, match=f"{path}: "):
            Pieces(path, data)


def test_a_decoder_of_eight_bits_is_smaller_and_says_so(bundle, tmp_path, capsys):
    assert quantize([str(bundle), str(tmp_path / "int8")]) == 0
    small, large = Bundle.read(tmp_path / "int8"), Bundle.read(bundle)
    assert len(small.contents["decoder.onnx"]) < len(large.contents["decoder.onnx"])
    assert small.contents["image.onnx"] == large.contents["image.onnx"] and small.scores == {}
    assert small.training["quantized"].endswith(large.id) and b"eight bits" in small.contents["README.md"]
    assert CaptionPipeline(small)(PICTURE, most=1).score == pytest.approx(
        CaptionPipeline(large)(PICTURE, most=1).score, abs=0.1
    )
    assert quantize(["mm_edge/bundles/drive", str(tmp_path / "no")]) == 1
    assert "expected a bundle with a decoder" in capsys.readouterr().err


def test_the_shipped_bundle_is_smaller_than_10_mb():
    assert sum(file.stat().st_size for file in SHIPPED_VLM.iterdir()) < 10e6


def test_a_search_for_articles_alone_is_refused(language):
    with pytest.raises(SampleError, match=r"unknown \['unicorn'\]"):
        language.embed("a unicorn", lenient=True)


def test_a_bundle_without_a_language_says_so():
    with pytest.raises(BundleError, match="expected a bundle with a language"):
        Language("mm_edge/bundles/drive")


def damaged(bundle, tmp_path, change):
    """A copy of the bundle with another manifest."""
    folder = tmp_path / "damaged"
    shutil.copytree(bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_where_the_texts_graph_reads_the_question_one_must_be_asked(bundle, tmp_path):
    folder = damaged(bundle, tmp_path, lambda m: m["language"]["decoder"]["prompts"].update(question=["1"]))
    language = Language(folder)
    language.look(PICTURE)
    assert language.prompt("question", "is it red") == [1]
    with pytest.raises(SampleError, match="expected some words"):
        language.prompt("question")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: m["language"].update(stream="rear"), "language.stream to be one of the images"),
        (lambda m: m["language"].update(scale=0), "language.scale above 0"),
        (lambda m: m["language"].update(text=None, decoder=None), "a text or a decoder"),
        (lambda m: m["language"]["decoder"]["prompts"].update(poem=["1"]), "prompts for caption and question"),
        (lambda m: m["language"]["decoder"]["prompts"].update(caption=["begin"]), "of question, image and tokens"),
        (lambda m: m["language"]["decoder"]["prompts"].update(caption=["99"]), "tokens beyond the 14"),
        (lambda m: m["language"]["decoder"]["prompts"].update(caption=["answer"]), "to have an image or a token"),
        (
            lambda m: m["language"].update(text=None) or m["language"]["decoder"]["prompts"].update(question=["1"]),
            "the question in prompts.question, or a language.text",
        ),
        (lambda m: m["language"]["decoder"].update(unsaid=[-1]), r"tokens from 0 to 2\*\*31"),
        (lambda m: m["language"]["text"].update(begin=[2**31]), r"tokens from 0 to 2\*\*31"),
        (
            lambda m: m["language"]["text"].update(uses={"tokens": "camera.embedding"}),
            "text.uses to name inputs of its",
        ),
        (lambda m: m["language"]["decoder"]["uses"].update(mask="camera.embedding"), "uses to name inputs of its own"),
        (lambda m: m["language"]["decoder"].update(rows="camera.embedding"), r"rows: expected float32 \(1, n, D\)"),
        (lambda m: m["language"]["decoder"].update(rows="text.embedding"), "rows expects an output of a part before"),
        (
            lambda m: m["outputs"].update(attention={"source": "text.embedding", "stream": "camera"}),
            "outputs.attention expects an output of a part before it",
        ),
        (lambda m: m["language"]["decoder"].update(length=11), r"'keys': expected \(layers, heads, d, 11\)"),
        (lambda m: m["language"]["decoder"].update(uses={}), "'memory_keys': expected nothing"),
        (lambda m: m["language"]["text"].update(length=13), "inputs 'tokens'"),
        (lambda m: m["parts"][0].update(name="text"), "no part to be called"),
        (lambda m: m["files"].pop("vocabulary.json"), "files to list .*tokenizer.json"),
    ],
)
def test_a_manifest_that_does_not_fit_its_graphs_is_refused(bundle, tmp_path, change, why):
    with pytest.raises(BundleError, match=why):
        Bundle.read(damaged(bundle, tmp_path, change))


@pytest.mark.parametrize(
    ("name", "old", "new", "why"),
    [
        ("text", " embedding", " vector", r"text.onnx: outputs 'embedding': expected float32 \(1, 2\), got nothing"),
        ("decoder", "2,2] attention", "4] attention", r"outputs 'attention': expected float32 \(1, rows, columns\)"),
    ],
)
def test_a_graph_that_does_not_give_what_is_asked_of_it_is_refused(tmp_path, monkeypatch, name, old, new, why):
    graph = toy_language.GRAPHS[name].replace(old, new)
    monkeypatch.setitem(toy_language.GRAPHS, name, graph)
    with pytest.raises(BundleError, match=why):
        toy_language.write_toy_language(tmp_path / "toy")


def test_the_golden_trace_covers_text_and_decoder(bundle, tmp_path):
    read = Bundle.read(bundle)
    for name in ("language.embedding", "language.logits"):
        wrong = {**read.golden, name: read.golden[name] + 0.1}
        changed = Bundle(**{**vars(read), "golden": wrong})
        with pytest.raises(EngineError, match=rf"does not reproduce the golden trace: {name} is off by 0.1"):
            engine.load(changed, "cpu")
    without = {k: v for k, v in read.golden.items() if k != "language.text"}
    with pytest.raises(BundleError, match=r"golden.npz: expected .*language.text"):
        engine.load(Bundle(**{**vars(read), "golden": without}), "cpu")


def test_every_graph_builds_for_tensorrt(bundle):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'mm-edge[trt-rtx]'")
    assert list(build_parts(Bundle.read(bundle), build_rtx)) == ["camera", "text", "decoder"]
