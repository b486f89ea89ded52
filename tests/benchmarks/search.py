"""What a search in 100 hours costs: `python -m tests.benchmarks.search [--dim 128] [--json]`

100 recordings of an hour, an embedding a second: walks about a centre each, so that neighbours are alike, as a robot's
frames are. Each query is a direction of its own, nearer to no frame than to others, as a text's is. `query_ms` is
`Index.search` for ten moments, of the index as `Index.update` leaves it, in a process that has answered once; `cold_ms`
the first answer of a new process, with the import of lancedb and the opening of the index, but without the model.
`build_s` is writing and sorting the rows, `recall` the share of the ten best frames of all that are found.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from tqdm import tqdm

from mm_edge.search import FLUSH_FRAMES, Index, _Recording
from mm_edge.types import NS

RECORDINGS, SECONDS, QUERIES, TOP = 100, 3600, 100, 10


def opened(folder: Path) -> tuple[Index, list[Path]]:
    language: Any = SimpleNamespace(bundle=SimpleNamespace(id="benchmark"))
    return Index(folder, language), [folder / str(i) for i in range(RECORDINGS)]


def walks(dim: int) -> np.ndarray:
    """float32 (RECORDINGS * SECONDS, dim), of length 1."""
    random = np.random.default_rng(0)
    found = np.empty((RECORDINGS * SECONDS, dim), np.float32)
    for i in range(RECORDINGS):
        steps = 0.08 * random.standard_normal((SECONDS, dim), np.float32).cumsum(axis=0)
        found[i * SECONDS : (i + 1) * SECONDS] = random.standard_normal(dim, np.float32) + steps
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def queries(dim: int) -> np.ndarray:
    found = np.random.default_rng(1).standard_normal((QUERIES, dim), np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def build(folder: Path, vectors: np.ndarray) -> float:
    """Seconds, for rows as `update` writes them."""
    index, paths = opened(folder)
    index.path.mkdir(parents=True)
    begun = time.perf_counter()
    index._recordings = {path.name: _Recording(i, [], 1.0, True) for i, path in enumerate(paths)}
    index._save()
    for n in tqdm(range(0, len(vectors), FLUSH_FRAMES), unit="000 frames", leave=False):
        rows = enumerate(vectors[n : n + FLUSH_FRAMES], n)
        index._add([(i // SECONDS, "camera", i * NS, i * NS, float(i % SECONDS), row) for i, row in rows])
    index._tidy()
    return time.perf_counter() - begun


def measure(dim: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder, vectors, asked = Path(temporary), walks(dim), queries(dim)
        build_s = build(folder, vectors)
        code = f"from tests.benchmarks.search import first_ms; print(first_ms({temporary!r}, {dim}))"
        cold_ms = float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        index, paths = opened(folder)
        index.search(asked[0], paths, TOP)
        spent_ms, kept = [], 0
        for query in tqdm(asked, unit=" queries", leave=False):
            begun = time.perf_counter()
            index.search(query, paths, TOP)
            spent_ms.append((time.perf_counter() - begun) * 1e3)
            best = set(np.argpartition(vectors @ query, -TOP)[-TOP:].tolist())
            kept += len(best & {moment.stamp_ns // NS for moment in index.search(query, paths, TOP, apart_s=0)})
        return {
            "vectors": len(vectors),
            "dim": dim,
            "query_ms": {f"p{q}": round(float(np.percentile(spent_ms, q)), 2) for q in (50, 99)},
            "recall": round(kept / TOP / QUERIES, 4),
            "build_s": round(build_s, 1),
            "index_mb": round(sum(f.stat().st_size for f in index.path.rglob("*") if f.is_file()) / 1e6),
            "cold_ms": round(cold_ms),
        }


def first_ms(folder: str, dim: int) -> float:
    begun = time.perf_counter()
    index, paths = opened(Path(folder))
    index.search(queries(dim)[0], paths, TOP)
    return (time.perf_counter() - begun) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=128, help="of an embedding (%(default)s, as of the shipped model)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    result = measure(args.dim)
    if args.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:<12}{value}")


if __name__ == "__main__":
    main()
