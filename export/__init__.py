"""From a training checkpoint to what a robot runs: ONNX parts in a bundle, and TensorRT engines."""

import sys

from mm_edge.errors import MissingDependency

try:
    import torch  # noqa: F401
except ImportError:
    missing = MissingDependency("exporting", "torch", "export")
    raise (SystemExit(str(missing)) if sys.argv[0] == "-m" else missing) from None  # of a command: one line
