"""ONNX Runtime: bindings made once, one for each direction in which state flows between its two sides.

One thread a session: parts are small, and several spinning pools fight for a robot's few cores. `RunOptions` stay out
of `run`: with them a bound run costs 40 us more.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mm_edge.errors import EngineError, needs
from mm_edge.onnx_file import read_signature

with needs("running a model", "onnxruntime", "ort"):
    import onnxruntime

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def describe(device: str) -> str:
    return f"onnxruntime {onnxruntime.__version__} {PROVIDERS[device]}"


class OrtGraph:
    """A `part.Graph` on `device` "cpu" or "cuda". Raises EngineError if ONNX Runtime refuses one of them."""

    def __init__(self, onnx: bytes, state: Iterable[str], device: str):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        try:
            # Without its fallback, which prints to stdout, where outputs go.
            session = onnxruntime.InferenceSession(onnx, options, providers=[PROVIDERS[device]], enable_fallback=0)
        except Exception as error:  # ONNX Runtime has a dozen kinds without a common base
            raise EngineError(f"{describe(device)} refuses it: {error}") from None
        if session.get_providers()[0] != PROVIDERS[device]:  # it falls back without an error
            raise EngineError(f"{describe(device)} does not work here, {session.get_providers()} would run")
        self._session, self._on_cpu = session, device == "cpu"

        def zeros(name: str, info: dict, device: str) -> tuple[np.ndarray, onnxruntime.OrtValue]:
            array = np.zeros(info[name].shape, info[name].dtype)
            return array, onnxruntime.OrtValue.ortvalue_from_numpy(array, device)

        inputs, outputs = read_signature(onnx)
        carried_in, carried_out = {f"{s}_in" for s in state}, {f"{s}_out" for s in state}
        feeds = {name: zeros(name, inputs, device) for name in inputs if name not in carried_in}
        self.inputs = {name: array for name, (array, _) in feeds.items()}
        self._copies = [(value, array) for array, value in feeds.values()]
        self._state = [{s: zeros(f"{s}_in", inputs, device) for s in state} for _ in (0, 1)]
        self._outputs, self._bindings = [], []
        for side in (0, 1):
            results = {name: zeros(name, outputs, "cpu") for name in outputs if name not in carried_out}
            binding = session.io_binding()
            for name, (_, value) in feeds.items():
                binding.bind_ortvalue_input(name, value)
            for name, (_, value) in results.items():
                binding.bind_ortvalue_output(name, value)
            for s in state:
                binding.bind_ortvalue_input(f"{s}_in", self._state[side][s][1])
                binding.bind_ortvalue_output(f"{s}_out", self._state[1 - side][s][1])
            self._outputs.append({name: array for name, (array, _) in results.items()})
            self._bindings.append(binding)
        self._side = 0

    def run(self) -> dict[str, np.ndarray]:
        try:
            if not self._on_cpu:
                for value, array in self._copies:
                    value.update_inplace(array)
            self._session.run_with_iobinding(self._bindings[self._side])
        except Exception as error:
            raise EngineError(f"{describe('cpu' if self._on_cpu else 'cuda')} failed: {error}") from None
        return self._outputs[self._side]

    def keep(self) -> None:
        self._side = 1 - self._side

    def reset(self) -> None:
        for array, value in self._state[self._side].values():
            if self._on_cpu:
                array[...] = 0
            else:
                value.update_inplace(np.zeros_like(array))
