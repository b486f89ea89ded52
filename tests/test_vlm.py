"""Pictures and words: shapes, state, what is said one word after the other, and lessons that say what is there."""

from itertools import pairwise

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch")
pytest.importorskip("accelerate", reason="training needs accelerate")
pytest.importorskip("mujoco", reason="scenes are simulated")

pytest.importorskip("onnxscript", reason="bundles are exported")

from safetensors.torch import save_file

from export.language import export_vision_language
from mm_edge.language import Language
from training import plots, scenes, vlm
from training.recipe import read_recipe
from training.scene_scores import InBundle, InTorch, score
from training.scenes import Seen
from training.train import RECIPES, same_recipe
from training.vision_language import VisionLanguageModel

SMALL = {"fusion_dim": 16, "heads": 2, "layers": 1, "spiking_units": 24, "liquid_units": 8}
THINGS = tuple(
    Seen(colour, shape, at, 1.5, np.zeros((0, 0), bool))
    for colour, shape, at in (("red", "ball", 0.1), ("blue", "box", 0.5), ("red", "pillar", 0.9))
)


def model(**more) -> VisionLanguageModel:
    torch.manual_seed(0)
    return VisionLanguageModel((3, 32, 48), text_vocab_size=9, text_seq_length=12, **{**SMALL, **more}).eval()


def test_a_picture_and_a_text_give_logits_embeddings_and_attention():
    out = model()(torch.randn(2, 3, 32, 48), torch.randint(1, 10, (2, 5)), return_attention_maps=True)
    assert out.output.shape == (2, 5, 1 + 9 + 4)
    assert out.image_embedding.norm(dim=-1).tolist() == pytest.approx([1, 1])
    assert out.text_embedding.norm(dim=-1).tolist() == pytest.approx([1, 1])
    assert out.attention_maps.shape == (2, 1, 2, 5, 4, 6)  # layers, heads, tokens, rows and columns of 8 pixels
    assert model(num_classes=3)(torch.randn(2, 3, 32, 48), torch.randint(1, 10, (2, 5))).output.shape == (2, 3)


@pytest.mark.parametrize(
    ("image", "text", "why"),
    [
        ((2, 3, 32, 40), (2, 5), r"image: expected \(batch, \[time,\] 3, 32, 48\), got a frame of \(3, 32, 40\)"),
        ((2, 3, 32, 48), (2, 13), r"text: expected \(2, up to 12\) tokens, got \(2, 13\)"),
        ((2, 3, 32, 48), (3, 5), r"text: expected \(2, up to 12\) tokens, got \(3, 5\)"),
    ],
)
def test_what_does_not_fit_is_refused(image, text, why):
    with pytest.raises(ValueError, match=why):
        model()(torch.randn(image), torch.ones(text, dtype=torch.int64))


@torch.no_grad()
def test_frames_one_after_the_other_are_a_sequence():
    net, frames, dt = model(), torch.randn(2, 4, 3, 32, 48), torch.rand(2, 4, 1)
    together, state = net.encode_image(frames, dt=dt), None
    for t in range(4):
        seen = net.encode_image(frames[:, t], state, dt[:, t : t + 1])
        state = seen.state
    torch.testing.assert_close(seen.embedding, together.embedding)
    torch.testing.assert_close(seen.cells, together.cells)
    assert not torch.allclose(seen.embedding, net.encode_image(frames[:, 3]).embedding)  # it remembers


@torch.no_grad()
def test_padding_before_or_behind_a_text_changes_nothing():
    net = model()
    seen, text = net.encode_image(torch.randn(1, 3, 32, 48)), torch.tensor([[3, 4, 5]])
    alone = net.decode(text, seen).logits[:, -1]
    torch.testing.assert_close(net.decode(torch.tensor([[0, 0, 3, 4, 5]]), seen).logits[:, -1], alone)
    torch.testing.assert_close(net.decode(torch.tensor([[3, 4, 5, 0]]), seen).logits[:, 2], alone)
    torch.testing.assert_close(net.encode_text(torch.tensor([[3, 4, 5, 0]])), net.encode_text(text))


@torch.no_grad()
def test_what_comes_later_is_not_known_yet():
    net = model()
    seen = net.encode_image(torch.randn(1, 3, 32, 48))
    one, other = (net.decode(torch.tensor([[3, 4, last]]), seen).logits[:, :2] for last in (5, 6))
    torch.testing.assert_close(one, other)


@torch.no_grad()
def test_what_is_said_is_the_likeliest_word_each_time_until_the_end():
    net = model()
    seen = net.encode_image(torch.randn(3, 3, 32, 48))
    said, texts = net.generate(seen, net.begin(3), most=6), net.begin(3)
    for t in range(said.shape[1]):
        token = net.decode(texts, seen).logits[:, -1].argmax(-1)
        ended = (said[:, :t] == 0).any(1) | (token == net.special("end"))
        assert (said[:, t] == torch.where(ended, 0, token)).all()
        texts = torch.cat([texts, said[:, t : t + 1]], 1)


def test_a_spoilt_caption_is_wrong_in_one_thing():
    rng, names = np.random.default_rng(0), [thing.name for thing in THINGS]
    swapped = 0
    for _ in range(200):
        caption = scenes.captions(THINGS, rng)[rng.integers(5)]
        right, wrong = caption.replace(",", " ,").split(), vlm.spoilt(caption, THINGS, rng).split()
        assert len(right) == len(wrong)
        pairs = list(pairwise(wrong))
        said = [f"{c} {vlm.SHAPE_OF[w]}" for c, w in pairs if c in vlm.COLOURS and w in vlm.SHAPE_OF]
        if sorted(said) == sorted(names):  # two of them changed places, where it is said in which order they are
            assert said != names and ("left to right" in caption or "to the left of" in caption)
            swapped += 1
        else:
            assert sum(name not in names for name in said) == 1
        assert all((word == "an") == (after[0] in "aeiou") for word, after in pairs if word in ("a", "an"))
    assert 20 < swapped < 100


def test_lessons_say_what_the_picture_shows(tmp_path):
    recipe = read_recipe(RECIPES / "vlm.yaml", ["rounds=[{episodes: 6, first_seed: 5000, steps: 1}]", "train.lanes=8"])
    supply, learner = vlm.supply(recipe, 0, tmp_path, 1), vlm.build_model(recipe)
    texts = vlm.Texts(scenes.words())
    label = {name: value[:, 0] for name, value in supply.next().labels.items()}
    for i in range(8):
        said = label["caption"][i].tolist()
        spoken = texts.text(said).split()
        assert said[0] == texts.begin and texts.text(label["text"][i].tolist()).split() == spoken
        asked = label["question"][i].tolist()
        assert asked[label["asked"][i]] == texts.ask and asked[asked.index(texts.end) - 1] > 0
        for k, thing in enumerate(label["look"][i].tolist()):
            if thing >= 0:  # the next word is a shape, and most of the thing's cells are of it
                filled = label["cell"][i, 1][label["shares"][i, thing] >= 0.5]
                shape = vlm.SHAPES.index(vlm.SHAPE_OF[texts.text([said[k + 1]])])
                assert (filled == shape).float().mean() > 0.9 or not len(filled)
    assert learner.names == ("image",) and set(label["look"].flatten().tolist()) > {-1}
    saved, again = supply.state_dict(), vlm.supply(recipe, 0, tmp_path, 1)
    want = supply.next().labels
    again.load_state_dict(saved)
    assert all(torch.equal(value, want[name]) for name, value in again.next().labels.items())  # it goes on exactly


def test_scores_of_a_model_that_knows_nothing_are_low(tmp_path):
    recipe = read_recipe(RECIPES / "vlm.yaml")
    net, shown = vlm.build_model(recipe), [scenes.make_scene(seed) for seed in range(5000, 5006)]
    scores = score(InTorch(net), shown)
    assert scores["scenes"] == 6 and scores["questions"] > 40
    assert scores["vqa"]["overall"] < 0.3 < scores["vqa_blind"] and scores["bleu4"] < 0.1
    assert scores["meteor"] < 0.3 and scores["attention_iou"] < 0.3 and scores["zero_shot_scenes"] == 1


class Parrot:
    """Knows of each scene the second caption, and what is asked of one object alone."""

    def __init__(self, shown: list[scenes.Scene]):
        self._shown = {scene.image.tobytes(): scene for scene in shown}

    def look(self, image: np.ndarray) -> np.ndarray:
        self._scene = self._shown[image.tobytes()]
        return self.embed(self._scene.captions[0])

    def embed(self, text: str) -> np.ndarray:
        return np.random.default_rng(list(text.encode())).normal(size=64)

    def caption(self) -> str:
        return self._scene.captions[1].replace(",", "")

    def answer(self, question: str) -> str:
        alone = len(self._scene.things) == 1
        return next(q.answer for q in self._scene.questions if q.text == question) if alone else "purple"

    def looked(self, caption: str) -> np.ndarray:
        weights = np.zeros((len(caption.split()) + 1, *vlm.GRID), np.float32)
        weights[:, 0] = 1
        return weights


def test_scores_tell_what_is_easy_from_what_is_not():
    shown = [scenes.make_scene(seed) for seed in range(5000, 5006)]
    assert {len(scene.things) for scene in shown} == {0, 1, 2, 3}
    scores = score(Parrot(shown), shown)
    assert scores["names_right"] == scores["image_to_text"]["recall@1"] == scores["text_to_image"]["recall@1"] == 1
    assert scores["vqa_by_objects"] == {"0": 0, "1": 1, "2": 0, "3": 0} and 0 < scores["vqa"]["overall"] < 1
    wrong = Parrot(shown)
    wrong.caption = lambda: "the robot sees a red ball and a red box and a red pillar"
    scores = score(wrong, shown)  # its words are right here and there
    assert scores["names_right"] == 0 < scores["bleu4"]


def test_a_bundle_has_the_scores_of_its_weights(tmp_path):
    """Sayings of a few words, so that whether it ends them is compared, too."""
    recipe = read_recipe(RECIPES / "vlm.yaml", ["model={fusion_dim: 16, text_seq_length: 48, layers: 2, heads: 2, "
        "spiking_units: 24, liquid_units: 8}"])  # fmt: skip
    net, shown = vlm.build_model(recipe), [scenes.make_scene(seed) for seed in range(5000, 5004)]
    export_vision_language(
        net, recipe.streams[0], tmp_path / "bundle", words=vlm.words(recipe), tick=recipe.tick, max_gap_ms=2000
    )
    assert score(InBundle(Language(tmp_path / "bundle")), shown) == score(InTorch(net), shown)


def test_an_object_is_told_by_the_nearest_of_all_labels():
    """Embeddings that a hand made: pictures are where the text of their object is."""
    shown = [scene for seed in range(5000, 5012) if len((scene := scenes.make_scene(seed)).things) == 1]
    net = vlm.build_model(read_recipe(RECIPES / "vlm.yaml"))
    texts, labels = vlm.Texts(scenes.words()), vlm.labelled()
    assert len(labels) == 18 and labels["orange ball"] == "an orange ball"
    pointers = iter([labels[scene.things[0].name] for scene in shown])
    seen = net.encode_image

    def told(frames):
        return seen(frames)._replace(embedding=net.encode_text(torch.tensor([texts.tokens(next(pointers))])))

    net.encode_image = told
    assert score(InTorch(net), shown)["zero_shot"] == 1


def test_plots_are_made_of_weights_and_their_recipe(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="draws")
    pytest.importorskip("sklearn", reason="t-SNE")
    overrides = ["model={fusion_dim: 16, text_seq_length: 48, layers: 2, heads: 2, spiking_units: 24, liquid_units: 8}"]
    recipe = read_recipe(RECIPES / "vlm.yaml", overrides)
    weights = tmp_path / "final.safetensors"
    assert plots.main([str(weights)]) == 1 and "got no such file" in capsys.readouterr().err
    same_recipe(recipe, tmp_path)
    save_file(vlm.build_model(recipe).state_dict(), weights)
    assert plots.main([str(weights), "--scenes", "24"]) == 0
    for name in ("attention", "similarity", "embeddings"):
        drawn = cv2.imread(str(tmp_path / "plots" / f"{name}.png"))
        assert min(drawn.shape[:2]) > 400 and drawn.std() > 10
