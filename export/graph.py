"""From a torch module to an ONNX graph: what every export does the same way."""

from __future__ import annotations

import io
import logging
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mm_edge.errors import needs

OPSET = 20
MAX_ERROR = 1e-4  # between torch and ONNX Runtime


def finite(*tensors: Tensor) -> Tensor:
    """(1,): 1 if all are finite. No comparison with NaN or infinity is true."""
    return (sum(t.abs().sum() for t in tensors) < 1e30).float().view(1)


def export_graph(part: nn.Module, args: tuple[Tensor, ...], inputs: list[str], outputs: list[str]) -> bytes:
    """The module as one ONNX file, traced on `args`; its tensors in the order of the names."""
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # it misses torchvision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own internals
        program = torch.onnx.export(
            part.eval(), args, input_names=inputs, output_names=outputs, opset_version=OPSET, dynamo=True, verbose=False
        )
    assert program is not None
    for value in program.model.graph.outputs:  # what each value was in torch is of no use on a robot
        value.metadata_props.clear()
    inner = list(program.model.graph.initializers.values())
    for node in program.model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        inner += node.outputs
    for i, value in enumerate(inner):  # some are called by their operator, as an output may be
        if value.name in outputs and not value.is_graph_output():
            value.name = f"{value.name}.inner{i}"
    buffer = io.BytesIO()
    program.save(buffer)
    return buffer.getvalue()


class Session:
    """A graph in plain ONNX Runtime, one thread: session(x=..., dt=...) -> its outputs by name."""

    def __init__(self, onnx: bytes):
        with needs("comparing torch with ONNX Runtime", "onnxruntime", "ort"):
            import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        self._names = [output.name for output in self._session.get_outputs()]

    def __call__(self, **feeds: Any) -> dict[str, np.ndarray]:
        return dict(zip(self._names, self._session.run(None, feeds)))
