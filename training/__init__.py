"""Training: torch models, tables of irregular time, the one loop, evaluation."""

import sys

from mm_edge.errors import MissingDependency

try:
    import torch  # noqa: F401
except ImportError:
    missing = MissingDependency("training", "torch", "train")
    raise (SystemExit(str(missing)) if sys.argv[0] == "-m" else missing) from None  # of a command: one line
