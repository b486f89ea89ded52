"""A bundle is read whole and verified, or refused by the name of the file that is wrong."""

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from toy_bundle import GRAPHS, STREAMS, files, manifest, onnx_bytes, write_toy_bundle

from mm_edge.bundle import SHIPPED, Bundle, write_bundle
from mm_edge.errors import BundleError


@pytest.fixture
def toy(tmp_path) -> Path:
    return write_toy_bundle(tmp_path / "toy").path


def rewrite(folder: Path, change=lambda manifest: None, **contents: bytes) -> Path:
    """Change files of a bundle, and its manifest, with hashes that are right: damage by whoever made it."""
    data = json.loads((folder / "manifest.json").read_text())
    for name, content in contents.items():
        name = name.replace("__", ".")
        (folder / name).write_bytes(content)
        data["files"][name] = hashlib.sha256(content).hexdigest()
    change(data)
    (folder / "manifest.json").write_text(json.dumps(data))
    return folder


def test_what_was_written_is_read(toy):
    bundle = Bundle.read(toy)
    assert bundle.id == hashlib.sha256((toy / "manifest.json").read_bytes()).hexdigest()
    assert bundle.streams == STREAMS
    assert [part.name for part in bundle.parts] == ["text", "camera", "imu", "fusion"]
    assert bundle.outputs.action.names == ("linear_x", "angular_z")
    assert bundle.vocabulary.words == ("go", "stop", "crash")
    assert bundle.golden["mask"].shape == (12, 3)
    assert bundle.contents["imu.onnx"] == onnx_bytes("imu")


def test_reading_needs_neither_torch_nor_onnx_nor_an_engine(toy):
    code = f"import sys; from mm_edge.bundle import Bundle; Bundle.read({str(toy)!r}); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "onnx", "onnxruntime", "rclpy", "training"} & set(modules)


@pytest.mark.parametrize("name", ["manifest.json", "camera.onnx", "vocabulary.json", "golden.npz"])
def test_a_missing_file_is_named(toy, name):
    (toy / name).unlink()
    with pytest.raises(BundleError, match=f"{name}: cannot be read"):
        Bundle.read(toy)


@pytest.mark.parametrize("name", ["camera.onnx", "vocabulary.json", "golden.npz"])
def test_a_changed_byte_is_noticed(toy, name):
    content = bytearray((toy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (toy / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name}: its sha256"):
        Bundle.read(toy)


def test_no_bundle_there(tmp_path):
    with pytest.raises(
        BundleError, match=r"nowhere: expected the folder of a bundle, or the name of a shipped one: .*drive"
    ):
        Bundle.read(tmp_path / "nowhere")


def test_a_name_that_is_nearly_right_is_guessed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match=r"Word: expected .*; did you mean words\?$"):
        Bundle.read("Word")
    with pytest.raises(BundleError, match=r"runs/word: expected .* words$"):
        Bundle.read("runs/word")


def set_in(*path):
    """A change of a manifest: the last of `path` is the value set at the keys before it."""
    *keys, last, value = path

    def change(data):
        for key in keys:
            data = data[key]
        data[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (set_in("format", 2), "expected format 1, got 2"),
        (set_in("colour", "red"), "unknown \\['colour'\\]"),
        (lambda m: m.pop("tick"), "missing \\['tick'\\]"),
        (lambda m: m["parts"][1].pop("uses"), "parts\\[1\\]: missing \\['uses'\\]"),
        (set_in("streams", 0, "shape", "8x8"), "streams\\[0\\].shape: expected a list"),
        (set_in("streams", 0, "rate_hz", True), "streams\\[0\\].rate_hz: expected a float, got 'True'"),
        (set_in("streams", 0, "rate_hz", float("nan")), "expected finite numbers, got NaN"),
        (set_in("streams", 0, "kind", "smell"), "camera: a kind of"),
        (set_in("streams", 0, "shape", [8, 8, 4]), "camera: a shape like \\(n, n, 3\\)"),
        (set_in("streams", 1, "std", [0.0]), "imu: as many std as mean, above 0"),
        (set_in("streams", 1, "window_ms", 0), "imu: window_ms above 0"),
        (set_in("streams", 1, "window_ms", 4e-7), "imu: window_ms above 0"),
        (set_in("streams", 1, "frozen_ms", 1e4), "imu: frozen_ms of at most"),
        (set_in("streams", 1, "joints", ["elbow"]), "imu: joints of a vector alone, each of another name"),
        (set_in("tick", "anchor", "radar"), "tick.anchor to be one of"),
        (set_in("tick", {"anchor": "camera", "period_ms": 1e-9, "max_period_ms": 1e-9}), "1 <= period_ms"),
        (set_in("tick", "period_ms", 200), "1 <= period_ms <= max_period_ms"),
        (set_in("parts", 0, "name", "../text"), "names of a-z, 0-9 and _"),
        (set_in("parts", 0, "stream", "radar"), "text.stream to be null or one of"),
        (set_in("parts", 1, "uses", {"text": "fusion.action"}), "camera.text expects an output of a part before it"),
        (set_in("outputs", "action", "source", "fusion.nothing"), "outputs.action expects an output"),
        (set_in("outputs", "action", "names", ["linear_x"]), "of one length"),
        (set_in("outputs", "action", "min", [0.1, -2]), "action min <= 0 <= max"),
        (set_in("outputs", "action", "interface", "effort"), "action.interface to be one of"),
        (set_in("outputs", "gates", "source", "imu.token"), "imu.token has 1 values for the gates, expected 3"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(toy, change, why):
    with pytest.raises(BundleError, match=rf"manifest.json: .*{why}"):
        Bundle.read(rewrite(toy, change))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "1" * 5000, "\ud800".encode("utf8", "surrogatepass")])
def test_a_manifest_that_is_no_json_object_is_refused(toy, text):
    (toy / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BundleError, match=r"manifest.json"):
        Bundle.read(toy)


@pytest.mark.parametrize("name", ["../camera.onnx", "/etc/passwd", "a/b.onnx", "..", "", "a\nb"])
def test_a_path_that_leaves_the_folder_is_refused(toy, name):
    with pytest.raises(BundleError, match="plain file names"):
        Bundle.read(rewrite(toy, set_in("files", name, "0" * 64)))


def test_a_link_that_leaves_the_folder_is_refused(toy, tmp_path):
    os.rename(toy / "camera.onnx", tmp_path / "camera.onnx")
    (toy / "camera.onnx").symlink_to(tmp_path / "camera.onnx")
    with pytest.raises(BundleError, match=r"camera.onnx: a link that leaves the bundle"):
        Bundle.read(toy)


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(toy):
    (toy / "camera.onnx").unlink()
    os.mkfifo(toy / "camera.onnx")
    with pytest.raises(BundleError, match=r"camera.onnx: expected a file of at most 2147483647 bytes"):
        Bundle.read(toy)


@pytest.mark.parametrize("name", ["manifest.json", "camera.onnx", "golden.npz"])
def test_a_file_larger_than_memory_is_not_read(toy, name):
    os.truncate(toy / name, 2**40)  # a terabyte, of which the disk holds nothing
    with pytest.raises(BundleError, match=f"{name}: expected a file of at most"):
        Bundle.read(toy)


def test_a_golden_trace_that_is_small_until_it_is_unpacked_is_refused(toy):
    file = io.BytesIO()
    np.savez_compressed(file, dt=np.zeros(2**27 + 1, np.uint8))
    with pytest.raises(BundleError, match=r"golden.npz: ValueError: expected at most 134217728 bytes when unpacked"):
        Bundle.read(rewrite(toy, golden__npz=file.getvalue()))


def test_a_graph_must_take_and_give_what_the_manifest_says(toy):
    with pytest.raises(BundleError, match=r"camera.onnx: inputs 'x': expected uint8 \(1, 9, 9, 3\), got uint8 \(1, 8"):
        Bundle.read(rewrite(toy, set_in("streams", 0, "shape", [9, 9, 3])))


def test_a_number_alone_is_no_action(toy):
    scalar = GRAPHS["fusion"].replace("float[1,1,2] action", "float action")
    fusion = onnx_bytes(
        "fusion", scalar.replace("action = Reshape (both, chunk)", "action = ReduceSum <keepdims = 0> (both)")
    )
    with pytest.raises(BundleError, match=r"fusion\.action cannot be the action"):
        write_bundle(toy, manifest(), {**files(), "fusion.onnx": fusion})


def test_state_that_the_graph_does_not_carry_is_refused(toy):
    with pytest.raises(BundleError, match=r"imu.onnx: inputs 'w_in': expected float32 \(1, 1\), got nothing"):
        Bundle.read(rewrite(toy, set_in("parts", 2, "state", {"v": [1, 1], "w": [1, 1]})))


def test_weights_in_another_file_are_refused(toy):
    model = onnx.load_from_string(onnx_bytes("imu"))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1000, np.float32), "weights"))
    tensor = model.graph.initializer[-1]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    with pytest.raises(BundleError, match=r"imu.onnx: weights in another file"):
        Bundle.read(rewrite(toy, imu__onnx=model.SerializeToString()))


def test_a_dynamic_shape_is_refused(toy):
    graph = GRAPHS["imu"].replace("float[1,4,7] x", "float[1,N,7] x")
    with pytest.raises(BundleError, match=r"imu.onnx: x has no static shape"):
        Bundle.read(rewrite(toy, imu__onnx=onnx_bytes("imu", graph)))


def test_a_pickle_is_not_loaded(toy):
    file = io.BytesIO()
    np.savez(file, dt=np.array([{"code": "runs on load"}], dtype=object))
    with pytest.raises(BundleError, match=r"golden.npz: ValueError: Object arrays cannot be loaded"):
        Bundle.read(rewrite(toy, golden__npz=file.getvalue()))


@pytest.mark.parametrize("words", [b"{}", b"[1]", b'["Go"]', b'["two words"]', b"go"])
def test_a_vocabulary_is_a_list_of_words(toy, words):
    with pytest.raises(BundleError, match=r"vocabulary.json"):
        Bundle.read(rewrite(toy, vocabulary__json=words))


def test_writing_an_invalid_bundle_leaves_the_old_one(toy):
    before = Bundle.read(toy).id
    with pytest.raises(BundleError, match=r"tick.anchor"):
        write_bundle(toy, {**manifest(), "tick": {"anchor": "radar", "period_ms": 1, "max_period_ms": 2}}, files())
    assert Bundle.read(toy).id == before
    assert os.listdir(toy.parent) == ["toy"]


def test_writing_replaces_the_whole_folder(toy):
    (toy / "old.onnx").write_bytes(b"")
    bundle = write_bundle(toy, {**manifest(), "task": "new"}, files())
    assert bundle.task == "new"
    assert sorted(os.listdir(toy)) == sorted([*bundle.files, "manifest.json"])


def test_a_folder_that_is_no_bundle_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="expected a bundle to replace"):
        write_toy_bundle(tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["years of work"]


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_what_cannot_be_put_in_place_leaves_the_old_one(toy, monkeypatch, error):
    before, rename = Bundle.read(toy).id, os.rename

    def fail(source, target):
        if Path(source).name == "new":
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(type(error)):
        write_bundle(toy, {**manifest(), "task": "new"}, files())
    assert Bundle.read(toy).id == before
    assert os.listdir(toy.parent) == ["toy"]


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory) -> Path:
    return write_toy_bundle(tmp_path_factory.mktemp("fuzz") / "toy").path


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FILE = st.sampled_from(["camera.onnx", "golden.npz", "vocabulary.json"])
JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([]), st.just({}), st.just(["x"])
)


def paths(value, path=()):
    """All places in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from paths(item, (*path, key))


@FUZZ
@given(st.data())
def test_any_value_anywhere_in_the_manifest_is_taken_or_refused(fuzzed, data):
    full = json.loads((write_toy_bundle(fuzzed).path / "manifest.json").read_text())
    place = data.draw(st.sampled_from([path for path in paths(full) if path]))
    set_in(*place, data.draw(JUNK))(full)
    (fuzzed / "manifest.json").write_text(json.dumps(full))
    try:
        assert isinstance(Bundle.read(fuzzed), Bundle)
    except BundleError as error:
        assert str(fuzzed) in str(error)


@FUZZ
@given(FILE, st.integers(0), st.integers(0, 255), st.booleans())
def test_any_changed_byte_of_a_file_is_taken_or_refused(fuzzed, name, at, byte, cut):
    content = bytearray(files()[name])
    if cut:
        del content[at % len(content) :]
    else:
        content[at % len(content)] = byte
    write_toy_bundle(fuzzed)
    rewrite(fuzzed, **{name.replace(".", "__"): bytes(content)})
    try:
        assert isinstance(Bundle.read(fuzzed), Bundle)
    except BundleError as error:
        assert str(fuzzed / "") in str(error)


def test_a_shipped_bundle_is_known_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "drive").mkdir()  # a folder of that name that is no bundle is not in its way
    assert Bundle.read("drive").path == SHIPPED
