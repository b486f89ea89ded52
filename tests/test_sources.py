"""Cameras, microphones and files as streams of samples: real captures where there is something to capture from."""

import contextlib
import ctypes.util
import http.server
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from mm_edge import sources
from mm_edge.align import Aligner
from mm_edge.errors import EdgeError, MissingDependency
from mm_edge.health import StreamMonitor
from mm_edge.sources import CameraSource, Feed, FileSource, MicrophoneSource, SampleClock, _thinned, open_sound
from mm_edge.types import NS, Audio, Sample, StreamSpec

pytestmark = pytest.mark.real_time

cv2 = pytest.importorskip("cv2", reason="cv2 is not installed")
soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")

MS = 1_000_000
T0 = 1_700_000_000 * NS
RATE_HZ, CHUNK = 16_000, 320  # 20 ms
RED, BLUE = (200, 30, 40), (30, 40, 200)


# ---- counting samples


def stamps(clock, arrivals_ms, lost=()):
    """Numbers and stamps (ms) of the first samples of chunks that arrive like this."""
    placed = [clock.place(CHUNK, T0 + round(ms * MS), i in lost) for i, ms in enumerate(arrivals_ms)]
    return [first for first, _ in placed], [(stamp_ns - T0) / MS for _, stamp_ns in placed]


def test_how_late_a_callback_is_does_not_reach_a_stamp():
    late_ms = np.random.default_rng(0).uniform(0, 15, 500)
    late_ms[0] = 0.0
    firsts, at_ms = stamps(SampleClock(RATE_HZ), 20 * np.arange(1, 501) + late_ms)
    assert firsts == [*range(0, 500 * CHUNK, CHUNK)]
    assert max(abs(ms - 20 * i) for i, ms in enumerate(at_ms)) < 1
    assert np.count_nonzero(np.abs(np.diff(at_ms) - 20) > 1e-6) < 40  # and seldom


def test_the_first_callbacks_may_be_late_until_one_is_in_time():
    _, at_ms = stamps(SampleClock(RATE_HZ), [95, 96, 97, 98, 100, 120, 140])
    assert at_ms == [75, 76, 77, 78, 80, 100, 120]


def test_samples_that_are_lost_show_in_the_number_and_leave_stamps_right():
    arrivals_ms = [20, 40, 60, 60 + 50 + 20, 60 + 50 + 40]
    firsts, at_ms = stamps(SampleClock(RATE_HZ), arrivals_ms, lost=[3])
    assert firsts == [0, 320, 640, 960 + 800, 1280 + 800] and at_ms == [0, 20, 40, 110, 130]


def test_samples_that_are_lost_without_a_word_show_within_a_second():
    arrivals_ms = 20 * np.arange(1, 301)
    arrivals_ms[100:] += 500
    firsts, at_ms = stamps(SampleClock(RATE_HZ), arrivals_ms)
    assert firsts[99:101] == [99 * CHUNK, 100 * CHUNK]
    assert firsts[-1] == 299 * CHUNK + RATE_HZ // 2 and at_ms[-1] == 299 * 20 + 500
    assert sum(b - a != CHUNK for a, b in pairwise(firsts)) == 1


@pytest.mark.parametrize("ppm", [-200, 200])
def test_a_microphone_whose_clock_is_wrong_is_followed(ppm):
    arrivals_ms = 20 * np.arange(1, 30_001) * (1 + ppm * 1e-6)  # ten minutes: it would be 120 ms off
    firsts, at_ms = stamps(SampleClock(RATE_HZ), arrivals_ms)
    assert firsts[-1] == 29_999 * CHUNK
    assert max(abs(ms + 20 - arrival_ms) for ms, arrival_ms in zip(at_ms, arrivals_ms)) < 0.3


@pytest.mark.parametrize(
    ("real_hz", "said"), [(8_000, "audio too slow: "), (44_100, "audio too fast: 137.8 Hz, expected 50 Hz")]
)
def test_a_device_that_is_not_as_fast_as_it_says_is_named(real_hz, said):
    spec = StreamSpec("audio", "audio", (1, 1, 1), 50, 1000, window_ms=100, sample_rate_hz=RATE_HZ, channels=1)
    aligner, clock, told = Aligner([spec], 0.1), SampleClock(RATE_HZ), set()
    monitor = StreamMonitor(spec, aligner.streams["audio"])
    for i in range(1, 400):
        now_ns = T0 + i * CHUNK * NS // real_hz
        first, stamp_ns = clock.place(CHUNK, now_ns)
        aligner.push(Sample("audio", stamp_ns, now_ns, Audio(np.full((CHUNK, 1), i, np.int16), first, RATE_HZ)))
        told.update(monitor.look(aligner.window(now_ns).views["audio"]))
    assert any(text.startswith(said) for text in told), told


# ---- files


@pytest.fixture
def video(tmp_path):
    """Twenty frames at 20 Hz: red, then blue."""
    return write_video(tmp_path / "video.avi")


def write_video(path, frames=20, fps=20):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), fps, (64, 48))
    for i in range(frames):
        colour = RED if i < frames // 2 else BLUE
        writer.write(np.full((48, 64, 3), colour[::-1], np.uint8))
    writer.release()
    return str(path)


def test_a_video_is_read_as_fast_as_it_goes_with_times_from_its_beginning(video):
    got = list(CameraSource("camera", video, paced=False))
    assert [sample.stamp_ns for sample in got] == [i * 50 * MS for i in range(20)]
    assert all(s.stream == "camera" and s.arrival_ns == s.stamp_ns and s.data.shape == (48, 64, 3) for s in got)
    assert np.abs(got[0].data[24, 32].astype(int) - RED).max() < 6
    assert np.abs(got[-1].data[24, 32].astype(int) - BLUE).max() < 6


@pytest.mark.parametrize(("rate_hz", "kept"), [(10, 10), (15, 15), (20, 20), (50, 20)])
def test_of_frames_that_come_too_fast_some_are_left_out(video, rate_hz, kept):
    assert len(list(CameraSource("camera", video, rate_hz, paced=False))) == kept


def test_frames_go_on_when_the_clock_is_set_back():
    wanted = _thinned(15)
    assert all(wanted(1000 * NS + i * NS // 15) for i in range(30))
    assert all(wanted(400 * NS + i * NS // 15) for i in range(30))


def test_a_video_plays_in_real_time(video):
    begun_s, begun_ns = time.monotonic(), time.time_ns()
    got = list(CameraSource("camera", video))
    assert time.monotonic() - begun_s >= 0.95
    assert 0 <= got[0].stamp_ns - begun_ns < NS
    assert [b.stamp_ns - a.stamp_ns for a, b in pairwise(got)] == [50 * MS] * 19
    assert all(sample.arrival_ns >= sample.stamp_ns for sample in got)


def noise(seconds, channels=2, seed=0):
    return np.random.default_rng(seed).integers(-9000, 9000, (round(seconds * RATE_HZ), channels), np.int16)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_a_sound_file_gives_each_of_its_samples_once(tmp_path, suffix):
    samples, path = noise(0.11), str(tmp_path / f"sound.{suffix}")
    soundfile.write(path, samples, RATE_HZ)
    got = list(FileSource("audio", path, RATE_HZ, 2, paced=False))
    assert np.array_equal(np.concatenate([sample.data.samples for sample in got]), samples)
    assert [sample.data.first_sample for sample in got] == [0, 320, 640, 960, 1280, 1600]
    assert [(s.stamp_ns, s.arrival_ns) for s in got[-2:]] == [(80 * MS, 100 * MS), (100 * MS, 110 * MS)]


def test_floats_of_a_sound_file_become_whole_numbers(tmp_path):
    path = str(tmp_path / "float.wav")
    soundfile.write(path, np.float32([[0.5], [-1.0], [2.0]]), RATE_HZ, subtype="FLOAT")
    (got,) = FileSource("audio", path, RATE_HZ, 1, paced=False)
    assert got.data.samples.tolist() == [[16384], [-32768], [32767]]


def test_what_is_closed_ends_whoever_reads_it(tmp_path, video):
    soundfile.write(tmp_path / "long.wav", noise(60), RATE_HZ)
    for source in (CameraSource("camera", video), FileSource("audio", str(tmp_path / "long.wav"), RATE_HZ, 2)):
        got, first = [], threading.Event()
        feed = Feed(source, lambda sample, got=got, first=first: (got.append(sample), first.set()))
        assert first.wait(10)
        feed.close()
        assert not feed.is_alive() and not feed.error and len(got) < 1000


# ---- live


class Stream(http.server.BaseHTTPRequestHandler):
    """Frames at 20 Hz as an IP camera sends them; after 20 it sends nothing more until it is let go."""

    go_on = threading.Event()

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        with contextlib.suppress(OSError):
            for i in range(20):
                jpeg = cv2.imencode(".jpg", np.full((48, 64, 3), 10 * i, np.uint8))[1].tobytes()
                self.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(jpeg))
                self.wfile.write(jpeg + b"\r\n")
                time.sleep(0.05)
            self.go_on.wait(30)

    def log_message(self, *_):
        pass


def test_a_camera_that_is_live_stamps_what_it_sends_and_tells_when_it_stalls(monkeypatch):
    monkeypatch.setattr(sources, "STALL_S", 0.5)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stream)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, got = f"http://127.0.0.1:{server.server_port}/stream.mjpg", []
    try:
        begun_ns = time.time_ns()
        with pytest.raises(EdgeError, match=f"camera: {url} sends no more frames: unplugged, stalled"):
            for sample in CameraSource("camera", url):
                got.append(sample)
        ended_ns = time.time_ns()
    finally:
        Stream.go_on.set()
        server.shutdown()
    assert len(got) > 10 and all(begun_ns < s.stamp_ns <= s.arrival_ns < ended_ns for s in got)
    assert ended_ns - got[-1].arrival_ns > 0.4 * NS


def test_what_cannot_be_opened_is_told_with_what_there_is(tmp_path, video):
    text = tmp_path / "notes.txt"
    text.write_text("no video, and no sound")
    for source, said in {
        "97": r"camera: '97' cannot be opened: expected a camera, a URL or a file; cameras here: ",
        str(tmp_path / "none.mp4"): "none.mp4' cannot be opened: expected a camera, a URL or a file",
        str(text): "notes.txt' cannot be opened: no video that this cv2 can read",
        "nosuchsrc ! appsink": "a pipeline needs a cv2 that was built with GStreamer",
    }.items():
        with pytest.raises(EdgeError, match=said):
            CameraSource("camera", source)
    with pytest.raises(EdgeError, match="expected a sound file such as wav or flac"):
        FileSource("audio", str(text), RATE_HZ, 2)
    soundfile.write(tmp_path / "other.wav", noise(0.1, channels=1), 44_100)
    with pytest.raises(EdgeError, match="expected 16000 Hz and 2 channels, got 44100 Hz and 1: ffmpeg -i"):
        FileSource("audio", str(tmp_path / "other.wav"), RATE_HZ, 2)
    for missing in ("bark.wav", str(tmp_path / "bark")):  # are no microphones' names
        with pytest.raises(EdgeError, match=r"bark.*: expected a sound file, there is none"):
            open_sound("audio", missing, RATE_HZ, 2)


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(MissingDependency, match=r"a microphone needs sounddevice: .* pip install"):
        MicrophoneSource("audio", "default", RATE_HZ, 2)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingDependency, match="a camera needs cv2"):
        CameraSource("camera", "0")


def test_a_system_without_portaudio_is_told_what_to_install(monkeypatch):
    pytest.importorskip("_sounddevice", reason="sounddevice is not installed")
    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    with pytest.raises(EdgeError, match=r"the system's PortAudio \(.*\): sudo apt install libportaudio2"):
        MicrophoneSource("audio", "default", RATE_HZ, 2)


# ---- a virtual microphone, in a process of its own: PortAudio looks for devices once


def needs_sounddevice():
    """Skips where nothing can be captured."""
    tried = subprocess.run([sys.executable, "-c", "import sounddevice"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no sounddevice: {tried.stderr.strip().splitlines()[-1]}")


def capture(env, channels, take, device="default"):
    """Samples of a microphone as a list of (first sample, stamp, arrival, samples), and the error that ended it."""
    code = f"""if True:
        import itertools, pickle, sys
        from mm_edge.errors import EdgeError
        from mm_edge.sources import MicrophoneSource
        got, error = [], ""
        try:
            source = MicrophoneSource("audio", {device!r}, {RATE_HZ}, {channels})
            for sample in itertools.islice(source, {take}):
                got.append((sample.data.first_sample, sample.stamp_ns, sample.arrival_ns, sample.data.samples))
        except EdgeError as failed:
            error = str(failed)
        pickle.dump((got, error), sys.stdout.buffer)"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, timeout=60, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr.decode()
    return pickle.loads(done.stdout)


def test_a_microphone_gives_exactly_the_samples_that_were_recorded(tmp_path):
    """ALSA's file plugin: a microphone that hears a file, far faster than in real time."""
    needs_sounddevice()
    recorded = noise(2)
    recorded.astype("<i2").tofile(tmp_path / "heard.raw")
    (tmp_path / "asound.conf").write_text(
        f'pcm.!default {{ type file slave.pcm null file /dev/null infile "{tmp_path}/heard.raw" format raw }}\n'
        "pcm.null { type null }\n"
    )
    got, error = capture({**os.environ, "ALSA_CONFIG_PATH": str(tmp_path / "asound.conf")}, 2, 90)
    assert len(got) == 90 and not error
    for first, _, _, samples in got:  # one that nobody took in time is missing, and all others are in their place
        assert np.array_equal(samples, recorded[first : first + CHUNK]) or first >= len(recorded)
    assert [first for first, *_ in got[:50]] == [*range(0, 50 * CHUNK, CHUNK)]


@contextlib.contextmanager
def sound_server(folder, tone_hz=443):
    """PulseAudio with a virtual microphone that hears a tone, or silence (0). Yields its process and an environment
    in which that microphone is the default. No two chunks of 443 Hz are the same, as no two of a real one are."""
    if not shutil.which("pulseaudio"):
        pytest.skip("no pulseaudio here")
    socket, home = folder / "socket", {"HOME": str(folder), "PULSE_RUNTIME_PATH": str(folder)}
    modules = [f"module-native-protocol-unix socket={socket} auth-anonymous=1"]
    modules += [f"module-null-sink sink_name=virtual rate={RATE_HZ} channels=1"]
    modules += [f"module-sine sink=virtual frequency={tone_hz}"] if tone_hz else []
    options = ["-n", "--daemonize=no", "--use-pid-file=no", "--exit-idle-time=-1", "--disable-shm"]
    command = ["pulseaudio", *options, *(argument for module in modules for argument in ("-L", module))]
    with (folder / "pulseaudio.log").open("wb") as log:
        server = subprocess.Popen(command, env={**os.environ, **home}, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 10
        while not socket.exists():
            assert server.poll() is None and time.monotonic() < end, (folder / "pulseaudio.log").read_text()
            time.sleep(0.02)
        yield server, {**os.environ, **home, "PULSE_SERVER": f"unix:{socket}", "PULSE_SOURCE": "virtual.monitor"}
    finally:
        server.kill()
        server.wait()


def hears(env):
    """Skips where ALSA has no way to PulseAudio."""
    needs_sounddevice()
    code = "import sounddevice; assert any(d['max_input_channels'] for d in sounddevice.query_devices())"
    if subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).returncode:
        pytest.skip("ALSA finds no PulseAudio: libasound2-plugins is not installed")


def test_a_tone_is_heard_in_real_time_and_stamped_evenly(tmp_path):
    with sound_server(tmp_path) as (_, env):
        hears(env)
        got, error = capture(env, 1, 150)
    assert len(got) == 150 and not error
    firsts, stamps_ns, arrivals_ns, chunks = zip(*got)
    spectrum = np.abs(np.fft.rfft(np.concatenate(chunks[50:100])[:, 0]))  # one second: a bin is 1 Hz
    assert spectrum.argmax() == 443
    assert list(np.diff(firsts)) == [CHUNK] * 149
    assert 1.5 < (arrivals_ns[-1] - arrivals_ns[50]) / NS < 2.5  # 99 chunks of 20 ms
    even_ms, uneven_ms = (np.abs(np.diff(times[50:]) / MS - 20) for times in (stamps_ns, arrivals_ns))
    assert np.median(even_ms) < 0.01 and even_ms.mean() < uneven_ms.mean()


def test_a_microphone_that_is_not_there_is_told_with_those_that_are(tmp_path):
    with sound_server(tmp_path) as (_, env):
        hears(env)
        _, error = capture(env, 1, 1, device="no such microphone")
    assert error.startswith("audio: microphone no such microphone cannot be opened at 16000 Hz with 1 channels (")
    assert "microphones here: 0 pulse (" in error
