"""One recording stitched out of real sensors, each with a rate, a jitter, a latency and faults of its own, on its way
to the model: what arrives there is compared with what was recorded, sample by sample.

    camera  Donkeycar frames, 160x120, at 15 Hz; time stamps are ours, since its own are not real
    scan    Intel Research Lab, 180 beams at about 5 Hz, with the gaps and the disorder of its log
    imu     a Husky at 30 Hz, with its real stamps and arrivals, out of a ROS 1 bag
    audio   spoken commands, 16 kHz, made stereo, in chunks of 20 ms, of which some are lost
    text    two commands, one of which no model knows
"""

import bz2
import json
import tarfile
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rosbags", reason="rosbags is not installed")
pytest.importorskip("soundfile", reason="soundfile is not installed: it reads the spoken commands")
pytest.importorskip("cv2", reason="no cv2 is installed")

import cv2
import soundfile

from mm_edge.align import Aligner
from mm_edge.bundle import SHIPPED, Bundle
from mm_edge.errors import SampleError
from mm_edge.manifest import Tick as TickTimes
from mm_edge.messages import output_to_json
from mm_edge.pipeline import Pipeline, model_inputs
from mm_edge.preprocess import Vocabulary, check, resize
from mm_edge.recording import RecordingWriter, read, read_metadata
from mm_edge.replay import events, replay
from mm_edge.types import Audio, Sample, Scan, StreamSpec

DATA = Path(__file__).parents[1].parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not here")

NS, MS = 1_000_000_000, 1_000_000
T0, SECONDS = 1_700_000_000 * NS, 6
CHUNK, RATE = 320, 16000
LOST_CHUNKS = (40, 41, 150)
SPECS = (
    StreamSpec("camera", "image", (96, 96, 3), 15, 300),
    StreamSpec("scan", "scan", (2, 120), 10, 300, range_max_m=6.0),
    StreamSpec("imu", "imu", (20, 7), 200, 100, window_ms=100),
    StreamSpec("audio", "audio", (3, 24, 8), 50, 200, window_ms=172, sample_rate_hz=RATE, channels=2),
    StreamSpec("text", "text", (12,), 0, 1000, latched=True),
)
TICK = TickTimes("camera", 66.7, 100.0)
COMMAND = "drive to the red ball"
BLIND = Scan(np.full(180, np.nan, np.float32), -1.5, 0.015625, 0.0, 80.0)
FAULTS = (  # put in by us
    Sample("text", T0 + 3 * NS, T0 + 3 * NS, "fetch me a sandwich"),
    Sample("scan", T0 + 2 * NS + 7, T0 + 2 * NS + 8, BLIND),
)
REFUSED = (
    "scan: expected at least 50% of 180 beams measured, got 0",
    "text: expected words among the 5 the model knows (drive, to, the, red, ball), got unknown ['fetch', 'me', 'a']",
)
VOCABULARY = Vocabulary(COMMAND.split())


def donkeycar(random):
    with tarfile.open(DATA / "donkey_tub_1000.tar.gz") as tub:
        for i in range(SECONDS * 15):
            jpeg = tub.extractfile(f"tub/images/{i}_cam_image_array_.jpg").read()
            image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
            stamp_ns = T0 + i * NS // 15 + int(random.normal(0, 2 * MS))
            yield Sample("camera", stamp_ns, stamp_ns + int(random.uniform(20, 50) * MS), np.ascontiguousarray(image))


def intel_lab(random):
    """`FLASER n r1 .. rn x y theta odom_x odom_y odom_theta stamp host logger_stamp`; 81.9 m is no return."""
    step, first_ns, arrival_ns = float(np.float32(np.pi / 180)), None, 0
    with (
        zipfile.ZipFile(DATA / "radish_2dlidar_odom_carmen.zip") as archive,
        archive.open("intel.clf.bz2") as log,
        bz2.open(log, "rt") as lines,
    ):
        for fields in (line.split() for line in lines if line.startswith("FLASER")):
            stamp_ns = round(float(fields[-3]) * 1e6) * 1000
            first_ns = first_ns or stamp_ns
            stamp_ns += T0 - first_ns
            if stamp_ns > T0 + SECONDS * NS:
                return
            ranges = np.float32(fields[2:182])
            ranges[ranges > 80] = np.inf
            scan = Scan(ranges, float(np.float32(-np.pi / 2)), step, 0.0, 80.0)
            arrival_ns = max(arrival_ns + MS, stamp_ns + int(random.uniform(5, 15) * MS))  # in the order of the log
            yield Sample("scan", stamp_ns, arrival_ns, scan)


def husky(folder):
    bag = zipfile.ZipFile(DATA / "imu_odom_ros1_bags.zip").extract("test/test1.bag", folder)
    samples = read(bag, [SPECS[2]], {"imu": "/imu/data"})
    first = next(samples)
    shift_ns = T0 - first.stamp_ns
    for sample in samples:
        if sample.stamp_ns + shift_ns > T0 + SECONDS * NS:
            return
        yield sample._replace(stamp_ns=sample.stamp_ns + shift_ns, arrival_ns=sample.arrival_ns + shift_ns)


def spoken():
    """int16 (SECONDS * RATE, 2): a word a second; the right ear hears it 4 samples later, and softer."""
    with zipfile.ZipFile(DATA / "speech_commands_v002_test.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".flac"))
        words = [next(n for n in names if n.startswith(w)) for w in ("go", "stop", "left", "right", "yes", "no")]
        sound = np.zeros((SECONDS * RATE, 2), np.int16)
        for i, name in enumerate(words):
            with archive.open(name) as file:
                word, rate = soundfile.read(file, dtype="int16")
            assert rate == RATE
            sound[i * RATE : i * RATE + len(word), 0] = word
    sound[4:, 1] = sound[:-4, 0] // 2
    return sound


def microphone(sound, random):
    for i in range(len(sound) // CHUNK):
        start_ns = T0 + i * CHUNK * NS // RATE
        arrival_ns = start_ns + 20 * MS + int(random.uniform(3, 12) * MS)
        if i not in LOST_CHUNKS:
            yield Sample("audio", start_ns, arrival_ns, Audio(sound[i * CHUNK : (i + 1) * CHUNK], i * CHUNK, RATE))


@pytest.fixture(scope="module")
def sound():
    return spoken()


@pytest.fixture(scope="module")
def samples(tmp_path_factory, sound):
    random = np.random.default_rng(7)
    found = [
        *donkeycar(random),
        *intel_lab(random),
        *husky(tmp_path_factory.mktemp("husky")),
        *microphone(sound, random),
        Sample("text", T0 + 900 * MS, T0 + 900 * MS, COMMAND),
        *FAULTS,
    ]
    return sorted(found, key=lambda sample: sample.arrival_ns)


@pytest.fixture(scope="module")
def recording(tmp_path_factory, samples):
    path = tmp_path_factory.mktemp("recordings") / "stitched"
    with RecordingWriter(path, SPECS, {"camera": "image", "text": "command_text"}, {"robot": "stitched"}) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def good(samples, stream):
    """What of a stream is none of FAULTS, as (time of its newest data, sample)."""
    found = [s for s in samples if s.stream == stream and s.arrival_ns not in {fault.arrival_ns for fault in FAULTS}]
    return [(s.stamp_ns + (len(s.data.samples) * NS // RATE if stream == "audio" else 0), s) for s in found]


def expected(samples, spec, now_ns):
    """By the definition: (stamp of the newest data that has arrived, its age in s, whether that is fresh enough)."""
    stamps = [stamp_ns for stamp_ns, sample in good(samples, spec.name) if sample.arrival_ns <= now_ns]
    if not stamps:
        return 0, float("inf"), False
    age_ns = now_ns - max(stamps)
    return max(stamps), age_ns / NS, spec.latched or age_ns <= spec.max_age_ms * MS


class Aligned:
    """What lies before a model: check and align."""

    def __init__(self, specs):
        self.specs, self.aligner, self.refused = {spec.name: spec for spec in specs}, Aligner(specs, 1 / 15), []

    def push(self, sample):
        try:
            check(self.specs[sample.stream], sample.data, VOCABULARY)
        except SampleError as error:
            return self.refuse(error)
        self.aligner.push(sample)

    def refuse(self, error):
        self.refused.append(str(error))

    def tick(self, now_ns):
        return self.aligner.window(now_ns)


@pytest.fixture(scope="module")
def aligned(recording):
    """The windows at all ticks, and what they came out of."""
    pipeline = Aligned(SPECS)
    return pipeline, list(replay(pipeline, events(recording, SPECS, TICK)))


def test_the_recording_is_what_was_stitched(recording, samples):
    assert read_metadata(recording)["robot"] == "stitched"
    for got, put in zip(read(recording, SPECS), samples, strict=True):
        assert got[:3] == put[:3]
        for a, b in zip(*(d if isinstance(d, tuple) else (d,) for d in (got.data, put.data)), strict=True):
            assert np.array_equal(a, b, equal_nan=not isinstance(a, str))


def test_the_sensors_are_as_unruly_as_real_ones(samples):
    """Lest what follows be easy: rates, gaps and disorder of the data that was found."""
    stamps = {name: [s.stamp_ns for _, s in good(samples, name)] for name in ("camera", "scan", "imu", "audio")}
    assert {name: len(found) for name, found in stamps.items()} == {"camera": 90, "scan": 33, "imu": 180, "audio": 297}
    assert max(b - a for a, b in pairwise(stamps["scan"])) > 300 * MS  # longer than a scan may be old
    assert sum(b < a for a, b in pairwise(stamps["scan"])) == 1
    assert len({s.arrival_ns - s.stamp_ns for _, s in good(samples, "imu")}) == 180


def test_ticks_follow_the_camera(aligned, samples):
    _, windows = aligned
    frames = {s.arrival_ns for s in samples if s.stream == "camera"}
    ticks = [window.t_ns for window in windows]
    assert frames <= set(ticks)
    assert all(0 < b - a <= 100 * MS for a, b in pairwise(ticks))
    assert all(a - b == 100 * MS for b, a in pairwise(ticks) if a not in frames)


def test_ages_and_masks_are_exact(aligned, samples):
    _, windows = aligned
    seen = {spec.name: set() for spec in SPECS}
    for window in windows:
        for spec in SPECS:
            view = window.views[spec.name]
            assert (view.stamp_ns, view.age_s, view.present) == expected(samples, spec, window.t_ns)
            seen[spec.name].add(view.present)
    assert seen == {"camera": {True, False}, "scan": {True, False}, "imu": {True, False}, "audio": {True, False},
                    "text": {True, False}}  # fmt: skip


def test_every_stream_reaches_the_model(aligned, recording, samples, sound):
    """The frame, the rows and the sound that the model is given are those of the stamp it is told."""
    frames = {stamp_ns: s.data for stamp_ns, s in good(samples, "camera")}
    imu = good(samples, "imu")
    lost = np.isin(np.arange(len(sound)) // CHUNK, LOST_CHUNKS)
    steps = dict.fromkeys(frames, 0)
    counts = {spec.name: 0 for spec in SPECS}
    for window in replay(Aligned(SPECS), events(recording, SPECS, TICK)):
        inputs = model_inputs(SPECS, window, VOCABULARY)
        for spec in SPECS:
            if spec.name in inputs.fresh:
                counts[spec.name] += 1
                x = inputs.fresh[spec.name].x
                assert x.shape == spec.shape and np.isfinite(x).all()
        views = window.views
        if views["camera"].fresh:
            steps[views["camera"].stamp_ns] += 1
            assert np.array_equal(inputs.fresh["camera"].x, resize(frames[views["camera"].stamp_ns], 96, 96))
        if views["imu"].fresh:
            end_ns = views["imu"].stamp_ns
            rows = [s.data for t, s in imu if end_ns - 100 * MS < t <= end_ns]
            assert np.array_equal(views["imu"].data[20 - len(rows) :], rows)
            assert views["imu"].valid.tolist() == [False] * (20 - len(rows)) + [True] * len(rows)
        if views["audio"].fresh:
            end = (views["audio"].stamp_ns - T0) * RATE // NS
            if end >= 2752:  # the window is full
                missing = lost[end - 2752 : end]
                assert np.array_equal(views["audio"].valid, ~missing)
                heard = np.where(missing[:, None], 0, sound[end - 2752 : end])
                assert np.array_equal(views["audio"].data, heard)
    assert set(steps.values()) == {1}  # each frame once
    assert counts["scan"] > 25 and counts["imu"] > 80 and counts["audio"] > 80 and counts["text"] == 1


def test_no_sample_is_refused_without_its_reason(aligned, samples):
    pipeline, windows = aligned
    assert sorted(pipeline.refused) == list(REFUSED)
    last_ns = windows[-1].t_ns
    for spec in SPECS:
        arrived = sum(sample.arrival_ns <= last_ns for _, sample in good(samples, spec.name))
        late = 1 if spec.name == "scan" else 0
        counts = pipeline.aligner.counts(spec.name)
        assert (counts["admitted"], counts["late"]) == (arrived - late, late)
        assert set(counts) <= {"admitted", "late", "gap"}
    assert pipeline.aligner.counts("audio")["gap"] == 2  # one of two chunks, one of one


def test_the_shipped_model_drives_by_them(recording, samples):
    if not (SHIPPED / "manifest.json").exists():
        pytest.skip("the drive bundle is not here: make train-drive")
    bundle = Bundle.read(SHIPPED)
    specs = {spec.name: spec for spec in bundle.streams}

    def run():
        pipeline = Pipeline(bundle, engine="cpu")
        return pipeline, list(replay(pipeline, events(recording, bundle.streams, bundle.tick)))

    pipeline, outputs = run()
    for output in outputs:
        for name, spec in specs.items():
            stamp_ns, age_s, present = expected(samples, spec, output.stamp_ns)
            got = output.sources.get(name, 0), output.ages_s[name], output.mask[name]
            assert got == (stamp_ns, age_s, present)
        assert (output.action is None) == bool(output.reasons)
    assert {name for output in outputs for name in specs if output.mask[name]} == set(specs)
    until = [output.action is not None for output in outputs if output.stamp_ns < T0 + 3 * NS]
    told = until.index(True)  # once it is told what to do
    assert sum(until[told:]) > 0.9 * len(until[told:])
    since = [output for output in outputs if output.stamp_ns >= T0 + 3 * NS]  # told what it does not know, it stands
    assert since and all("command refused: text" in output.reasons[-1] for output in since)
    health = {stream.name: stream for stream in pipeline.health(outputs[-1].stamp_ns).streams}
    refused = {name: stream.counts["refused"] for name, stream in health.items()}
    assert refused == {name: {"scan": 1, "text": 1}.get(name, 0) for name in specs}
    assert any(REFUSED[0] in reason for reason in health["scan"].reasons)
    assert any("got unknown ['fetch'" in reason for reason in health["text"].reasons)
    again = [json.loads(output_to_json(output)) for output in run()[1]]
    assert again == [json.loads(output_to_json(output)) for output in outputs]
