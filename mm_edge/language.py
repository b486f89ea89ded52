"""What is to be seen in words: captions, answers, labels, and pictures found by text or by each other.

    caption = CaptionPipeline("mm_edge/bundles/vlm")
    caption(image).text                                  # uint8 (h, w, 3) RGB -> "a red ball and a blue box ..."
    QuestionPipeline(...)(image, "which coloured object is left of the red ball")
    RetrievalPipeline(...).search("a red ball", k=5)      # after .add(images)
    ZeroShotPipeline(..., ["a red ball", "a blue box"])(image)
    GenerationPipeline(...)(image, "the robot sees")      # goes on with what is said already
    QuestionPipeline(...)(image, "how many", examples=[(other, "how many", "two"), ...])     # of models that can

Each pipeline takes a bundle's folder, a Bundle, or a `Language` that others use, too. On a robot the model looks at a
stream of frames instead, in a `Pipeline`; `Language` is what both have in common.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from mm_edge import engine as engines
from mm_edge.bundle import Bundle
from mm_edge.engine.decoder import Decoder
from mm_edge.engine.golden import held
from mm_edge.engine.part import Fresh, Model, ModelInputs
from mm_edge.errors import BundleError, EdgeError, EngineError, SampleError, needs
from mm_edge.manifest import TOKENIZER
from mm_edge.preprocess import Vocabulary, check, fitted, resize
from mm_edge.types import Caption

LONGEST_TEXT = 1000  # characters
ARTICLES = {"a", "an", "the"}  # say nothing alone
MOST_TOKENS = 64  # that are said at once
CHANGE = 0.15  # of a scene, from which on it wants another caption; see vlm.yaml
GREY = 24, 32  # rows and columns by which scenes are compared without embeddings


class Tokenizer(Protocol):
    def encode(self, text: str) -> tuple[list[int], list[str]]:
        """The tokens of a text, and the words that are none."""

    def decode(self, tokens: Sequence[int]) -> str: ...


class Words:
    """Each word a token. What else there is, is silent."""

    def __init__(self, vocabulary: Vocabulary):
        self._words, self.encode = vocabulary.words, vocabulary.read

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(self._words[t - 1] for t in tokens if 0 < t <= len(self._words))


class Pieces:
    """A tokenizer.json of the `tokenizers` library. Its special tokens are never read out of a text."""

    def __init__(self, path: Path, data: bytes):
        with needs("a pretrained model's tokenizer", "tokenizers", "language"):
            import tokenizers
        self._path = path
        with self._named():
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode())
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def encode(self, text: str) -> tuple[list[int], list[str]]:
        with self._named():
            return self._tokenizer.encode(text, add_special_tokens=False).ids, []

    def decode(self, tokens: Sequence[int]) -> str:
        with self._named():
            return self._tokenizer.decode(list(tokens), skip_special_tokens=True).strip()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Whatever a tokenizer raises that is damaged, or made to do harm, becomes BundleError."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # plain Exception; a panic of Rust is not even that
            raise BundleError(f"{self._path}: {type(error).__name__}: {error}") from None


class Token(NamedTuple):
    """One more of what is said."""

    text: str  # all so far
    logprob: float
    attention: np.ndarray | None  # (rows, cols): where the model looked as it said it


def clean(text: str) -> str:
    """Without control characters, in NFC, blanks as single spaces. Raises SampleError for what is no text."""
    if not isinstance(text, str):
        raise SampleError("text", "str", type(text).__name__)
    if len(text) > LONGEST_TEXT:
        raise SampleError("text", f"at most {LONGEST_TEXT} characters", f"{len(text)}")
    kept = "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    return " ".join(unicodedata.normalize("NFC", kept).split())


class Language:
    """A bundle that knows words. For one thread at a time, but for `readable`.

    Args:
        bundle: its folder, or the bundle.
        model: one that a `Pipeline` runs, which then looks; otherwise one of its own on `engine`.

    Raises BundleError if the bundle knows no words; EngineError or MissingDependency if nothing can run it.
    """

    def __init__(self, bundle: str | Path | Bundle, engine: str = "auto", model: Model | None = None):
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.read(bundle)
        if self.bundle.language is None:
            raise BundleError(f"{self.bundle.path}: expected a bundle with a language, this one has none")
        self.spec = self.bundle.language
        self.stream = next(s for s in self.bundle.streams if s.name == self.spec.stream)
        self.tokenizer: Tokenizer
        if self.bundle.vocabulary is not None:
            self.tokenizer = Words(self.bundle.vocabulary)
        else:
            self.tokenizer = Pieces(self.bundle.path / TOKENIZER, self.bundle.contents[TOKENIZER])
        self.model = model or engines.load(self.bundle, engine)
        self._decoder = Decoder(self.model.graphs["decoder"]) if self.spec.decoder else None
        self._speech: object = None  # that goes on

    @classmethod
    def of(cls, source: Source) -> Language:
        return source if isinstance(source, Language) else cls(source)

    def look(self, image: np.ndarray) -> None:
        """See one picture, uint8 (h, w, 3) RGB, and nothing before it. Raises SampleError if it is none, EngineError if
        what the model makes of it is not finite."""
        check(self.stream, image)
        self._speech = None
        m = len(self.bundle.streams)
        period_s = self.bundle.tick.period_ms / 1e3
        fresh = {self.stream.name: Fresh(fitted(self.stream, image), period_s, True)}
        mask = np.array([spec.name == self.stream.name for spec in self.bundle.streams], np.float32)
        outputs = self.model.step(ModelInputs(fresh, mask, np.zeros(m, np.float32), period_s, True))
        if outputs.reasons or not outputs.mask.any():
            raise EngineError(f"{self.bundle.path}: what the model makes of this picture is not finite")

    def seen(self) -> np.ndarray:
        """The embedding float32 (D,), of length 1, of what was seen last. Raises EngineError if it has none."""
        if self.bundle.outputs.embedding is None:
            raise BundleError(f"{self.bundle.path}: expected a bundle that compares, this one has no embedding")
        return self._of_length_1(held(self.model, self.bundle.outputs.embedding.source)[0])

    def scene(self, image: np.ndarray) -> np.ndarray:
        """By what the image that was seen last is compared with others: its embedding, or else itself, small, grey."""
        return self.seen() if self.bundle.outputs.embedding else resize(image, *GREY).mean(axis=2) / 255

    def embed(self, text: str, lenient: bool = False) -> np.ndarray:
        """The embedding float32 (D,), of length 1, of a text. `lenient`: without the words that it does not know.
        Raises SampleError for a text that cannot be read, EngineError if the model makes nothing of it."""
        return self._of_length_1(self.model.read(self.readable(text, lenient))["embedding"][0])

    def _of_length_1(self, embedding: np.ndarray) -> np.ndarray:
        length = float(np.linalg.norm(embedding))
        if not abs(length - 1) < 0.01:  # not of NaN either
            raise EngineError(f"{self.bundle.path}: expected an embedding of length 1, got one of {length:.3g}")
        return embedding.copy()

    def readable(self, text: str, lenient: bool = False) -> np.ndarray:
        """The tokens int64 (length,) of a text to embed. Raises SampleError for a text that cannot be read."""
        if self.spec.text is None or self.bundle.outputs.embedding is None:
            raise BundleError(f"{self.bundle.path}: expected a bundle that compares, this one has no embedding")
        return self._padded(self.tokens(text, lenient))

    def tokens(self, text: str, lenient: bool = False, before: str = "") -> list[int]:
        """Of a text with, say, a blank `before` it. Raises SampleError for an empty text or, unless `lenient` and more
        than articles is left, for one with words that nobody taught it."""
        tokens, unknown = self.tokenizer.encode(before + clean(text))
        left = set(clean(text).lower().split()) - set(unknown) - ARTICLES
        if unknown and not (lenient and left):
            raise SampleError("text", "words that the model knows", f"unknown {unknown[:5]}")
        if not tokens:
            raise SampleError("text", "some words", repr(text[:40]))
        return tokens

    def unknown(self, text: str) -> list[str]:
        """The words of a text that the model does not know."""
        return self.tokenizer.encode(clean(text))[1]

    def _padded(self, tokens: Sequence[int]) -> np.ndarray:
        spec = self.spec.text
        assert spec is not None
        room = spec.length - len(spec.begin) - len(spec.end)
        if len(tokens) > room:
            raise SampleError("text", f"at most {room} tokens", f"{len(tokens)}")
        padded = np.zeros(spec.length, np.int64)
        padded[: len(tokens) + spec.length - room] = [*spec.begin, *tokens, *spec.end]
        return padded

    def rows(self) -> np.ndarray:
        """What of the image that was seen last goes into a prompt: float32 (n, D), to keep; (0, 0) if nothing does."""
        spec = self.spec.decoder
        return held(self.model, spec.rows)[0].copy() if spec and spec.rows else np.zeros((0, 0), np.float32)

    def expect(self, name: str) -> None:
        """Raises BundleError unless the bundle has a prompt of this name."""
        known = sorted(self.spec.decoder.prompts) if self.spec.decoder else []
        if name.startswith("next_") and name.removeprefix("next_") in known and name not in known:
            raise BundleError(f"{self.bundle.path}: expected a bundle that learns from examples, this one does not")
        if name not in known:
            raise BundleError(f"{self.bundle.path}: expected a bundle with a prompt for a {name}, it has {known}")

    def about(
        self,
        image: np.ndarray,
        name: str,
        question: str | None = None,
        begin: str = "",
        examples: Iterable[tuple[np.ndarray, str | None, str]] = (),
    ) -> tuple[list[int], np.ndarray]:
        """Look at an image. A prompt about it, and the rows (n, D) of all the images in it: behind `examples`, each an
        image, a question, if one is asked, and what is to be said, which are looked at before. Raises as `prompt`."""
        prompt, rows, ask = list[int](), list[np.ndarray](), name
        for shown, asked, answer in examples:
            self.look(shown)
            prompt = self.prompt(ask, asked, answer, prompt)
            rows.append(self.rows())
            ask = f"next_{name}"
        self.look(image)
        return self.prompt(ask, question, begin, prompt), np.concatenate([*rows, self.rows()])

    def prompt(self, name: str, question: str | None = None, begin: str = "", before: Sequence[int] = ()) -> list[int]:
        """The tokens of a prompt, such as "caption" or "question", behind those `before` it, with the question in its
        place and what is said already behind it; -1 for each row of the image. A question that the text's graph reads
        is read, about what was seen last. Raises BundleError for a prompt that it does not know, SampleError."""
        self.expect(name)
        spec = self.spec.decoder
        assert spec is not None
        tokens, blank, asked = list(before), "", not name.endswith("question")
        for piece in spec.prompts[name]:
            if piece == "image":
                assert spec.rows is not None
                tokens += [-1] * held(self.model, spec.rows).shape[1]
            elif piece.endswith("question"):
                if question is not None:
                    tokens += self.tokens(question, before=piece.removesuffix("question"))
                asked = True
            elif piece.endswith("answer"):
                blank = piece.removesuffix("answer")
            else:
                tokens += map(int, piece.split())
        if not asked:
            self._speech = None
            self.model.read(self._padded(self.tokens(question or "")))
        tokens += self.tokens(begin, before=blank) if begin else []
        if len(tokens) >= spec.length:
            raise SampleError("text", f"less than {spec.length} tokens with the prompt", f"{len(tokens)}")
        return tokens

    def say(
        self,
        prompt: Sequence[int],
        most: int = MOST_TOKENS,
        rows: np.ndarray | None = None,
        begun: Sequence[int] = (),
    ) -> Iterator[Token]:
        """What comes after the prompt, about what was seen last: the likeliest token after the other, until its end.
        `rows` (n, D) of the images in the prompt, if they are several. `begun`: tokens with which each text begins.
        Raises EngineError where the decoder gives nothing finite; EdgeError where it is to go on, and the model has
        looked, been asked or spoken since."""
        spec, decoder = self.spec.decoder, self._decoder
        assert spec is not None and decoder is not None
        self._speech = speech = object()
        decoder.reset()
        row = iter(self.rows() if rows is None else rows)
        for token in prompt:
            outputs = decoder.feed(token, next(row) if token == -1 else None)
        said: list[int] = []
        while True:
            logits = outputs["logits"][0]
            logits[list(spec.unsaid)] = -np.inf
            if not np.isfinite(logits.max()):  # NaN, if there is any
                raise EngineError(f"{self.bundle.path}: the decoder's logits are not finite")
            token = int(logits.argmax())
            if token == spec.end:
                return
            said.append(token)
            logprob = -float(np.log(np.exp(logits - logits[token]).sum()))
            yield Token(self.tokenizer.decode([*begun, *said]), logprob, _attention(outputs))
            if self._speech is not speech:
                raise EdgeError("expected to be asked for all that is said before the model looks or speaks anew")
            if len(said) >= most or decoder.seen == decoder.length:
                return
            outputs = decoder.feed(token)


def change(scene: np.ndarray, other: np.ndarray) -> float:
    """Of two scenes: the cosine distance of their embeddings, 0 to 2, or their mean difference, 0 to 1."""
    return float(1 - scene @ other if scene.ndim == 1 else np.abs(scene - other).mean())


Source = str | Path | Bundle | Language


def _attention(outputs: dict[str, np.ndarray]) -> np.ndarray | None:
    return outputs["attention"][0].copy() if "attention" in outputs else None


def caption_of(tokens: Iterable[Token]) -> Caption:
    """All that is said, and how sure: the geometric mean of the tokens' probabilities."""
    text, logprobs = "", list[float]()
    for token in tokens:
        text = token.text
        logprobs.append(token.logprob)
    return Caption(text, float(np.exp(np.mean(logprobs))) if logprobs else 0.0)


def words_of(tokens: Iterable[Token]) -> list[tuple[str, np.ndarray | None]]:
    """The words of what is said, each with the mean attention (rows, cols) of its tokens."""
    words, seen, said = list[str](), list[list[np.ndarray]](), 0
    for token in tokens:
        more, said = token.text[said:], len(token.text)
        if not words or more[:1].isspace():
            words.append("")
            seen.append([])
        words[-1] += more.strip()
        seen[-1] += [token.attention] if token.attention is not None else []
    return [(word, np.mean(those, axis=0) if those else None) for word, those in zip(words, seen)]


class CaptionPipeline:
    """image -> Caption. `examples`: images and their captions, for models that learn from what a prompt shows. Raises
    BundleError for a bundle that says no captions."""

    def __init__(self, bundle: Source):
        self.language = Language.of(bundle)
        self.language.expect("caption")

    def __call__(
        self, image: np.ndarray, most: int = MOST_TOKENS, examples: Sequence[tuple[np.ndarray, str]] = ()
    ) -> Caption:
        shown = [(example, None, caption) for example, caption in examples]
        prompt, rows = self.language.about(image, "caption", examples=shown)
        return caption_of(self.language.say(prompt, most, rows))


class GenerationPipeline:
    """image, the begin of what is to be said -> Caption, with that begin. Raises BundleError for a bundle that says no
    captions."""

    def __init__(self, bundle: Source):
        self.language = Language.of(bundle)
        self.language.expect("caption")

    def __call__(self, image: np.ndarray, begin: str, most: int = MOST_TOKENS) -> Caption:
        prompt, rows = self.language.about(image, "caption", begin=begin)
        begun = self.language.tokens(begin) if begin else []
        said = caption_of(self.language.say(prompt, most, rows, begun))
        # Its first token may end a word that was begun. What was begun stays as it was written.
        more = said.text[len(self.language.tokenizer.decode(begun)) :]
        return Caption(clean(begin) + more, said.score)


class QuestionPipeline:
    """image, question -> Caption, the answer. `examples`: images, questions and their answers, for models that learn
    from what a prompt shows. Raises BundleError for a bundle that answers none."""

    def __init__(self, bundle: Source):
        self.language = Language.of(bundle)
        self.language.expect("question")

    def __call__(
        self,
        image: np.ndarray,
        question: str,
        most: int = MOST_TOKENS,
        examples: Sequence[tuple[np.ndarray, str | None, str]] = (),
    ) -> Caption:
        prompt, rows = self.language.about(image, "question", question, examples=examples)
        return caption_of(self.language.say(prompt, most, rows))


class Match(NamedTuple):
    """Something found: its number in the order in which it was added, and how alike, -1 to 1."""

    number: int
    score: float


class RetrievalPipeline:
    """Images found by a text or an image, and texts by an image."""

    def __init__(self, bundle: Source):
        self.language = Language.of(bundle)
        self._images: list[np.ndarray] = []
        self._texts: list[np.ndarray] = []

    def add(self, images: Iterable[np.ndarray] = (), texts: Iterable[str] = ()) -> None:
        self._images += [self._embed(image) for image in images]
        self._texts += [self.language.embed(text) for text in texts]

    def search(self, query: str | np.ndarray, k: int = 5) -> list[Match]:
        """The k images that are most like a text, or like an image."""
        return _nearest(self._images, self.language.embed(query) if isinstance(query, str) else self._embed(query), k)

    def texts_for(self, image: np.ndarray, k: int = 5) -> list[Match]:
        """The k texts that fit an image best."""
        return _nearest(self._texts, self._embed(image), k)

    def _embed(self, image: np.ndarray) -> np.ndarray:
        self.language.look(image)
        return self.language.seen()


def _nearest(candidates: Sequence[np.ndarray], query: np.ndarray, k: int) -> list[Match]:
    if not candidates:
        return []
    scores = np.stack(candidates) @ query
    return [Match(int(i), float(scores[i])) for i in np.argsort(-scores, kind="stable")[:k]]


class ZeroShotPipeline:
    """image -> the probability of each of the user's labels, as texts, the likeliest first.

    Raises ValueError without labels or for one that is there twice; SampleError for one that the model cannot read.
    """

    def __init__(self, bundle: Source, labels: Sequence[str]):
        self.language, self.labels = Language.of(bundle), tuple(labels)
        if not 0 < len(set(self.labels)) == len(self.labels):
            raise ValueError(f"labels: expected at least one, and each once, got {list(self.labels)}")
        self._embeddings = np.stack([self.language.embed(label) for label in self.labels])

    def __call__(self, image: np.ndarray) -> dict[str, float]:
        self.language.look(image)
        return self.scores()

    def scores(self) -> dict[str, float]:
        """Of what the language's model saw last."""
        logits = self.language.spec.scale * (self._embeddings @ self.language.seen())
        shares = np.exp(logits - logits.max())
        ranked = sorted(zip(self.labels, (shares / shares.sum()).tolist()), key=lambda pair: -pair[1])
        return dict(ranked)
