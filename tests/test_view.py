"""What `mm-edge view` draws is read back from rerun's files, from a robot that is live, and from a browser's screen."""

import contextlib
import dataclasses
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2", reason="the viewer needs cv2")
pytest.importorskip("rerun", reason="the viewer needs rerun: pip install -e .[viewer]")

import pyarrow as pa
from rerun.chunk import RrdReader

from mm_edge.bundle import SHIPPED, Bundle
from mm_edge.cli import main
from mm_edge.errors import MissingDependency
from mm_edge.messages import output_to_json
from mm_edge.overlay import DIM
from mm_edge.preprocess import mel_bank
from mm_edge.types import Action, Attention, Audio, Caption, Event, Output, Sample, Scan, StreamSpec
from mm_edge.viewer import CELL, Viewer

pytestmark = pytest.mark.real_time

S = 1_000_000_000
MS = 1_000_000
TWIST = ("linear_x", "angular_z")
BUNDLE = Bundle.read(SHIPPED)


def logged(path):
    """Entity -> its rows by time: (stamp_ns, component -> value), without what is static."""
    rows = {}
    for chunk in RrdReader(path).stream():
        if chunk.is_static:
            continue
        assert chunk.timeline_names == ["stamp"]  # and nothing that a clock says
        batch = chunk.to_record_batch()
        stamps_ns = batch.column("stamp").cast(pa.int64()).to_pylist()
        components = {name: batch.column(name).to_pylist() for name in batch.schema.names if ":" in name}
        for i, stamp_ns in enumerate(stamps_ns):
            values = {name: column[i] for name, column in components.items() if column[i] is not None}
            rows.setdefault(chunk.entity_path[1:], []).append((stamp_ns, values))
    return {entity: sorted(found, key=lambda row: row[0]) for entity, found in rows.items()}


def numbers(rows):
    """(stamp_ns, value) of scalars, None for a gap."""
    return [(stamp_ns, values.get("Scalars:scalars", [None])[0]) for stamp_ns, values in rows]


def texts(rows):
    return [(stamp_ns, values["TextLog:level"][0], values["TextLog:text"][0]) for stamp_ns, values in rows]


def picture(values):
    """As it was encoded, RGB or RGBA."""
    image = cv2.imdecode(np.array(values["EncodedImage:blob"][0], np.uint8), cv2.IMREAD_UNCHANGED)
    return image[..., [2, 1, 0, 3][: image.shape[2]]]


@pytest.fixture
def drawn(tmp_path):
    """Draws samples and outputs, and gives what was logged of them."""

    def draw(*what, bundle=BUNDLE):
        viewer = Viewer(bundle)
        viewer.save(tmp_path / "drawn.rrd")
        for thing in what:
            (viewer.output if isinstance(thing, Output) else viewer.sample)(thing)
        viewer.close()
        return logged(tmp_path / "drawn.rrd")

    return draw


def output(stamp_ns, mask=None, **kwargs):
    mask = mask or {"camera": True}
    return Output(stamp_ns, {}, mask, dict.fromkeys(mask, 0.0), **{"reasons": (), **kwargs})


def frame(stamp_ns, colour=(200, 100, 50)):
    return Sample("camera", stamp_ns, stamp_ns + 30 * MS, np.full((48, 64, 3), colour, np.uint8))


def test_a_frame_is_a_jpeg_at_its_stamp(drawn):
    ((stamp_ns, values),) = drawn(frame(5 * S))["camera/frame"]
    assert stamp_ns == 5 * S and values["EncodedImage:media_type"] == ["image/jpeg"]
    assert picture(values).shape == (48, 64, 3)
    assert np.abs(picture(values).astype(int) - (200, 100, 50)).max() <= 3


def test_attention_lies_over_the_frame_that_it_is_about_and_goes_with_it(drawn):
    weights = np.zeros((12, 16), np.float32)
    weights[2, 3] = 1.0
    looks = output(6 * S, attention=(Attention("camera", 5 * S, weights),))
    first, gone = drawn(frame(5 * S), looks, output(7 * S))["camera/attention"]
    stamp_ns, values = first
    assert stamp_ns == 5 * S and values["Transform3D:scale"] == [[64 / (16 * CELL), 48 / (12 * CELL), 1.0]]
    opacity = picture(values)[..., 3]
    assert opacity.shape == (12 * CELL, 16 * CELL)
    assert np.unravel_index(opacity.argmax(), opacity.shape) == pytest.approx((2.5 * CELL, 3.5 * CELL), abs=1)
    assert opacity.max() >= 170 and not opacity[5 * CELL :].any()
    assert gone[0] == 7 * S and picture(gone[1]).tolist() == [[[0, 0, 0, 0]]]


def test_a_scan_is_seen_from_above_ahead_being_up(drawn):
    """Nothing is drawn where nothing was met, or measured, or where the sensor cannot see."""
    ranges = np.float32([1, 2, 3, np.inf, np.nan, 7])
    scan = Scan(ranges, 0.0, float(np.float32(np.pi / 2)), 0.05, 6.0)
    ((_, values),) = drawn(Sample("scan", S, S, scan))["around/scan"]
    assert np.allclose(values["Points2D:positions"], [(0, -1), (-2, 0), (0, 3)], atol=1e-5)


def test_sound_is_a_spectrogram_with_its_newest_at_the_right(drawn):
    """A tone of 1 kHz in the left ear, 0.2 s of it, and before that nothing."""
    t = np.arange(3200) / 16000
    samples = np.stack([8000 * np.sin(2 * np.pi * 1000 * t), 0 * t], axis=1).astype(np.int16)
    chunks = [
        Sample("audio", S + i * 20 * MS, S + (i + 1) * 20 * MS, Audio(samples[320 * i : 320 * (i + 1)], 320 * i, 16000))
        for i in range(10)
    ]
    rows = drawn(*chunks)["audio/spectrogram"]
    assert [stamp_ns - S for stamp_ns, _ in rows] == [20 * MS, 120 * MS]  # at most each 0.1 s, at the sound's end
    image = picture(rows[-1][1]).astype(int)
    loud, left = image[:24, -1].sum(axis=1), image[24:, -1]
    band = mel_bank(16000, 512, 24)[32].argmax()  # 1 kHz is line 32 of 256 up to 8 kHz
    assert 23 - loud.argmax() == pytest.approx(band, abs=1)  # high tones are above
    assert tuple(left[23 - band]) == (255, 150, 40)
    assert (image[:, :200] == DIM).all()  # not heard


def test_imu_vectors_points_and_words_are_logged_as_they_are(drawn):
    more = (StreamSpec("odom", "vector", (2,), 10, 100), StreamSpec("cloud", "points", (8, 4), 10, 100, range_max_m=5))
    rows = drawn(
        Sample("imu", S, S, np.float32([1, 2, 3, 4, 5, 6])),
        Sample("odom", S, S, np.float32([0.5, -0.5])),
        Sample("cloud", S, S, np.float32([[1, 2, 3]])),
        Sample("text", S, S, "drive to the moon"),  # words that the model does not know, too
        bundle=dataclasses.replace(BUNDLE, streams=(*BUNDLE.streams, *more)),
    )
    assert rows["imu/acceleration"] == [(S, {"Scalars:scalars": [1, 2, 3]})]
    assert rows["imu/angular_velocity"] == [(S, {"Scalars:scalars": [4, 5, 6]})]
    assert rows["odom"] == [(S, {"Scalars:scalars": [0.5, -0.5]})]
    assert rows["cloud/points"][0][1]["Points3D:positions"] == [[1, 2, 3]]
    assert texts(rows["log/text"]) == [(S, "INFO", "drive to the moon")]


def test_what_no_model_could_take_is_not_drawn(drawn):
    wrong = [
        Sample("camera", S, S, np.zeros((48, 64), np.uint8)),
        Sample("imu", S, S, np.full(6, np.nan, np.float32)),
        Sample("audio", S, S, Audio(np.zeros((320, 1), np.int16), 0, 16000)),
        Sample("audio", 2 * S, S, Audio(np.zeros((320, 2), np.int16), 0, 16000)),  # from the future
        Sample("sonar", S, S, "of another model"),
    ]
    assert drawn(*wrong, frame(2 * S)).keys() == {"camera/frame"}


def test_actions_have_a_gap_where_there_was_none_and_a_path_from_above(drawn):
    acts = output(S, action=Action(TWIST, np.float32([[0.5, 0.0], [9, 9]]), 0.1))
    rows = drawn(acts, output(2 * S, reasons=("no command",)))
    assert numbers(rows["action/linear_x"]) == [(S, 0.5), (2 * S, None)]
    assert numbers(rows["action/angular_z"]) == [(S, 0.0), (2 * S, None)]
    (_, path), (_, gone) = rows["around/path"]
    ahead = np.array(path["LineStrips2D:strips"][0])
    assert np.allclose(ahead[[0, -1]], [(0, 0), (0, -0.75)])  # in 1.5 s
    assert gone == {"Clear:is_recursive": [True]}
    turns = output(S, action=Action(TWIST, np.float32([[0.5, 1.0]]), 0.1))
    left = np.array(drawn(turns)["around/path"][0][1]["LineStrips2D:strips"][0])
    assert left[-1][0] < -0.2


def test_ages_gates_and_values_are_curves(drawn):
    says = Output(
        S, {}, {"camera": True}, {"camera": 0.25, "scan": float("inf")}, gates={"camera": 0.75}, values={"x": 2.0}
    )
    rows = drawn(says)
    curves = {entity: numbers(found) for entity, found in rows.items() if "Scalars:scalars" in found[0][1]}
    assert curves == {"age_s/camera": [(S, 0.25)], "gate/camera": [(S, 0.75)], "value/x": [(S, 2.0)]}


def test_a_missing_sensor_is_told_once_and_marked_where_its_last_data_stay(drawn):
    masks = [{"camera": camera, "scan": scan} for camera, scan in ((1, 1), (1, 1), (0, 1), (0, 0), (1, 0))]
    outputs = [output(i * S, {k: bool(v) for k, v in mask.items()}) for i, mask in enumerate(masks, 1)]
    rows = drawn(frame(S), *outputs)
    states = {
        name: [(t // S, v["StateChange:state"][0]) for t, v in rows[f"mask/{name}"]] for name in ("camera", "scan")
    }
    assert states == {
        "camera": [(1, "present"), (3, "missing"), (5, "present")],
        "scan": [(1, "present"), (4, "missing")],
    }
    _, (stamp_ns, box), (back_ns, gone) = rows["camera/missing"]
    assert (stamp_ns, back_ns, gone) == (3 * S, 5 * S, {"Clear:is_recursive": [True]})
    assert box["Boxes2D:centers"] == box["Boxes2D:half_sizes"] == [[32, 24]]  # all of the frame
    assert rows["around/missing/scan"][-1][1]["Boxes2D:half_sizes"] == [[6, 6]]  # as far as it reaches
    labels = [values["Points2D:labels"] for entity in ("camera/missing/label", "around/missing/scan/label")
              for _, values in rows[entity]]  # fmt: skip
    assert labels == [["camera missing"], ["scan missing"]]


def test_words_are_told_when_they_are_new_whatever_their_numbers(drawn):
    why = [("scan dead: silent for 0.50 s",), ("scan dead: silent for 0.57 s", "no command"), (), ("no command",)]
    outputs = [output(i * S, reasons=reasons) for i, reasons in enumerate(why, 1)]
    noted = output(9 * S, notes=("imu jitters",), caption=Caption("a red ball", 0.9), events=(Event("a beep", 1.0, 0),))
    rows = drawn(*outputs, noted)
    assert texts(rows["log/reasons"]) == [
        (S, "ERROR", "scan dead: silent for 0.50 s"),
        (2 * S, "ERROR", "no command"),
        (4 * S, "ERROR", "no command"),
    ]
    assert texts(rows["log/notes"]) == [(9 * S, "WARN", "imu jitters")]
    assert texts(rows["log/caption"]) == [(9 * S, "INFO", "a red ball")]
    assert texts(rows["log/events"]) == [(9 * S, "INFO", "a beep")]


def test_without_rerun_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(MissingDependency, match=r"the viewer needs rerun: .* -m pip install .*\[viewer\]"):
        Viewer(BUNDLE)


# ---- the command

QUADRANTS = {(0, 0): (240, 20, 190), (0, 1): (250, 140, 60), (1, 0): (20, 215, 215), (1, 1): (130, 90, 230)}
PERIOD_NS, TICKS = 100 * MS, 20


@pytest.fixture
def toy(tmp_path):
    from toy_bundle import write_toy_bundle

    pytest.importorskip("onnxruntime", reason="the toy bundle runs on onnxruntime")
    write_toy_bundle(tmp_path / "toy")
    return tmp_path / "toy"


@pytest.fixture
def recording(tmp_path):
    """Two seconds of a camera that sees four colours, equally bright, so that no attention is on any."""
    pytest.importorskip("rosbags", reason="rosbags is not installed")
    from toy_bundle import STREAMS

    from mm_edge.recording import RecordingWriter

    seen = np.zeros((120, 160, 3), np.uint8)
    for (row, column), colour in QUADRANTS.items():
        seen[60 * row : 60 * row + 60, 80 * column : 80 * column + 80] = colour
    with RecordingWriter(tmp_path / "rec", STREAMS) as writer:
        writer.write(Sample("text", S, S, "go"))
        for i in range(1, TICKS + 1):
            writer.write(Sample("camera", S + i * PERIOD_NS, S + i * PERIOD_NS, seen))
    return tmp_path / "rec"


def test_the_command_draws_what_went_in_and_what_came_out(toy, recording, tmp_path, capsys):
    assert main(["view", str(recording), "--bundle", str(toy), "--save", str(tmp_path / "a.rrd")]) == 0
    assert main(["replay", str(toy), str(recording)]) == 0
    out = capsys.readouterr().out.splitlines()
    rerun = Path(sys.executable).with_name("rerun")
    assert out[0] == f"{tmp_path / 'a.rrd'}: see it with `{rerun} {tmp_path / 'a.rrd'}`"
    outputs = [json.loads(line) for line in out[1:]]
    actions = [(o["stamp_ns"], o["action"]["values"][0][0] if o["action"] else None) for o in outputs]
    rows = logged(tmp_path / "a.rrd")
    assert len(outputs) == TICKS + 1 and numbers(rows["action/linear_x"]) == actions
    assert [stamp_ns for stamp_ns, _ in rows["camera/frame"]] == [S + i * PERIOD_NS for i in range(1, TICKS + 1)]
    assert texts(rows["log/text"]) == [(S, "INFO", "go")]
    assert "imu never seen" in [text for _, _, text in texts(rows["log/notes"])]


def test_of_a_recording_it_is_said_what_the_camera_saw_as_that_changes(toy, tmp_path):
    pytest.importorskip("rosbags", reason="rosbags is not installed")
    from toy_language import BLUE, RED, write_toy_language

    from mm_edge.recording import RecordingWriter

    # Of the fourth, a black one, the model makes 0 / 0.
    vlm, camera = write_toy_language(tmp_path / "vlm").path, Bundle.read(toy).streams[:1]
    with RecordingWriter(tmp_path / "rec", camera) as writer:
        for i, seen in enumerate([RED, RED, BLUE, 0 * BLUE, RED], 1):
            writer.write(Sample("camera", i * PERIOD_NS, i * PERIOD_NS, seen))
    arguments = ["--bundle", str(toy), "--vlm", str(vlm), "--save", str(tmp_path / "a.rrd")]
    assert main(["view", str(tmp_path / "rec"), *arguments]) == 0
    said = [(1, "a red ball"), (3, "a blue ball"), (5, "a red ball")]
    assert texts(logged(tmp_path / "a.rrd")["log/caption"]) == [(i * PERIOD_NS, "INFO", text) for i, text in said]


def test_what_cannot_be_shown_is_told_in_a_line(toy, recording, tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        wrong = {
            "expected a recording, or --ros for a robot that is live": [],
            "--vlm is for recordings: what a live robot sees, its caption_node says": ["--ros", "--vlm", str(toy)],
            "toy: expected a bundle with a language, this one has none": [str(recording), "--vlm", str(toy)],
            "expected a port from 1 to 65534, got 65535": [str(recording), "--port", "65535"],
            f"{tmp_path}/no/a.rrd: cannot be written (No such file": [str(recording), "--save", f"{tmp_path}/no/a.rrd"],
            f"port {port} cannot be served (Address already in use)": [str(recording), "--port", str(port)],
        }
        for expected, arguments in wrong.items():
            assert main(["view", "--bundle", str(toy), *arguments]) == 1
            assert expected in capsys.readouterr().err


@contextlib.contextmanager
def viewing(*arguments, env=None):
    """`mm-edge view` as a process, ended as by Ctrl-C."""
    command = [sys.executable, "-m", "mm_edge.cli", "view", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    view = subprocess.Popen(command, env=env, cwd=Path(__file__).parents[1], **pipes)
    try:
        yield view
        view.send_signal(signal.SIGINT)
        errors = view.communicate(timeout=30)[1]
        assert view.returncode == 0, errors
    finally:
        if view.poll() is None:
            view.kill()
            view.communicate()


def test_a_robot_is_seen_live(toy, tmp_path):
    """Its frames, its command and its outputs, as others hear them."""
    import ros  # skips where there is no ROS 2
    from std_msgs.msg import String
    from test_ros import GREY, Robot

    with ros.ros_graph(tmp_path / "logs") as graph:
        graph.nodes.start("edge_node", {"bundle": toy})
        robot, file = Robot(graph), tmp_path / "live.rrd"
        graph.wait(robot.acts, "action")
        with viewing("--ros", "--bundle", toy, "--save", file, env=graph.nodes.env) as view:
            grown = lambda: file.exists() and file.stat().st_size > 30_000  # noqa: E731
            graph.wait(lambda: grown() or view.poll() is not None, "picture", 60)
            said = graph.node.create_publisher(String, "caption/output", 10)
            answers = graph.node.create_publisher(String, "answer", 10)
            graph.wait(lambda: said.get_subscription_count() and answers.get_subscription_count(), "listener")
            said.publish(String(data="what is no output ends nothing"))
            said.publish(String(data=output_to_json(output(5 * S, caption=Caption("a grey wall", 0.9)))))
            answers.publish(String(data=json.dumps({"question": "is it grey?", "answer": "yes", "reason": ""})))
            until = len(robot.outputs) + 60
            graph.wait(lambda: len(robot.outputs) > until, "60 outputs more")
    rows = logged(file)
    heard = {o["stamp_ns"]: o for o in (json.loads(msg.data) for msg in robot.outputs)}
    told = {stamp_ns: o["action"]["values"][0][0] for stamp_ns, o in heard.items() if o["action"]}
    both = [(told[stamp_ns], value) for stamp_ns, value in numbers(rows["action/linear_x"]) if stamp_ns in told]
    assert len(both) > 40 and all(sent == drawn for sent, drawn in both)
    frames = rows["camera/frame"]
    assert len(frames) > 40 and np.abs(picture(frames[-1][1]).astype(int) - GREY).max() <= 3
    used = {o["sources"]["camera"] for o in heard.values() if "camera" in o["sources"]}
    assert len(used & {stamp_ns for stamp_ns, _ in frames}) > 40
    assert [text for _, _, text in texts(rows["log/text"])] == ["go"]
    assert texts(rows["log/caption"]) == [(5 * S, "INFO", "a grey wall")]
    assert [text for _, _, text in texts(rows["log/answer"])] == ["is it grey? yes"]


# ---- a browser

FLAGS = ["--headless=new", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-sandbox"]


@pytest.fixture
def page():
    """Of a real browser, without internet: only this machine is reached."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="a browser is driven by playwright: pip install playwright"
    )
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no chromium here")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 720})
        page.route(lambda url: not url.startswith("http://127.0.0.1:"), lambda route: route.abort())
        yield page
        browser.close()


def free_port():
    """The first of two that follow each other."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("", 0))
            port = first.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                second.bind(("", port + 1))
                return port


def quadrants(screen):
    """Where the four colours are on the screen, (n, 2) rows and columns each."""
    return {at: np.argwhere(np.abs(screen.astype(int) - colour).max(axis=2) < 16) for at, colour in QUADRANTS.items()}


def test_a_browser_without_internet_shows_what_the_camera_saw(toy, recording, tmp_path, page):
    with viewing(recording, "--bundle", toy, "--port", free_port()) as view:
        said = [view.stdout.readline().strip() for _ in range(3)]
        assert said[2] == "all of it is there; serving until Ctrl-C", view.stderr.read()
        page.goto(said[0].removeprefix("open "))
        end = time.monotonic() + 120
        found = {}
        while not found or min(map(len, found.values())) < 2000:
            assert time.monotonic() < end, f"the camera is not in {tmp_path / 'screen.png'}"
            page.screenshot(path=tmp_path / "screen.png", timeout=60_000)
            found = quadrants(cv2.imread(str(tmp_path / "screen.png"))[..., ::-1])
    centres = {at: pixels.mean(axis=0) for at, pixels in found.items()}
    (top, left), (bottom, right) = centres[0, 0], centres[1, 1]
    assert bottom - top > 40 and right - left > 40
    assert centres[0, 1] == pytest.approx((top, right), abs=6) and centres[1, 0] == pytest.approx((bottom, left), abs=6)
    sizes = [len(pixels) for pixels in found.values()]
    assert max(sizes) < 1.2 * min(sizes)
