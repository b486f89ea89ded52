"""Files that are there whole or not at all; among them what is simulated once, and learned from many times."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm


def write_text(file: Path, text: str) -> None:
    """In place of what is there."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text)
    part.rename(file)


def cached(
    file: Path, make: Callable[[int], dict[str, np.ndarray]], seeds: range, workers: int
) -> dict[str, np.ndarray]:
    """What `make`, a function of a module, makes of each seed, as arrays with an axis before the others; made if the
    file is not there, and then kept."""
    if not file.exists():
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            rows = list(tqdm(pool.imap(make, seeds, chunksize=8), file.stem, total=len(seeds), leave=False))
        with file.with_suffix(".part").open("wb") as part:
            np.savez(part, **{name: np.stack([row[name] for row in rows]) for name in rows[0]})
        file.with_suffix(".part").rename(file)
    with np.load(file) as arrays:
        return {name: arrays[name] for name in arrays.files}
