"""Engines: what runs a bundle's graphs. `load(bundle)` gives a `Model` that has proved itself on the golden trace."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable

from mm_edge.bundle import Bundle
from mm_edge.engine import golden
from mm_edge.engine.part import Graph, Model
from mm_edge.errors import EdgeError, EngineError, MissingDependency
from mm_edge.manifest import PartSpec

ENGINES = ("tensorrt", "cuda", "cpu")  # best first; the last works everywhere

log = logging.getLogger(__name__)


def load(bundle: Bundle, engine: str = "auto") -> Model:
    """The bundle's model on `engine`, or with "auto" on the first of ENGINES that works here, warmed up.

    Raises EngineError if the engine refuses a part, is not there, or does not reproduce the bundle's golden trace;
    BundleError if that trace is not one; MissingDependency if no engine is installed.
    """
    if engine in ENGINES:
        if engine != "cpu" and not has_gpu():
            raise EngineError(f"engine {engine}: there is no NVIDIA driver with a GPU here; see `mm-edge doctor`")
        return _load(bundle, engine)
    if engine != "auto":
        raise EngineError(f"engine: expected auto or one of {ENGINES}, got {engine!r}")
    for name in ENGINES[:-1] if has_gpu() else ():
        try:
            return _load(bundle, name)
        except (EngineError, MissingDependency) as error:
            log.warning("engine %s is not used: %s", name, error)
    return _load(bundle, ENGINES[-1])


def has_gpu() -> bool:
    """Whether an NVIDIA driver is here and has a device."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False


def _load(bundle: Bundle, engine: str) -> Model:
    def open_graph(part: PartSpec, onnx: bytes) -> Graph:
        try:
            return opener(part, onnx)
        except EngineError as error:
            raise EngineError(f"{bundle.path / part.file}: {error}") from None

    try:
        opener, description = _tensorrt() if engine == "tensorrt" else _onnxruntime(engine)
        model = Model(bundle, open_graph, description)
        golden.rehearse(model, bundle)
    except EdgeError:
        raise
    except Exception as error:  # a version too old or too new for us fails in ways of its own
        raise EngineError(f"engine {engine}: {type(error).__name__}: {error}") from error
    return model


def _onnxruntime(device: str) -> tuple[Callable[[PartSpec, bytes], Graph], str]:
    from mm_edge.engine import ort

    return lambda part, onnx: ort.OrtGraph(onnx, part.state, device), ort.describe(device)


def _tensorrt() -> tuple[Callable[[PartSpec, bytes], Graph], str]:
    from mm_edge.engine import trt

    return lambda part, onnx: trt.TrtGraph(onnx, part.state), trt.describe()
