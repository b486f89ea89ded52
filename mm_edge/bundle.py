"""A bundle: a folder with a trained model and all that a robot must know to run it. The format: docs/architecture.md.

    bundle = Bundle.read("mm_edge/bundles/drive")
    write_bundle("out", manifest, {"camera.onnx": ..., "golden.npz": ...})

Each file is read once, hashed, and used from those bytes, so that
what was verified is what runs. Nothing here trusts the folder: whatever is wrong with it raises BundleError, which
names the file.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import io
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mm_edge.errors import BundleError
from mm_edge.manifest import FORMAT, GOLDEN, MANIFEST, VOCABULARY, Manifest, parse_manifest
from mm_edge.onnx_file import Signature, TensorInfo, read_signature
from mm_edge.preprocess import Vocabulary, words_of

# Bytes that a file may have by its suffix, or else 16 MB. No ONNX file can have more; golden.npz, when unpacked, too.
LARGEST = {".onnx": 2**31 - 1, ".npz": 2**27}
BUNDLES = Path(__file__).parent / "bundles"  # that are shipped
SHIPPED, SHIPPED_VLM, SHIPPED_WORDS = (BUNDLES / name for name in ("drive", "vlm", "words"))


@dataclass(frozen=True, kw_only=True)
class Bundle(Manifest):
    """A manifest and the files it names, read and verified."""

    path: Path
    id: str  # sha256 of manifest.json
    contents: dict[str, bytes] = field(repr=False)
    golden: dict[str, np.ndarray] = field(repr=False)
    vocabulary: Vocabulary | None

    @classmethod
    def read(cls, path: str | Path) -> Bundle:
        """The bundle in a folder, or the shipped one of that name. Raises BundleError, naming the file, if anything is
        missing, damaged, unknown or inconsistent."""
        folder = Path(path)
        by_name = len(folder.parts) == 1 and not os.path.exists(folder / MANIFEST)
        if by_name and os.path.isfile(BUNDLES / folder / MANIFEST):
            folder = BUNDLES / folder
        if not os.path.exists(folder):  # which, unlike Path.exists, takes any name
            shipped = sorted(path.parent.name for path in BUNDLES.glob(f"*/{MANIFEST}"))
            close = difflib.get_close_matches(str(folder).lower(), shipped, 1)  # of a path none is
            meant = f"; did you mean {close[0]}?" if close else ""
            what = f"the folder of a bundle, or the name of a shipped one: {', '.join(shipped)}"
            raise BundleError(f"{folder}: expected {what}{meant}")
        text = _read_file(folder, MANIFEST)
        manifest = parse_manifest(folder / MANIFEST, text)
        contents = {name: _read_file(folder, name) for name in manifest.files}
        for name, data in contents.items():
            if hashlib.sha256(data).hexdigest() != manifest.files[name]:
                raise BundleError(f"{folder / name}: its sha256 is not the manifest's; the file changed or is damaged")
        _check_graphs(folder, manifest, contents)
        return cls(
            **{f.name: getattr(manifest, f.name) for f in dataclasses.fields(Manifest)},
            path=folder,
            id=hashlib.sha256(text).hexdigest(),
            contents=contents,
            golden=_parse_golden(folder / GOLDEN, contents[GOLDEN]),
            vocabulary=_parse_vocabulary(folder / VOCABULARY, contents[VOCABULARY]) if VOCABULARY in contents else None,
        )


def write_bundle(folder: str | Path, manifest: dict[str, Any], files: dict[str, bytes]) -> Bundle:
    """Write a bundle, or replace the one there, in one step: it is read back and verified under another name first.

    Args:
        manifest: all of `Manifest` but `format` and `files`.
        files: name -> content of all files but the manifest.

    Raises BundleError if the result would not be a valid bundle, or the folder is there and is no bundle; OSError if it
    cannot be written. Then nothing changes.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise BundleError(f"{folder}: expected a bundle to replace, or nothing; it is there and has no {MANIFEST}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
    text = json.dumps({"format": FORMAT, **manifest, "files": hashes}, indent=2, allow_nan=False) + "\n"
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        new, old = Path(temporary, "new"), Path(temporary, "old")
        new.mkdir()
        for name, data in {**files, MANIFEST: text.encode()}.items():
            _refuse_path(new, name)
            (new / name).write_bytes(data)
        Bundle.read(new)
        try:
            if folder.exists():
                os.rename(folder, old)
            os.rename(new, folder)
        except BaseException:  # Ctrl-C, too
            if old.exists() and not folder.exists():
                os.rename(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    return Bundle.read(folder)


def _refuse_path(folder: Path, name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name):
        raise BundleError(f"{folder / MANIFEST}: expected plain file names, got {name!r}")


def _read_file(folder: Path, name: str) -> bytes:
    _refuse_path(folder, name)
    path, largest = folder / name, LARGEST.get(Path(name).suffix, 2**24)
    try:
        if path.resolve().parent != folder.resolve():
            raise BundleError(f"{path}: a link that leaves the bundle")
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > largest:  # a pipe would be waited for without end
            raise BundleError(f"{path}: expected a file of at most {largest} bytes")
        return path.read_bytes()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise BundleError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _check_graphs(folder: Path, manifest: Manifest, contents: dict[str, bytes]) -> None:
    """Every input is fed with what it takes, and every output that is asked for is there."""
    streams = {spec.name: spec for spec in manifest.streams}
    m = (1, len(streams))
    outputs: dict[str, TensorInfo] = {}  # "part.output" of the parts so far

    def source(ref: str, user: str) -> TensorInfo:
        if ref not in outputs:
            raise BundleError(f"{folder / MANIFEST}: {user} expects an output of a part before it, got {ref!r}")
        return outputs[ref]

    for part in manifest.parts:
        signature = _signature(folder / part.file, contents[part.file])
        want = {"dt": TensorInfo("float32", (1, 1))}
        if part.stream is None:
            want |= {"mask": TensorInfo("float32", m), "age": TensorInfo("float32", m)}
        else:
            spec = streams[part.stream]
            want["x"] = TensorInfo(spec.dtype, (1, *spec.shape))
        want |= {f"{name}_in": TensorInfo("float32", shape) for name, shape in part.state.items()}
        want |= {name: source(ref, f"{part.name}.{name}") for name, ref in part.uses.items()}
        carried = {f"{name}_out": TensorInfo("float32", shape) for name, shape in part.state.items()}
        carried["ok"] = TensorInfo("float32", (1,))
        _expect_tensors(folder / part.file, "inputs", want, signature.inputs)
        given = {n: t for n, t in signature.outputs.items() if n in carried}
        _expect_tensors(folder / part.file, "outputs", carried, given)
        outputs |= {f"{part.name}.{n}": t for n, t in signature.outputs.items() if n not in carried}

    for name, ref in manifest.outputs.sources().items():
        info = source(ref, f"outputs.{name}")
        named = {"action": manifest.outputs.action, "values": manifest.outputs.values}.get(name)
        last = len(named.names) if named else m[1] if name == "gates" else None
        dims = 2 if name in ("gates", "values", "embedding") else 3
        if info.dtype != "float32" or len(info.shape) != dims or info.shape[0] != 1:
            raise BundleError(f"{folder / MANIFEST}: {ref} cannot be the {name}: it is {info}")
        if last not in (None, info.shape[-1]):
            raise BundleError(f"{folder / MANIFEST}: {ref} has {info.shape[-1]} values for the {name}, expected {last}")
    if manifest.language:
        _check_language(folder, manifest, contents, outputs, source)


def _check_language(
    folder: Path,
    manifest: Manifest,
    contents: dict[str, bytes],
    outputs: dict[str, TensorInfo],
    source: Callable[[str, str], TensorInfo],
) -> None:
    """What the text's graph gives is added to `outputs`, for the decoder to use."""
    language, number = manifest.language, TensorInfo("int64", (1,))
    assert language is not None
    rows = None
    if language.decoder and language.decoder.rows:
        rows = source(language.decoder.rows, "language.decoder.rows")
        if rows.dtype != "float32" or len(rows.shape) != 3 or rows.shape[0] != 1:
            raise BundleError(f"{folder / MANIFEST}: language.decoder.rows: expected float32 (1, n, D), got {rows}")
    if text := language.text:
        signature = _signature(folder / text.file, contents[text.file])
        want = {"tokens": TensorInfo("int64", (1, text.length))}
        want |= {name: source(ref, f"language.text.{name}") for name, ref in text.uses.items()}
        _expect_tensors(folder / text.file, "inputs", want, signature.inputs)
        outputs |= {f"text.{name}": info for name, info in signature.outputs.items()}
        if manifest.outputs.embedding:
            image = source(manifest.outputs.embedding.source, "outputs.embedding")
            given = {name: info for name, info in signature.outputs.items() if name == "embedding"}
            _expect_tensors(folder / text.file, "outputs", {"embedding": image}, given)
    if decoder := language.decoder:
        signature = _signature(folder / decoder.file, contents[decoder.file])
        path, info = folder / decoder.file, signature.inputs.get("keys", TensorInfo("float32", ()))
        if len(info.shape) != 4 or info.shape[3] != decoder.length:
            raise BundleError(f"{path}: inputs 'keys': expected (layers, heads, d, {decoder.length}), got {info}")
        layers, heads, d, n = info.shape
        want = {
            "token": number, "place": number, "keys": TensorInfo("float32", (layers, heads, d, n)),
            "values": TensorInfo("float32", (layers, heads, n, d)), "mask": TensorInfo("float32", (n,)),
        }  # fmt: skip
        want |= {name: source(ref, f"language.decoder.{name}") for name, ref in decoder.uses.items()}
        if rows:
            want["row"] = TensorInfo("float32", (1, rows.shape[2]))
        _expect_tensors(path, "inputs", want, signature.inputs)
        given = {name: info for name, info in signature.outputs.items() if name not in ("logits", "attention")}
        own = TensorInfo("float32", (layers, heads, d))
        _expect_tensors(path, "outputs", {"key": own, "value": own}, given)
        tokens = signature.outputs.get("logits", own)
        if tokens.dtype != "float32" or len(tokens.shape) != 2 or tokens.shape[0] != 1:
            raise BundleError(f"{path}: outputs 'logits': expected float32 (1, tokens), got {tokens}")
        looked = signature.outputs.get("attention", TensorInfo("float32", (1, 1, 1)))
        if looked.dtype != "float32" or len(looked.shape) != 3 or looked.shape[0] != 1:
            raise BundleError(f"{path}: outputs 'attention': expected float32 (1, rows, columns), got {looked}")
        prompts = [t for pieces in decoder.prompts.values() for p in pieces if p[0].isdigit() for t in p.split()]
        if max([decoder.end, *decoder.unsaid, *map(int, prompts)]) >= tokens.shape[1]:
            raise BundleError(
                f"{folder / MANIFEST}: language.decoder names tokens beyond the {tokens.shape[1]} there are"
            )


def _signature(path: Path, onnx: bytes) -> Signature:
    try:
        return read_signature(onnx)
    except ValueError as error:  # UnicodeDecodeError too
        raise BundleError(f"{path}: {error}") from None


def _expect_tensors(path: Path, what: str, want: dict[str, TensorInfo], got: dict[str, TensorInfo]) -> None:
    for name in sorted(want.keys() | got.keys()):
        expected, came = want.get(name, "nothing"), got.get(name, "nothing")
        if expected != came:
            raise BundleError(f"{path}: {what} {name!r}: expected {expected}, got {came}")


def _parse_golden(path: Path, data: bytes) -> dict[str, np.ndarray]:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            size = sum(member.file_size for member in arrays.zip.infolist())
            if size > LARGEST[".npz"]:
                raise ValueError(f"expected at most {LARGEST['.npz']} bytes when unpacked, got {size}")
            return {name: np.asarray(arrays[name]) for name in arrays.files}
    except Exception as error:  # numpy and zipfile raise a dozen kinds on damaged files
        raise BundleError(f"{path}: {type(error).__name__}: {error}") from None


def _parse_vocabulary(path: Path, data: bytes) -> Vocabulary:
    try:
        words = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: {error}") from None
    if not isinstance(words, list) or not all(isinstance(w, str) and words_of(w) == [w] for w in words):
        raise BundleError(f"{path}: expected a list of words in lower case, without signs")
    return Vocabulary(words)
