"""`manifest.json` of a bundle as dataclasses, key by key, and the strict reading of it.

Unknown keys, missing keys, wrong types and numbers that cannot be are refused with BundleError, naming the key.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_edge.errors import BundleError
from mm_edge.preprocess import AUDIO_FRAME, AUDIO_HOP_S
from mm_edge.types import FITS, KINDS, StreamSpec

FORMAT = 1
MAX_TOKENS = 100_000  # of a prompt and what is said
INTERFACES = ("velocity", "position")
PROMPTS = ("caption", "question", "next_caption", "next_question")
TEXT_INPUTS, DECODER_INPUTS = {"tokens"}, {"token", "place", "keys", "values", "mask", "row"}
MANIFEST, GOLDEN, VOCABULARY, TOKENIZER = "manifest.json", "golden.npz", "vocabulary.json", "tokenizer.json"


@dataclass(frozen=True)
class Tick:
    anchor: str
    period_ms: float
    max_period_ms: float
    min_period_ms: float = 0.0  # for an anchor whose samples come faster than ticks are wanted, such as sound


@dataclass(frozen=True)
class PartSpec:
    """One ONNX graph. Runs when `stream` is fresh, or on every tick if it has none. `uses` names inputs that are fed
    from outputs of parts before it, as "part.output"; `state` gives the shape of each carried tensor."""

    name: str
    file: str
    stream: str | None
    state: dict[str, tuple[int, ...]]
    uses: dict[str, str]


@dataclass(frozen=True)
class ActionSpec:
    """`source` is an output of shape (1, H, A); the rest has one entry for each of A dimensions."""

    source: str
    names: tuple[str, ...]
    units: tuple[str, ...]
    dt_s: float
    min: tuple[float, ...]
    max: tuple[float, ...]
    max_rate: tuple[float, ...]  # units per second
    interface: str = "velocity"  # or "position", of joints: one of INTERFACES


@dataclass(frozen=True)
class AttentionSpec:
    source: str  # an output of shape (1, rows, cols)
    stream: str


@dataclass(frozen=True)
class GatesSpec:
    source: str  # an output of shape (1, M): a weight for each stream


@dataclass(frozen=True)
class EventsSpec:
    """Classes that happen; see events.Spotter."""

    quiet: tuple[str, ...]  # those that mean that nothing does
    sure: float  # probability from which an event is told,
    ticks: int  # as the mean of so many


@dataclass(frozen=True)
class ValuesSpec:
    source: str  # an output of shape (1, len(names))
    names: tuple[str, ...]  # classes, whose probabilities these are, or numbers with their units
    events: EventsSpec | None = None


@dataclass(frozen=True)
class EmbeddingSpec:
    source: str  # an output of shape (1, D), of length 1


@dataclass(frozen=True)
class OutputsSpec:
    action: ActionSpec | None = None
    attention: AttentionSpec | None = None
    gates: GatesSpec | None = None
    values: ValuesSpec | None = None
    embedding: EmbeddingSpec | None = None

    def sources(self) -> dict[str, str]:
        """What the model puts out: "action" -> "fusion.action"."""
        specs = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: spec.source for name, spec in specs.items() if spec is not None}


@dataclass(frozen=True)
class TextSpec:
    """The graph that reads a whole text. Takes `tokens` int64 (1, length), 0 behind the text, and what `uses` names as
    a part's; gives an `embedding` (1, D) beside that of `outputs`, or what the decoder uses, or both."""

    file: str
    length: int
    uses: dict[str, str]
    begin: tuple[int, ...]  # tokens before and behind each text
    end: tuple[int, ...]


@dataclass(frozen=True)
class DecoderSpec:
    """The graph that says what comes after a token. Takes `token` and its `place`, int64 (1,); of the tokens before it
    `keys` (layers, heads, d, length), `values` (layers, heads, length, d) and a `mask` (length,), 0 where there is one
    and else -1e9; and what `uses` names as a part's, or of the text as "text.name". Gives `logits` (1, tokens), its own
    `key` and `value` (layers, heads, d), and maybe `attention` (1, rows, cols), over the image.

    `rows`: an output (1, n, D) that is fed row by row where a prompt has an image: the graph then takes `row` (1, D),
    too, and heeds it where the token is -1.
    """

    file: str
    length: int
    uses: dict[str, str]
    rows: str | None
    end: int  # the token that ends what is said
    unsaid: tuple[int, ...]  # tokens that are never said
    # Those of PROMPTS that it can do, in pieces: "image", "question", tokens such as "61 17", and last, where what is
    # said begins, "answer". A blank before "question" or "answer" is one before that text. A "next_..." goes on behind
    # an answer, so that examples can come before what is asked.
    prompts: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class LanguageSpec:
    """What can be said about the stream's images, and asked."""

    stream: str
    scale: float = 1.0  # of the similarity of image and text, before the softmax over several
    text: TextSpec | None = None
    decoder: DecoderSpec | None = None

    def graphs(self) -> dict[str, PartSpec]:
        """Those that no stream and no tick runs."""
        specs = {"text": self.text, "decoder": self.decoder}
        return {name: PartSpec(name, spec.file, None, {}, spec.uses) for name, spec in specs.items() if spec}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    format: int
    task: str
    streams: tuple[StreamSpec, ...]
    tick: Tick
    max_gap_ms: float
    parts: tuple[PartSpec, ...]
    outputs: OutputsSpec
    files: dict[str, str]  # name -> sha256
    training: dict[str, Any]
    scores: dict[str, Any]
    golden_atol: float = 1e-3
    language: LanguageSpec | None = None

    def graphs(self) -> tuple[PartSpec, ...]:
        """All of them: what an engine must be able to run."""
        return (*self.parts, *(self.language.graphs().values() if self.language else ()))


def parse_manifest(path: Path, text: bytes) -> Manifest:
    """Raises BundleError, which starts with `path`."""
    try:
        data = json.loads(text.decode(), parse_constant=_refuse_constant)
        version = data.get("format") if isinstance(data, dict) else None
        if version != FORMAT:
            raise ValueError(f"expected format {FORMAT}, got {version!r}; install the mm_edge it was made for")
        manifest = _parse(Manifest, data, "manifest")
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: {error}") from None
    _check(path, manifest)
    return manifest


def _refuse_constant(text: str) -> None:
    raise ValueError(f"expected finite numbers, got {text}")


def _parse(kind: Any, value: Any, where: str) -> Any:
    """JSON `value` as `kind`: a dataclass, or one of the types its fields have. Raises ValueError, naming the key."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(kind, value, where)
    if origin is types.UnionType:  # X | None
        return None if value is None else _parse(args[0], value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_parse(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _parse(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value):
        return float(value)
    if kind in (int, bool, str) and type(value) is kind and (kind is not str or value.isprintable()):
        return value
    name = "a list" if origin is tuple else "an object" if origin is dict else f"a {kind.__name__}"
    raise ValueError(f"{where}: expected {name}, got {str(value)[:60]!r}")


def _parse_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, got {str(value)[:60]!r}")
    hints, fields = typing.get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(value.keys() - fields.keys()):
        raise ValueError(f"{where}: unknown {unknown}; known are {sorted(fields)}")
    if missing := [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in value]:
        raise ValueError(f"{where}: missing {missing}")
    return kind(**{name: _parse(hints[name], item, f"{where}.{name}") for name, item in value.items()})


def _check(path: Path, m: Manifest) -> None:
    """What can be said without opening the files."""

    def expect(true: bool, what: str, got: object = "") -> None:
        if not true:
            raise BundleError(f"{path}: expected {what}, got {got!r}" if got != "" else f"{path}: expected {what}")

    streams = [spec.name for spec in m.streams]
    names = [*streams, *(part.name for part in m.parts)]
    for name in [*names, *(name for part in m.parts for name in [*part.state, *part.uses])]:
        expect(re.fullmatch("[a-z][a-z0-9_]{0,49}", name) is not None, "names of a-z, 0-9 and _", name)
    expect(0 < len(set(streams)) == len(streams), "streams, each with a name of its own", streams)
    expect(len({p.name for p in m.parts}) == len(m.parts) > 0, "parts, each with a name of its own", names)
    for spec in m.streams:
        if wrong := _wrong_stream(spec):
            expect(False, f"{spec.name}: {wrong}", spec)
    expect(m.tick.anchor in streams, f"tick.anchor to be one of {streams}", m.tick.anchor)
    in_order = 1 <= m.tick.period_ms <= m.tick.max_period_ms <= m.max_gap_ms
    expect(in_order, f"1 <= period_ms <= max_period_ms <= max_gap_ms ({m.max_gap_ms})", m.tick)
    expect(0 <= m.tick.min_period_ms <= m.tick.period_ms, "tick.min_period_ms of 0 to period_ms", m.tick)
    expect(m.golden_atol > 0, "golden_atol > 0", m.golden_atol)

    needed = {GOLDEN, *(part.file for part in m.graphs())}
    needed |= {VOCABULARY} if any(spec.kind == "text" for spec in m.streams) else set()
    if m.language and VOCABULARY not in m.files:
        needed.add(TOKENIZER)
    expect(needed <= m.files.keys(), f"files to list {sorted(needed)}", sorted(m.files))
    for part in m.parts:
        expect(part.stream in (None, *streams), f"{part.name}.stream to be null or one of {streams}", part.stream)
        clash = part.uses.keys() & {"x", "dt", "mask", "age", *(f"{s}_in" for s in part.state)}
        expect(not clash, f"{part.name}.uses to name inputs of its own", sorted(clash))

    if m.language:
        _check_language(m, expect)
    if action := m.outputs.action:
        dims = {len(getattr(action, f)) for f in ("names", "units", "min", "max", "max_rate")}
        expect(len(dims) == 1 and dims != {0}, "action names, units, min, max, max_rate of one length", action)
        expect(len(set(action.names)) == len(action.names), "action names that differ", action.names)
        expect(action.interface in INTERFACES, f"action.interface to be one of {INTERFACES}", action.interface)
        ranges = list(zip(action.min, action.max))
        if action.interface == "position":
            expect(all(low <= high for low, high in ranges), "action min <= max", action)
        else:
            expect(all(low <= 0 <= high for low, high in ranges), "action min <= 0 <= max", action)
        expect(min(action.max_rate) > 0 and action.dt_s > 0, "action max_rate and dt_s above 0", action)
    if m.outputs.values:
        told = m.outputs.values.names
        expect(len(set(told)) == len(told) > 0, "values.names that differ", told)
    if m.outputs.values and (events := m.outputs.values.events):
        known = set(m.outputs.values.names)
        expect(set(events.quiet) < known, f"values.events.quiet to be some of {sorted(known)}", events.quiet)
        expect(0 < events.sure <= 1 <= events.ticks <= 1000, "values.events.sure of 0 to 1, ticks of 1 to 1000", events)
    if attention := m.outputs.attention:
        expect(attention.stream in streams, f"attention.stream to be one of {streams}", attention.stream)


def _check_language(m: Manifest, expect: Callable[..., None]) -> None:
    language, images = m.language, [spec.name for spec in m.streams if spec.kind == "image"]
    assert language is not None
    expect(language.stream in images, f"language.stream to be one of the images {images}", language.stream)
    expect(bool(language.text or language.decoder), "language to have a text or a decoder")
    taken = {part.name for part in m.parts} & language.graphs().keys()
    expect(not taken, "no part to be called as one of the language's graphs", sorted(taken))
    expect(language.scale > 0, "language.scale above 0", language.scale)
    for name, spec, own in (("text", language.text, TEXT_INPUTS), ("decoder", language.decoder, DECODER_INPUTS)):
        if spec:
            expect(0 < spec.length <= MAX_TOKENS, f"language.{name}.length of 1 to {MAX_TOKENS}", spec.length)
            clash = sorted(spec.uses.keys() & own)
            expect(not clash, f"language.{name}.uses to name inputs of its own", clash)
    named = [*language.text.begin, *language.text.end] if language.text else []
    named += [language.decoder.end, *language.decoder.unsaid] if language.decoder else []
    expect(all(0 <= token < 2**31 for token in named), "a language's tokens from 0 to 2**31", named)
    if language.text:
        around = len(language.text.begin) + len(language.text.end)
        expect(around < language.text.length, f"language.text.length above the {around} tokens around a text")
    if language.decoder:
        for name, pieces in language.decoder.prompts.items():
            expect(name in PROMPTS, "prompts for caption and question, next_caption and next_question", name)
            last = len(pieces) - 1
            for i, piece in enumerate(pieces):
                known = piece in ("image", "question", " question", *(("answer", " answer") if i == last else ()))
                known = known or re.fullmatch("[0-9]{1,9}( [0-9]{1,9})*", piece) is not None
                expect(known, f"prompts.{name} of question, image and tokens, and last answer", piece)
            begins = any(piece == "image" or piece[0].isdigit() for piece in pieces)
            expect(begins, f"prompts.{name} to have an image or a token, whatever is asked", pieces)
            heard = language.text or not name.endswith("question") or {"question", " question"} & {*pieces}
            expect(bool(heard), f"the question in prompts.{name}, or a language.text that reads it", pieces)
            rows = language.decoder.rows is not None or "image" not in pieces
            expect(rows, f"language.decoder.rows for the image in prompts.{name}")


def _wrong_stream(spec: StreamSpec) -> str | None:
    """What is wrong with the numbers of a stream, in words."""
    if spec.kind not in KINDS:
        return f"a kind of {KINDS}"
    pattern: dict[str, tuple[int | None, ...]] = {
        "image": (None, None, 3),
        "audio": (spec.channels + 1, None, None),
        "scan": (2, None),
        "points": (None, 4),
        "imu": (None, 7),
        "vector": (None,),
        "text": (None,),
    }
    shape = pattern[spec.kind]
    if len(spec.shape) != len(shape) or any(n < 1 or want not in (None, n) for n, want in zip(spec.shape, shape)):
        return f"a shape like {shape}".replace("None", "n")
    if not (0 <= spec.rate_hz <= 1e5 and 0 <= spec.max_age_ms <= 1e9 and 0 <= spec.window_ms <= 6e4):
        return "rate_hz, max_age_ms and window_ms in a sane range"
    if not all(0 <= ms <= 1e9 for ms in (spec.frozen_ms, spec.max_latency_ms, spec.max_jitter_ms)):
        return "frozen_ms, max_latency_ms and max_jitter_ms in a sane range"
    if spec.max_age_ms == 0 and not spec.latched:
        return "max_age_ms above 0, or a latched stream"
    if spec.latched and spec.kind in ("audio", "imu"):
        return "no latched stream of a kind that is seen through a window"
    if spec.joints and (spec.kind != "vector" or not all(spec.joints) or len(set(spec.joints)) < len(spec.joints)):
        return "joints of a vector alone, each of another name"
    if spec.joints and spec.shape[0] not in (n * len(spec.joints) for n in (1, 2, 3)):
        return "position, velocity and effort of the joints, or fewer of these"
    if min(spec.std, default=0) <= 0 or len(spec.mean) != len(spec.std):
        return "as many std as mean, above 0"
    if len(spec.std) not in {"imu": (1, 6), "vector": (1, spec.shape[0])}.get(spec.kind, (1,)):
        return "one mean, or one for each value"
    if spec.kind == "imu" and round(spec.window_ms * 1e6) < 1:  # of whole nanoseconds; for audio, see below
        return "window_ms above 0"
    if spec.kind == "imu" and spec.frozen_ms and spec.rate_hz:
        rows = min(spec.shape[0], int(spec.window_ms * spec.rate_hz / 1e3))
        if spec.frozen_ms > (longest := (rows - 1) * 1e3 / spec.rate_hz):
            return f"frozen_ms of at most {longest:.0f}, as long as the window's {rows} rows go back"
    if spec.fit not in FITS:
        return f"fit to be one of {FITS}"
    if spec.kind in ("scan", "points") and spec.range_max_m <= 0:
        return "range_max_m above 0"
    if spec.kind == "audio":
        if not (1 <= spec.channels <= 64 and 1000 <= spec.sample_rate_hz <= 400_000):
            return "channels and sample_rate_hz"
        needs = (spec.shape[2] - 1) * round(AUDIO_HOP_S * spec.sample_rate_hz) + AUDIO_FRAME
        if round(spec.window_ms * spec.sample_rate_hz / 1e3) < needs:
            return f"a window_ms of at least {needs / spec.sample_rate_hz * 1e3:.1f} for {spec.shape[2]} hops"
    return None
