"""Cameras, microphones and files as streams of samples, without ROS.

    camera = CameraSource("camera", "0", rate_hz=15)        # also a file, a URL, a GStreamer pipeline
    microphone = open_sound("audio", "default", sample_rate_hz=16000, channels=2)   # also a number, a name, a file
    for sample in camera:                                   # until it ends, or is closed
        ...
    feed = Feed(microphone, pipeline.push)                  # the same in a thread of its own

A source is opened when it is made and read when it is iterated, once, from one thread. One that fails raises EdgeError,
which names the device and what there is instead; a library that is not there is MissingDependency. Stamps are system
time, as ROS has it.
"""

from __future__ import annotations

import contextlib
import math
import queue
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from glob import glob
from os.path import isfile  # a pipeline may be longer than Path lets a name be
from typing import Any

import numpy as np

from mm_edge.errors import EdgeError, needs
from mm_edge.types import NS, Audio, Sample

CHUNK_S = 0.02  # of sound
WAITING_CHUNKS = 500  # of sound that nobody takes; later ones are lost
SILENCE_S = 2.0  # a device from which nothing comes for so long is dead
SOUND_FILES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff")  # no microphone is called so
OPEN_S, STALL_S = 10.0, 5.0  # how long a URL may take to open, and then to send a frame


class Source:
    """Samples of one stream. `stamp_ns` and `arrival_ns` of a file that is not `paced` count from its beginning."""

    def __init__(self, stream: str, name: str):
        self.stream, self.name = stream, name
        self._closed = threading.Event()

    def __iter__(self) -> Iterator[Sample]:
        """Raises EdgeError if it fails."""
        raise NotImplementedError

    def close(self) -> None:
        """End it, from any thread: what iterates comes to an end."""
        self._closed.set()

    def _paced(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        """Those of a file, each when it would have arrived if it were live."""
        start_ns, start_s = time.time_ns(), time.monotonic()
        for sample in samples:
            if self._closed.wait(max(0.0, start_s + sample.arrival_ns / NS - time.monotonic())):
                return
            arrival_ns = max(time.time_ns(), start_ns + sample.arrival_ns)
            yield sample._replace(stamp_ns=start_ns + sample.stamp_ns, arrival_ns=arrival_ns)


class Feed(threading.Thread):
    """Takes a source's samples to `push` until it ends, which `is_alive` tells, and `error` why if it failed."""

    def __init__(self, source: Source, push: Callable[[Sample], Any]):
        super().__init__(name=source.stream, daemon=True)
        self.source, self.error = source, ""
        self._push = push
        self.start()

    def run(self) -> None:
        try:
            for sample in self.source:
                self._push(sample)
        except Exception as error:  # a thread that dies would be silence
            self.error = str(error) if isinstance(error, EdgeError) else f"{type(error).__name__}: {error}"

    def close(self) -> None:
        """A driver that hangs is not waited for."""
        self.source.close()
        self.join(1.0)


class CameraSource(Source):
    """Frames of a camera: its number ("0") or device, the URL of a live stream, a video file, or a GStreamer pipeline
    ("nvarguscamerasrc ! ... ! appsink", where cv2 was built with it; not tried).

    A live frame's stamp is when it was there to be taken, before it is decoded. Raises EdgeError if it cannot be
    opened, and while it is read if no frame comes any more: from a URL for STALL_S, from a device as its driver has it.

    Args:
        rate_hz: frames in between are left out; 0: all come.
        paced: a file plays in real time; otherwise as fast as it can be read.
    """

    def __init__(self, stream: str, source: str, rate_hz: float = 0.0, paced: bool = True):
        super().__init__(stream, source)
        self._cv2, self._rate_hz = _cv2(), rate_hz
        self.is_file, self._is_paced = isfile(source), paced
        self._capture = self._open()
        if not self._capture.isOpened():
            raise EdgeError(f"{stream}: {source!r} cannot be opened{self._hint()}")
        self._capture.set(self._cv2.CAP_PROP_BUFFERSIZE, 1)  # the newest counts

    def __iter__(self) -> Iterator[Sample]:
        try:
            if not self.is_file:
                yield from self._live()
            elif self._is_paced:
                yield from self._paced(self._read())
            else:
                yield from self._read()
        finally:
            self._capture.release()

    def _open(self) -> Any:
        cv2, source = self._cv2, self.name
        if source.isdecimal():
            return cv2.VideoCapture(int(source))
        if " ! " in source:
            return cv2.VideoCapture(source, cv2.CAP_GSTREAMER)
        if "://" in source:
            open_ms, stall_ms = round(1e3 * OPEN_S), round(1e3 * STALL_S)
            patience = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, open_ms, cv2.CAP_PROP_READ_TIMEOUT_MSEC, stall_ms]
            return cv2.VideoCapture(source, cv2.CAP_FFMPEG, patience)
        return cv2.VideoCapture(source)

    def _hint(self) -> str:
        if " ! " in self.name:
            return ": a pipeline needs a cv2 that was built with GStreamer, as the system's on a Jetson is"
        if "://" in self.name:
            return f" ({OPEN_S:g} s are waited for it)"
        if self.is_file:
            return ": no video that this cv2 can read"
        return f": expected a camera, a URL or a file; cameras here: {', '.join(sorted(glob('/dev/video*'))) or 'none'}"

    def _live(self) -> Iterator[Sample]:
        wanted = _thinned(self._rate_hz)
        while not self._closed.is_set():
            if not self._capture.grab():
                if self._closed.is_set():
                    return
                raise EdgeError(f"{self.stream}: {self.name} sends no more frames: unplugged, stalled, or at its end")
            stamp_ns = time.time_ns()
            if wanted(stamp_ns):
                yield Sample(self.stream, stamp_ns, time.time_ns(), self._decoded())

    def _read(self) -> Iterator[Sample]:
        wanted, fps = _thinned(self._rate_hz), self._capture.get(self._cv2.CAP_PROP_FPS)
        last_ns = -1
        while not self._closed.is_set() and self._capture.grab():
            stamp_ns = round(self._capture.get(self._cv2.CAP_PROP_POS_MSEC) * 1e6)
            if stamp_ns <= last_ns:  # some containers hold no times
                stamp_ns = last_ns + round(NS / (fps or 30.0))
            last_ns = stamp_ns
            if wanted(stamp_ns):
                yield Sample(self.stream, stamp_ns, stamp_ns, self._decoded())

    def _decoded(self) -> np.ndarray:
        good, bgr = self._capture.retrieve()
        if not good:
            raise EdgeError(f"{self.stream}: {self.name}: a frame that cannot be decoded")
        return self._cv2.cvtColor(bgr, self._cv2.COLOR_BGR2RGB)


class MicrophoneSource(Source):
    """Sound as it comes from a microphone, in chunks of CHUNK_S.

    Raises EdgeError, with the devices that there are, if it cannot be opened like this.

    Args:
        device: its number, a part of its name, or "default".
    """

    def __init__(self, stream: str, device: str, sample_rate_hz: int, channels: int):
        super().__init__(stream, f"microphone {device}")
        self._sounddevice = sounddevice = _sounddevice(stream)
        self._clock = SampleClock(sample_rate_hz)
        self._rate_hz = sample_rate_hz
        self._heard: queue.Queue[Sample] = queue.Queue(WAITING_CHUNKS)
        try:
            self._input = sounddevice.InputStream(
                device=int(device) if device.isdecimal() else None if device == "default" else device,
                samplerate=sample_rate_hz,
                channels=channels,
                dtype="int16",
                blocksize=round(CHUNK_S * sample_rate_hz),
                callback=self._on_sound,
            )
        except (sounddevice.PortAudioError, ValueError) as error:
            raise EdgeError(
                f"{stream}: {self.name} cannot be opened at {sample_rate_hz} Hz with {channels} channels ({error});"
                f" microphones here: {'; '.join(microphones()) or 'none'}"
            ) from None

    def __iter__(self) -> Iterator[Sample]:
        try:
            self._input.start()
            heard_s = time.monotonic()
            while not self._closed.is_set():
                with contextlib.suppress(queue.Empty):
                    yield self._heard.get(timeout=0.1)
                    heard_s = time.monotonic()
                if time.monotonic() - heard_s > SILENCE_S:
                    raise EdgeError(
                        f"{self.stream}: {self.name} is dead: nothing came for {SILENCE_S:g} s; it is unplugged, or the"
                        " sound server has ended"
                    )
        except self._sounddevice.PortAudioError as error:
            raise EdgeError(f"{self.stream}: {self.name} does not start ({error})") from None
        finally:
            self._input.close(ignore_errors=True)

    def _on_sound(self, samples: np.ndarray, n: int, times: Any, status: Any) -> None:
        """On PortAudio's thread. Numbers are given here, so that a chunk that finds no room shows as a gap."""
        now_ns = time.time_ns()
        first, stamp_ns = self._clock.place(n, now_ns, bool(status.input_overflow))
        with contextlib.suppress(queue.Full):
            self._heard.put_nowait(Sample(self.stream, stamp_ns, now_ns, Audio(samples.copy(), first, self._rate_hz)))


class SampleClock:
    """When each sample of a microphone was captured. They are counted, and the count is held against the clock by the
    chunks that were delayed least: how late a single callback is never reaches a stamp. The microphone's own clock,
    which runs a little too fast or too slow, is followed.
    """

    BLOCK_S = 0.5  # the least delayed chunk of so many seconds tells how late the count is
    MOST_PPM = 300  # no clock is more wrong than that,
    LOST_NS = 100_000_000  # and if all are this late, then samples were lost and nobody told

    def __init__(self, sample_rate_hz: int):
        self._rate_hz, self._count = sample_rate_hz, 0
        self._start_ns: int | None = None  # of sample 0
        self._least_ns, self._block_end = math.inf, 0.0

    def place(self, n: int, now_ns: int, lost: bool = False) -> tuple[int, int]:
        """Number and stamp of the first of `n` samples, of which the last was captured just before `now_ns`, or
        earlier. `lost`: some before them were; the number jumps by as many as the clock says."""
        start_ns = now_ns - self._ns(self._count + n)
        if self._start_ns is None or start_ns <= self._start_ns:
            self._start_ns = start_ns
        elif lost:
            self._jump(start_ns - self._start_ns)
            start_ns = self._start_ns
        self._least_ns = min(self._least_ns, start_ns)
        if self._count + n >= self._block_end:
            late_ns = int(self._least_ns) - self._start_ns
            if late_ns > self.LOST_NS:
                self._jump(late_ns)
            else:
                self._start_ns += min(late_ns, round(self.BLOCK_S * self.MOST_PPM * 1e3))
            self._least_ns, self._block_end = math.inf, self._count + n + self.BLOCK_S * self._rate_hz
        first = self._count
        self._count += n
        return first, self._start_ns + self._ns(first)

    def _jump(self, late_ns: int) -> None:
        self._count += late_ns * self._rate_hz // NS

    def _ns(self, count: int) -> int:
        return count * NS // self._rate_hz


class FileSource(Source):
    """Sound of a file that libsndfile reads (wav, flac, ogg, ...), in chunks of CHUNK_S, a last shorter one included.

    Raises EdgeError if it cannot be read, or has another rate or number of channels than is wanted.

    Args:
        sample_rate_hz, channels: what is wanted; of one, any.
        paced: in real time; otherwise as fast as it can be read.
    """

    def __init__(self, stream: str, path: str, sample_rate_hz: int, channels: int, paced: bool = True):
        super().__init__(stream, path)
        with needs("a sound file", "soundfile", "audio"):
            import soundfile
        if not isfile(path):
            raise EdgeError(f"{stream}: {path}: expected a sound file, there is none")
        try:
            self._file = soundfile.SoundFile(path)
        except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: raw samples, which say nothing of a rate
            raise EdgeError(f"{stream}: {path}: expected a sound file such as wav or flac ({error})") from None
        self._rate_hz, self._is_paced = sample_rate_hz, paced
        fits = channels in (1, self._file.channels)  # one ear hears the mean of all
        if self._file.samplerate != sample_rate_hz or not fits:
            raise EdgeError(
                f"{stream}: {path}: expected {sample_rate_hz} Hz and {channels} channels, got"
                f" {self._file.samplerate} Hz and {self._file.channels}:"
                f" ffmpeg -i {shlex.quote(str(path))} -ar {sample_rate_hz} -ac {channels} converted.wav"
            )

    def __iter__(self) -> Iterator[Sample]:
        with self._file:
            yield from self._paced(self._read()) if self._is_paced else self._read()

    def _read(self) -> Iterator[Sample]:
        """A chunk arrives as it ends."""
        first = 0
        while not self._closed.is_set():
            # Not as int16: of a file of floats it would be 0 or 1.
            values = self._file.read(round(CHUNK_S * self._rate_hz), "float32", always_2d=True)
            if not len(values):
                return
            samples = np.clip(np.rint(np.nan_to_num(values) * 32768), -32768, 32767).astype(np.int16)
            stamp_ns, first = first * NS // self._rate_hz, first + len(samples)
            audio = Audio(samples, first - len(samples), self._rate_hz)
            yield Sample(self.stream, stamp_ns, first * NS // self._rate_hz, audio)


def open_sound(stream: str, name: str, sample_rate_hz: int, channels: int) -> Source:
    """A file if there is one of this name, or it is a name that no microphone has; else a microphone."""
    is_path = name.startswith(("/", "./", "../", "~")) or name.lower().endswith(SOUND_FILES)
    kind = FileSource if is_path or isfile(name) else MicrophoneSource
    return kind(stream, name, sample_rate_hz, channels)


def _thinned(rate_hz: float) -> Callable[[int], bool]:
    """Whether a frame stamped like this is wanted, of those that come one after the other: on average `rate_hz`; 0:
    all."""
    if not rate_hz:
        return lambda stamp_ns: True
    period_ns, due_ns = round(NS / rate_hz), None
    early_ns = round(0.3 * period_ns)  # is in time: stamps jitter, and rates are not always multiples

    def wanted(stamp_ns: int) -> bool:
        nonlocal due_ns
        if due_ns is None or stamp_ns < due_ns - 2 * period_ns:  # it begins, or its clock was set back
            due_ns = stamp_ns
        if stamp_ns < due_ns - early_ns:
            return False
        due_ns = max(due_ns, stamp_ns - early_ns) + period_ns  # after a gap nothing is made up for
        return True

    return wanted


def _cv2() -> Any:
    with needs("a camera", "cv2", "camera"):
        import cv2
    return cv2


def _sounddevice(stream: str) -> Any:
    try:
        with needs("a microphone", "sounddevice", "audio"):
            import sounddevice
    except OSError as error:  # it is the binding alone
        raise EdgeError(
            f"{stream}: a microphone needs the system's PortAudio ({error}): sudo apt install libportaudio2"
        ) from None
    return sounddevice


def microphones() -> list[str]:
    """Those of this machine, in words. Raises EdgeError or MissingDependency if there is nothing to ask them with."""
    sounddevice = _sounddevice("audio")
    try:
        devices = sounddevice.query_devices()
    except sounddevice.PortAudioError as error:
        raise EdgeError(f"PortAudio does not tell which microphones there are: {error}") from None
    return [
        f"{device['index']} {device['name']} ({device['max_input_channels']} channels,"
        f" {device['default_samplerate']:.0f} Hz)"
        for device in devices
        if device["max_input_channels"]
    ]
