"""A bundle whose decoder has weights of eight bits: faster on a CPU, and no longer to the last digit what was trained.

    python -m export.quantize mm_edge/bundles/vlm runs/vlm-int8
    python -m training.evaluate vlm --bundle runs/vlm-int8 --json       # what it cost

Only the decoder, whose weights are read anew for every token, gains by it; images and texts stay as they are. TensorRT
does not read such a graph.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path

from export.language import GOLDEN_TICKS, write_language
from mm_edge.bundle import Bundle
from mm_edge.engine import golden
from mm_edge.errors import BundleError, EdgeError, needs
from mm_edge.manifest import GOLDEN, MANIFEST


def quantize(bundle: Bundle, out: Path) -> None:
    """Write it to the folder `out`. Raises BundleError if it has no decoder."""
    if bundle.language is None or bundle.language.decoder is None:
        raise BundleError(f"{bundle.path}: expected a bundle with a decoder, this one has none")
    file = bundle.language.decoder.file
    files = {**bundle.contents, file: eight_bits(bundle.contents[file])}
    manifest = json.loads((bundle.path / MANIFEST).read_text())
    manifest["scores"] = {}  # they are another model's, and so is how near it came to torch
    manifest["training"].pop("parity", None)
    manifest["training"]["quantized"] = f"decoder, int8, from {bundle.id}"
    for made in ("format", "files"):
        del manifest[made]
    del files[GOLDEN]
    card = files.get("README.md", b"")
    note = b"The decoder's weights are of eight bits here; what follows was written of it as it was before.\n\n"
    files["README.md"] = note + card
    frames = [inputs.fresh[bundle.language.stream].x for inputs, _ in golden.unpack(bundle)[:GOLDEN_TICKS]]
    text, said = (bundle.golden.get(f"{golden.LANGUAGE}{name}") for name in ("text", "tokens"))
    write_language(out, manifest, files, frames, text, said)


def eight_bits(onnx: bytes) -> bytes:
    """The graph with the weights of its products as int8, each column with a scale of its own; what comes in is made
    int8 as it comes."""
    with needs("making weights of eight bits", "onnx", "export"):
        from onnxruntime.quantization import QuantType, quantize_dynamic
    logging.getLogger().setLevel(logging.ERROR)  # it advises what makes no difference here
    with tempfile.TemporaryDirectory() as folder:
        large, small = Path(folder, "fp32.onnx"), Path(folder, "int8.onnx")
        large.write_bytes(onnx)
        quantize_dynamic(large, small, weight_type=QuantType.QInt8, per_channel=True)
        return small.read_bytes()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("out", type=Path, help="folder of the new bundle; replaced if it is there")
    args = parser.parse_args(argv)
    if args.out.resolve() == args.bundle.resolve():
        parser.error(f"{args.out}: expected another folder than that of the bundle, which stays as it is")
    try:
        quantize(Bundle.read(args.bundle), args.out)
    except (EdgeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{args.out}: {sum(f.stat().st_size for f in args.out.iterdir()) / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
