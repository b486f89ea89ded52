"""TensorRT 10 and 11, one code path: networks are strongly typed, so that precision is what the ONNX file says.

Building an engine takes up to minutes, so it is kept: under ~/.cache/mm_edge, by what it depends on. Buffers are host
memory that the GPU reads and writes in place, which on a Jetson is the same memory, and for a robot's small inputs
spares the copies elsewhere. They come from the CUDA driver, which is there wherever TensorRT runs.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mm_edge.errors import EngineError, needs
from mm_edge.onnx_file import TensorInfo, read_signature

WORKSPACE_BYTES = 256 << 20
BUILDER_OPTIONS = f"strongly typed, strict NaN, no TF32, workspace {WORKSPACE_BYTES}"  # an engine depends on them

log = logging.getLogger(__name__)


def describe() -> str:
    return f"tensorrt {_tensorrt().__version__} {_Cuda().device_name}"


def build(trt: Any, onnx: bytes, capabilities: Sequence[str] = ()) -> bytes:
    """An engine for `onnx`, built by the module `trt`: tensorrt, for this machine's GPU; or tensorrt_rtx, which needs
    no GPU, for `capabilities` such as "SM86". Raises EngineError."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx):
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise EngineError(f"{trt.__name__} {trt.__version__} cannot read it: {errors}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    config.clear_flag(trt.BuilderFlag.TF32)  # membranes near their threshold need all of fp32
    config.set_flag(trt.BuilderFlag.STRICT_NANS)  # or 0 * NaN may become 0, and `ok` a lie
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for i, name in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), i)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise EngineError(f"{trt.__name__} {trt.__version__} cannot build it")
    return bytes(engine)


def cached_engine(onnx: bytes, folder: Path | None = None) -> bytes:
    """The engine for `onnx` on this machine, built on first use. Two processes that want the same one build it once."""
    trt, folder = _tensorrt(), _private(folder or default_cache())
    depends_on = (hashlib.sha256(onnx).hexdigest(), _Cuda().device_name, trt.__version__, BUILDER_OPTIONS)
    path = folder / (hashlib.sha256("\n".join(depends_on).encode()).hexdigest() + ".engine")
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # goes with the file, also when this process dies
        if path.exists():
            return path.read_bytes()
        log.warning("building a TensorRT engine, once for this model on this machine: up to some minutes")
        engine = build(trt, onnx)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as temporary:
            temporary.write(engine)
        os.replace(temporary.name, path)
        return engine


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mm_edge" / "tensorrt"


class TrtGraph:
    """A `part.Graph` on TensorRT. Raises EngineError."""

    def __init__(self, onnx: bytes, state: Iterable[str]):
        trt, self._cuda = _tensorrt(), _Cuda()
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        engine = runtime.deserialize_cuda_engine(cached_engine(onnx))
        if engine is None:
            raise EngineError(f"the cached engine is damaged; remove {default_cache()}")
        inputs, outputs = read_signature(onnx)
        zeros = self._cuda.zeros
        self.inputs = {name: zeros(t) for name, t in inputs.items() if name not in {f"{s}_in" for s in state}}
        self._state = [{s: zeros(inputs[f"{s}_in"]) for s in state} for _ in (0, 1)]
        self._outputs, self._contexts = [], []
        for side in (0, 1):
            results = {name: zeros(t) for name, t in outputs.items() if name not in {f"{s}_out" for s in state}}
            buffers = {**self.inputs, **results}
            for s in state:
                buffers |= {f"{s}_in": self._state[side][s], f"{s}_out": self._state[1 - side][s]}
            context = engine.create_execution_context()
            for name, buffer in buffers.items():
                if not context.set_tensor_address(name, buffer.ctypes.data):
                    raise EngineError(f"TensorRT's engine has no tensor {name!r}")
            self._outputs.append(results)
            self._contexts.append(context)
        self._engine, self._stream, self._side = engine, self._cuda.stream(), 0

    def run(self) -> dict[str, np.ndarray]:
        self._cuda.make_current()
        if not self._contexts[self._side].execute_async_v3(self._stream):
            raise EngineError("TensorRT failed to run")
        self._cuda.synchronize(self._stream)
        return self._outputs[self._side]

    def keep(self) -> None:
        self._side = 1 - self._side

    def reset(self) -> None:
        for buffer in self._state[self._side].values():
            buffer[...] = 0


def _tensorrt() -> Any:
    with needs("the TensorRT engine", "tensorrt", "tensorrt"):
        import tensorrt
    return tensorrt


def _private(folder: Path) -> Path:
    """A folder that only this user can write: an engine is code."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise EngineError(f"{folder}: expected a folder that only you can write; others could plant engines there")
    return folder


@lru_cache(maxsize=1)
class _Cuda:
    """The few functions of the CUDA driver needed here, on device 0."""

    def __init__(self) -> None:
        try:
            self._lib = ctypes.CDLL("libcuda.so.1")
        except OSError:
            raise EngineError("no NVIDIA driver (libcuda.so.1) on this machine") from None
        device, self._context, name = ctypes.c_int(), ctypes.c_void_p(), ctypes.create_string_buffer(128)
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDeviceGetName", name, len(name), device)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)  # the one TensorRT uses
        self.make_current()
        self.device_name = name.value.decode()

    def make_current(self) -> None:
        self._call("cuCtxSetCurrent", self._context)

    def zeros(self, info: TensorInfo) -> np.ndarray:
        """An array that CPU and GPU both reach at its address."""
        dtype, pointer = np.dtype(info.dtype), ctypes.c_void_p()
        size = int(np.prod(info.shape)) * dtype.itemsize
        self._call("cuMemHostAlloc", ctypes.byref(pointer), ctypes.c_size_t(size), 3)  # portable, mapped
        assert pointer.value is not None
        memory = (ctypes.c_ubyte * size).from_address(pointer.value)
        weakref.finalize(memory, self._lib.cuMemFreeHost, pointer).atexit = False
        array = np.ctypeslib.as_array(memory).view(dtype).reshape(info.shape)
        array[...] = 0
        return array

    def stream(self) -> int:
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), 1)  # does not wait for the default stream
        return stream.value or 0

    def synchronize(self, stream: int) -> None:
        self._call("cuStreamSynchronize", ctypes.c_void_p(stream))

    def _call(self, function: str, *args: Any) -> None:
        if code := getattr(self._lib, function)(*args):
            raise EngineError(f"CUDA driver: {function} gives error {code}")
