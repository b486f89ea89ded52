"""Build TensorRT engines for every part of a bundle, so that the robot need not wait for them when it starts.

python -m export.to_tensorrt mm_edge/bundles/drive         # with the GPU's own TensorRT, into the engine cache
python -m export.to_tensorrt mm_edge/bundles/drive --rtx   # with tensorrt-rtx: proves without a GPU that all builds
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from mm_edge.bundle import Bundle
from mm_edge.engine import has_gpu, trt
from mm_edge.errors import EdgeError, EngineError, needs

RTX_CAPABILITIES = ("SM80", "SM86", "SM89", "SM120")  # TensorRT-RTX knows no Orin, H100 or Thor


def build_rtx(onnx: bytes) -> bytes:
    """An engine by TensorRT-RTX, which reads and builds without a GPU. Raises EngineError, MissingDependency."""
    with needs("building without a GPU", "tensorrt_rtx", "trt-rtx"):
        import tensorrt_rtx
    return trt.build(tensorrt_rtx, onnx, RTX_CAPABILITIES)


def build_parts(bundle: Bundle, build: Callable[[bytes], bytes]) -> dict[str, int]:
    """Build all parts with a progress bar; the engines' sizes in bytes. Raises EngineError, naming the file."""
    sizes = {}
    for part in (bar := tqdm(bundle.graphs(), unit="part", delay=0.5)):
        bar.set_description(part.file, refresh=False)
        started = time.perf_counter()
        try:
            sizes[part.name] = len(build(bundle.contents[part.file]))
        except EngineError as error:
            raise EngineError(f"{bundle.path / part.file}: {error}") from None
        bar.write(f"{part.file}: {sizes[part.name] / 1e6:.2f} MB in {time.perf_counter() - started:.1f} s")
    return sizes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build TensorRT engines for a bundle.")
    parser.add_argument("bundle")
    rtx = "by tensorrt-rtx, to see whether each part can be built: no GPU needed, and nothing is kept"
    parser.add_argument("--rtx", action="store_true", help=rtx)
    args = parser.parse_args(argv)
    try:
        if not (args.rtx or has_gpu()):
            raise EngineError("an engine is built on the GPU that it is for, and there is none here; see --rtx")
        build_parts(Bundle.read(args.bundle), build_rtx if args.rtx else trt.cached_engine)
    except EdgeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
