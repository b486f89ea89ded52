"""From a training checkpoint to what a robot runs: ONNX parts in a bundle, and TensorRT engines."""

import importlib.util
import sys

from mm_edge.errors import MissingDependency

if sys.argv[0] == "-m" and importlib.util.find_spec("torch") is None:  # a command of this package: one line will do
    raise SystemExit(str(MissingDependency("exporting", "torch", "export")))
