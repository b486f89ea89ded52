"""Reads from an ONNX file what a bundle must know before any engine sees it: the names, types and shapes of a graph's
inputs and outputs, and that its weights are all inside. The robot needs no `onnx` package for that.

The numbers below are field numbers of onnx.proto; see https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

_DTYPES = {1: "float32", 2: "uint8", 7: "int64"}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # of a TensorProto

# message -> field number -> message in that field: all ways by which a model can hold tensors
_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}


class TensorInfo(NamedTuple):
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


class Signature(NamedTuple):
    inputs: dict[str, TensorInfo]
    outputs: dict[str, TensorInfo]


def read_signature(onnx: bytes) -> Signature:
    """Raises ValueError if this is no ONNX model, keeps weights in other files, or has an input or output without a
    static shape."""
    model = memoryview(onnx)
    try:
        _refuse_external_data("model", model)
    except RecursionError:
        raise ValueError("graphs nested too deeply") from None
    graphs = [_bytes(value) for number, value in _fields(model) if number == 7]
    if len(graphs) != 1:
        raise ValueError("no ONNX model")
    inputs = dict(_tensor_info(_bytes(value)) for number, value in _fields(graphs[0]) if number == 11)
    outputs = dict(_tensor_info(_bytes(value)) for number, value in _fields(graphs[0]) if number == 12)
    return Signature(inputs, outputs)


def _refuse_external_data(message: str, data: memoryview) -> None:
    for number, value in _fields(data):
        if message == "tensor" and (number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value != 0)):
            raise ValueError("weights in another file (external data); export with external_data=False")
        if number in _CHILDREN[message]:
            _refuse_external_data(_CHILDREN[message][number], _bytes(value))


def _tensor_info(value_info: memoryview) -> tuple[str, TensorInfo]:
    info = dict(_fields(value_info))
    name = bytes(_bytes(info.get(1, 0))).decode()
    tensor = dict(_fields(_bytes(dict(_fields(_bytes(info.get(2, 0)))).get(1, 0))))
    dims = [dict(_fields(_bytes(dim))).get(1, 0) for number, dim in _fields(_bytes(tensor.get(2, 0))) if number == 1]
    shape = tuple(dim for dim in dims if isinstance(dim, int) and 0 < dim < 1 << 31)
    if len(shape) != len(dims):
        raise ValueError(f"{name} has no static shape")
    dtype = tensor.get(1)
    return name, TensorInfo(_DTYPES.get(dtype, f"ONNX type {dtype}") if isinstance(dtype, int) else "?", shape)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protobuf message: their numbers, and the integer or the bytes they hold."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(message, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError("no ONNX model")
        if size > len(message) - at:
            raise ValueError("cut short")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("cut short")
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
    raise ValueError("no ONNX model")


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("no ONNX model")
    return value
