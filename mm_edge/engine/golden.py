"""The golden trace: what a model was given and gave when it was exported, tick by tick.

A robot runs it when it configures, which proves that this machine's engine computes what was trained, and warms it up.
As arrays, for K ticks: `dt` (K,), `reset` (K,), `mask` and `age` (K, M); for each stream `<stream>.x` (K, *shape),
`<stream>.fresh`, `<stream>.dt`, `<stream>.reset` (K,); for each output `out.<name>` (K, ...).

Of a bundle with a language also what came after the last tick: `language.text`, tokens that the text's graph read, and
the `language.embedding` if it gave one; `language.tokens` (n,) that the decoder was fed, -1 for the next row of the
image, and the `language.logits` (n, tokens) after each.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from mm_edge.bundle import Bundle
from mm_edge.engine.decoder import Decoder
from mm_edge.engine.part import Fresh, Model, ModelInputs
from mm_edge.errors import BundleError, EngineError
from mm_edge.manifest import GOLDEN
from mm_edge.types import StreamSpec

LANGUAGE = "language."


def pack(
    streams: Sequence[StreamSpec],
    ticks: Sequence[tuple[ModelInputs, dict[str, np.ndarray]]],
    language: dict[str, np.ndarray] | None = None,
) -> bytes:
    """golden.npz of the inputs and outputs ("action" -> (1, H, A), ...) of some ticks, and of what `say` gave then."""
    inputs = [tick[0] for tick in ticks]
    arrays = {
        "dt": np.array([i.dt_s for i in inputs], np.float64),
        "reset": np.array([i.reset for i in inputs], bool),
        "mask": np.stack([i.mask for i in inputs]),
        "age": np.stack([i.age for i in inputs]),
        **(language or {}),
        **{f"out.{name}": np.concatenate([tick[1][name] for tick in ticks]) for name in ticks[0][1]},
    }
    for spec in streams:
        blank = Fresh(np.zeros(spec.shape, spec.dtype), 0.0, False)
        fresh = [i.fresh.get(spec.name, blank) for i in inputs]
        arrays[f"{spec.name}.x"] = np.stack([f.x for f in fresh])
        arrays[f"{spec.name}.dt"] = np.array([f.dt_s for f in fresh], np.float64)
        arrays[f"{spec.name}.reset"] = np.array([f.reset for f in fresh], bool)
        arrays[f"{spec.name}.fresh"] = np.array([spec.name in i.fresh for i in inputs], bool)
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def say(model: Model, bundle: Bundle, text: np.ndarray | None, tokens: np.ndarray | None) -> dict[str, np.ndarray]:
    """The arrays of a language, of what the model saw last. Raises EngineError."""
    assert bundle.language is not None
    arrays: dict[str, np.ndarray] = {}
    if text is not None:
        arrays["text"] = text
        read = model.read(text)
        if "embedding" in read:
            arrays["embedding"] = read["embedding"][0].copy()
    if tokens is not None and (spec := bundle.language.decoder):
        rows = iter(held(model, spec.rows)[0] if spec.rows else ())
        decoder = Decoder(model.graphs["decoder"])
        logits = [decoder.feed(t, next(rows) if t == -1 else None)["logits"][0].copy() for t in tokens.tolist()]
        arrays["tokens"], arrays["logits"] = tokens, np.stack(logits)
    return {LANGUAGE + name: value for name, value in arrays.items()}


def held(model: Model, source: str) -> np.ndarray:
    """An output, such as "camera.embedding", as of its part's last step."""
    part, output = source.split(".", 1)
    return model.parts[part].outputs[output]


def unpack(bundle: Bundle) -> list[tuple[ModelInputs, dict[str, np.ndarray]]]:
    """The ticks of a bundle's trace. Raises BundleError if it does not fit the bundle."""
    arrays, k, m = bundle.golden, np.size(bundle.golden.get("dt", ())), len(bundle.streams)
    want: dict[str, tuple[Any, tuple[int, ...]]]
    want = {"dt": (np.float64, (k,)), "reset": (bool, (k,)), "mask": (np.float32, (k, m)), "age": (np.float32, (k, m))}
    for spec in bundle.streams:
        want[f"{spec.name}.x"] = (spec.dtype, (k, *spec.shape))
        want |= {f"{spec.name}.dt": (np.float64, (k,)), f"{spec.name}.reset": (bool, (k,))}
        want[f"{spec.name}.fresh"] = (bool, (k,))
    given = {name for name in arrays if not name.startswith(LANGUAGE)}
    if k == 0 or given - want.keys() != {f"out.{name}" for name in bundle.outputs.sources()}:
        raise BundleError(f"{bundle.path / GOLDEN}: expected ticks with inputs and outputs, got {sorted(arrays)}")
    for name, (kind, shape) in want.items():
        if name not in arrays or arrays[name].dtype != kind or arrays[name].shape != shape:
            got = f"{arrays[name].dtype} {arrays[name].shape}" if name in arrays else "nothing"
            raise BundleError(f"{bundle.path / GOLDEN}: {name}: expected {np.dtype(kind)} {shape}, got {got}")
    return [(_inputs(bundle.streams, arrays, i), _outputs(bundle, arrays, i)) for i in range(k)]


def rehearse(model: Model, bundle: Bundle) -> None:
    """Run the trace, then start anew. Raises EngineError if any output differs by more than the bundle allows."""
    model.reset()
    for i, (inputs, outputs) in enumerate(unpack(bundle)):
        got = model.step(inputs)
        for name, want in outputs.items():
            error = np.abs(got.values[name] - want).max() if got.values[name].shape == want.shape else np.nan
            if got.reasons or not error <= bundle.golden_atol:  # NaN is no agreement
                raise EngineError(
                    f"{bundle.path}: {model.engine} does not reproduce the golden trace: at tick {i} {name} is off by "
                    f"{error:.2g}, allowed is {bundle.golden_atol:.2g} {' '.join(got.reasons)}"
                )
    if bundle.language:
        _rehearse_language(model, bundle)
    model.reset()


def _rehearse_language(model: Model, bundle: Bundle) -> None:
    trace = {name: value for name, value in bundle.golden.items() if name.startswith(LANGUAGE)}
    try:
        got = say(model, bundle, trace.get(f"{LANGUAGE}text"), trace.get(f"{LANGUAGE}tokens"))
    except (ValueError, IndexError, StopIteration, TypeError) as error:
        raise BundleError(f"{bundle.path / GOLDEN}: {LANGUAGE}: {type(error).__name__}: {error}") from None
    language = bundle.language
    assert language is not None
    due = {LANGUAGE + name for name, spec in (("text", language.text), ("tokens", language.decoder)) if spec}
    if trace.keys() != (expected := got.keys() | due):
        raise BundleError(f"{bundle.path / GOLDEN}: expected {sorted(expected)}, got {sorted(trace)}")
    for name, want in trace.items():
        off = np.abs(got[name] - want).max() if got[name].shape == want.shape else np.nan
        if not off <= bundle.golden_atol:
            raise EngineError(
                f"{bundle.path}: {model.engine} does not reproduce the golden trace: {name} is off by "
                f"{off:.2g}, allowed is {bundle.golden_atol:.2g}"
            )


def _inputs(streams: Sequence[StreamSpec], arrays: dict[str, np.ndarray], i: int) -> ModelInputs:
    fresh = {}
    for name in (spec.name for spec in streams):
        if arrays[f"{name}.fresh"][i]:
            fresh[name] = Fresh(
                arrays[f"{name}.x"][i], float(arrays[f"{name}.dt"][i]), bool(arrays[f"{name}.reset"][i])
            )
    return ModelInputs(fresh, arrays["mask"][i], arrays["age"][i], float(arrays["dt"][i]), bool(arrays["reset"][i]))


def _outputs(bundle: Bundle, arrays: dict[str, np.ndarray], i: int) -> dict[str, np.ndarray]:
    return {name: arrays[f"out.{name}"][i : i + 1] for name in bundle.outputs.sources()}
