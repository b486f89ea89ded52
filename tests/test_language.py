"""A bundle with a language: what it says is what torch says, and every text is read or refused with a reason."""

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxscript", reason="the bundle is exported here")

from export.language import export_vision_language
from export.to_tensorrt import build_parts, build_rtx
from mm_edge import engine
from mm_edge.bundle import Bundle
from mm_edge.errors import BundleError, EngineError, SampleError
from mm_edge.language import (
    CaptionPipeline,
    GenerationPipeline,
    Language,
    QuestionPipeline,
    RetrievalPipeline,
    ZeroShotPipeline,
    clean,
)
from mm_edge.types import StreamSpec
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
    with pytest.raises(ValueError, match="labels: expected at least one"):
        ZeroShotPipeline(language, [])


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


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: m["language"].update(stream="rear"), "language.stream to be one of the images"),
        (lambda m: m["language"].update(scale=0), "language.scale above 0"),
        (lambda m: m["language"].update(text=None, decoder=None), "a text or a decoder"),
        (lambda m: m["language"]["decoder"]["prompts"].update(poem=["1"]), "prompts for caption and question"),
        (lambda m: m["language"]["decoder"]["prompts"].update(caption=["begin"]), "of question, image and tokens"),
        (lambda m: m["language"]["decoder"]["prompts"].update(caption=["99"]), "tokens beyond the 14"),
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
