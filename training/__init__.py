"""Training: torch models, tables of irregular time, the one loop, evaluation."""

import importlib.util
import sys

from mm_edge.errors import MissingDependency

if sys.argv[0] == "-m" and importlib.util.find_spec("torch") is None:  # a command of this package: one line will do
    raise SystemExit(str(MissingDependency("training", "torch", "train")))
