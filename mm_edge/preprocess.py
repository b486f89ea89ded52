"""What a stream's data must look like (`check`) and how they become the model's input (`prepare`).

Pure functions, shared with training: a model is trained on exactly these arrays.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import dropwhile
from typing import Any

import numpy as np

from mm_edge.align import View
from mm_edge.errors import SampleError, needs
from mm_edge.types import Audio, Scan, StreamSpec

AUDIO_FRAME = 512  # samples of one spectrum
AUDIO_HOP_S = 0.02
MAX_ANGLE_RAD = 100.0  # more turns are no geometry of a scanner
MOST_LISTED = 64  # words a vocabulary may have to be told whole
SCAN_MIN_VALID = 0.5  # a scan with fewer measured beams says nothing about the room


def words_of(text: str) -> list[str]:
    """Runs of letters, with their marks, and digits, in small letters, however they were encoded (NFKC)."""
    seen = "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Me") and not "\ufe00" <= c <= "\ufe0f")
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", seen).lower())
    runs = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text).split()
    return [word for run in runs if (word := "".join(dropwhile(_is_mark, run)))]


def _is_mark(character: str) -> bool:
    """Of a letter before it: an accent, a vowel."""
    return unicodedata.category(character)[0] == "M"


class Vocabulary:
    """The words a model knows. Token 0 is padding; word i of the list is token i + 1."""

    def __init__(self, words: Sequence[str]):
        self.words = tuple(words)
        self._ids = {word: i + 1 for i, word in enumerate(words)}

    def encode(self, text: str, length: int, stream: str = "text") -> np.ndarray:
        """int64 (length,), padded with 0. A command understood only in part is not obeyed in part: an unknown word, no
        words or too many of them raise SampleError."""
        known, unknown = self.read(text)
        if unknown:
            listed = f" ({', '.join(self.words)})" if len(self.words) <= MOST_LISTED else ""
            expected = f"words among the {len(self.words)} the model knows{listed}"
            raise SampleError(stream, expected, f"unknown {unknown[:3]}")
        if not 0 < len(known) <= length:
            raise SampleError(stream, f"1 to {length} words", f"{len(known)}")
        tokens = np.zeros(length, np.int64)
        tokens[: len(known)] = known
        return tokens

    def read(self, text: str) -> tuple[list[int], list[str]]:
        """The tokens of a text's words, and the words that have none."""
        words = words_of(text)
        return [self._ids[w] for w in words if w in self._ids], [w for w in words if w not in self._ids]


def check(spec: StreamSpec, data: Any, vocabulary: Vocabulary | None = None) -> None:
    """Raise SampleError unless `data` is what a stream of this kind carries (see `types.Sample`)."""
    if (wrong := _WRONG[spec.kind](spec, data)) is not None:
        raise SampleError(spec.name, *wrong)
    if spec.kind == "text" and vocabulary is not None:
        vocabulary.encode(data, spec.shape[0], spec.name)


def prepare(
    spec: StreamSpec, view: View, vocabulary: Vocabulary | None = None, ear: LogMel | None = None
) -> np.ndarray:
    """The model's input of shape `spec.shape`: uint8 for images, int64 for text, else float32. `ear`: remembers what it
    heard of a stream of sound."""
    if spec.kind == "image":
        return fitted(spec, view.data)
    if spec.kind == "audio":
        return ear(view) if ear else log_mel(view.data, view.valid, spec)
    if spec.kind == "scan":
        return resample_scan(view.data, spec.shape[1], spec.range_max_m)
    if spec.kind == "points":
        return nearest_points(view.data, spec.shape[0], spec.range_max_m)
    if spec.kind == "imu":
        rows = (view.data - np.array(spec.mean, np.float32)) / np.array(spec.std, np.float32) * view.valid[:, None]  # type: ignore[index]
        return np.concatenate([rows, view.valid[:, None]], axis=1, dtype=np.float32)  # type: ignore[index]
    if spec.kind == "vector":
        return (view.data - np.array(spec.mean, np.float32)) / np.array(spec.std, np.float32)
    assert vocabulary is not None, "a text stream needs the bundle's vocabulary"
    return vocabulary.encode(view.data, spec.shape[0], spec.name)


def fitted(spec: StreamSpec, image: np.ndarray) -> np.ndarray:
    """uint8 (h, w, 3) -> uint8 (*spec.shape): the whole of it squashed, or of its middle as much as has the shape."""
    height, width = spec.shape[:2]
    if spec.fit == "crop":
        h, w = image.shape[:2]
        high, wide = max(1, min(h, w * height // width)), max(1, min(w, h * width // height))
        image = image[(h - high) // 2 :, (w - wide) // 2 :][:high, :wide]
    return resize(image, height, width)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (h, w, 3) -> uint8 (height, width, 3), antialiased: halved by exact area means while that leaves at least
    the target, then linear. As good as INTER_AREA to 1.3 / 255 and 6 times faster, since the factor is rarely whole."""
    if image.shape[:2] == (height, width):
        return image
    with needs("resizing camera frames", "cv2", "camera"):
        import cv2
    while image.shape[0] >= 2 * height and image.shape[1] >= 2 * width:
        half = (image.shape[1] // 2, image.shape[0] // 2)
        image = cv2.resize(image, half, interpolation=cv2.INTER_AREA)
    if image.shape[:2] != (height, width):
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return image


def log_mel(samples: np.ndarray, valid: np.ndarray | None, spec: StreamSpec) -> np.ndarray:
    """int16 (n, channels) -> float32 (channels + 1, bands, hops): first the level common to all channels, then the
    differences between neighbouring channels (where a sound comes from), last the share of each frame that was heard.

    Level is (log10 of band power - mean) / std; differences are in log10 of power (1 = 10 dB).
    """
    hops = spec.shape[2]
    out = np.empty(spec.shape, np.float32)
    _levels(samples, spec, out[:-1])
    if valid is None or valid.all():
        out[-1] = 1
    else:
        hop = round(AUDIO_HOP_S * spec.sample_rate_hz)
        heard = np.concatenate([[0], np.cumsum(valid[-((hops - 1) * hop + AUDIO_FRAME) :])])
        starts = np.arange(hops) * hop
        out[-1] = (heard[starts + AUDIO_FRAME] - heard[starts]) / AUDIO_FRAME
    return out


class LogMel:
    """The log-mel of one stream's sound, view after view: as `log_mel` makes it, to rounding, but of what was heard
    before only what is new is looked at. Where a sample is missing, or hops do not fit, it begins anew."""

    def __init__(self, spec: StreamSpec):
        self._spec, self._hops, self._hop = spec, spec.shape[2], round(AUDIO_HOP_S * spec.sample_rate_hz)
        self._out = np.ones(spec.shape, np.float32)
        self._heard: int | None = None

    def __call__(self, view: View) -> np.ndarray:
        """float32 `spec.shape`, the caller's to keep."""
        if view.valid is None or 0 in view.valid.tobytes():  # a third of what `all` costs
            self._heard = None
            return log_mel(view.data, view.valid, self._spec)
        new, rest = divmod(view.heard - self._heard, self._hop) if self._heard is not None else (self._hops, 0)
        new = new if 0 <= new < self._hops and not rest else self._hops
        self._heard, old = view.heard, self._out
        self._out = np.empty_like(old)
        self._out[..., : self._hops - new] = old[..., new:]
        if new:
            _levels(view.data, self._spec, self._out[:-1, :, self._hops - new :])
            self._out[-1, :, self._hops - new :] = 1
        return self._out


def _levels(samples: np.ndarray, spec: StreamSpec, out: np.ndarray) -> None:
    """int16 (n, channels) -> `out` float32 (channels, bands, hops), of the last hops: the common level and the
    differences, see `log_mel`."""
    hops = out.shape[2]
    if hops == 1:
        frames = samples[-AUDIO_FRAME:].T * hann(AUDIO_FRAME)
    else:
        hop = round(AUDIO_HOP_S * spec.sample_rate_hz)
        sound = np.ascontiguousarray(samples[-(hops - 1) * hop - AUDIO_FRAME :].T, np.float32)  # (channels, n)
        overlapping = (sound.strides[0], hop * sound.itemsize, sound.itemsize)  # frames without a copy
        frames = np.ndarray((spec.channels, hops, AUDIO_FRAME), np.float32, sound, strides=overlapping)
        frames = (frames * hann(AUDIO_FRAME)).reshape(-1, AUDIO_FRAME)
    spectrum = spectra(frames)
    power = np.multiply(spectrum, spectrum, out=spectrum)
    mel = power.dot(_packed_bank(spec.sample_rate_hz, AUDIO_FRAME, spec.shape[1]))  # (channels * hops, bands)
    mel += 1e-6
    log = np.log10(mel, out=mel)
    if spec.channels > 1:
        by_channel = log.reshape(spec.channels, hops, -1)
        np.subtract(by_channel[:-1], by_channel[1:], out=out[1:].transpose(0, 2, 1))
        log = by_channel.sum(axis=0)
        log /= spec.channels
    log -= spec.mean[0]
    log /= spec.std[0]
    out[0] = log.T


def spectra(frames: np.ndarray) -> np.ndarray:
    """float32 (n, m), m even -> of that shape: of each row the real Fourier transform, packed as Re 0, Re 1, Im 1, ...,
    Re m/2. OpenCV's costs a third of numpy's, which serves where there is none."""
    if cv2 := _cv2():
        return cv2.dft(frames, None, cv2.DFT_ROWS)
    spectrum = np.fft.rfft(frames).astype(np.complex64, copy=False).view(np.float32)  # re, im, re, im, ...
    spectrum[:, 1] = spectrum[:, 0]  # the first has no imaginary part, nor has the last
    return np.ascontiguousarray(spectrum[:, 1:-1])


@cache
def _cv2() -> Any:
    """None where it is not installed, which costs more to find out than a transform."""
    try:
        import cv2
    except ImportError:
        return None
    return cv2


def resample_scan(scan: Scan, beams: int, range_max_m: float) -> np.ndarray:
    """A scan of any geometry -> float32 (2, beams) over the full circle, beam 0 centred straight ahead,
    counter-clockwise: closeness (1 touching, 0 nothing within `range_max_m`) of the nearest return in each sector, and
    whether any beam of the scan measured there."""
    order, sector, starts = _sectors(len(scan.ranges), round(scan.angle_min, 6), round(scan.angle_increment, 9), beams)
    ranges = scan.ranges[order]
    measured = ~np.isnan(ranges)
    # No return is a measurement of nothing; -inf is something closer than can be measured.
    nearest = np.minimum.reduceat(np.where(measured, np.clip(ranges, 0, range_max_m), np.float32(range_max_m)), starts)
    out = np.zeros((2, beams), np.float32)
    out[0, sector] = 1 - nearest / np.float32(range_max_m)
    out[1, sector] = np.maximum.reduceat(measured, starts)
    return out


def nearest_points(points: np.ndarray, n: int, range_max_m: float) -> np.ndarray:
    """float32 (m, 3) -> float32 (n, 4): the n nearest finite points within range / range_max_m, nearest first, and 1
    where there is one."""
    distance = np.linalg.norm(points, axis=1)
    near = np.flatnonzero(distance <= range_max_m)  # False for NaN
    near = near[np.argsort(distance[near], kind="stable")[:n]]
    out = np.zeros((n, 4), np.float32)
    out[: len(near), :3], out[: len(near), 3] = points[near] / range_max_m, 1
    return out


@lru_cache(maxsize=8)
def hann(n: int) -> np.ndarray:
    """float32 (n,); it takes int16 to [-1, 1), too."""
    return np.hanning(n).astype(np.float32) / np.float32(32768)


@lru_cache(maxsize=8)
def mel_bank(sample_rate_hz: int, frame: int, bands: int) -> np.ndarray:
    """float32 (frame // 2 + 1, bands): triangles even on the HTK mel scale from 100 Hz to 0.475 of the rate."""
    low_mel, high_mel = (2595 * math.log10(1 + hz / 700) for hz in (100.0, 0.475 * sample_rate_hz))
    mel = np.linspace(low_mel, high_mel, bands + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    freqs = np.fft.rfftfreq(frame, 1 / sample_rate_hz)[:, None]
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    bank = np.clip(np.minimum((freqs - low) / (centre - low), (high - freqs) / (high - centre)), 0, None)
    return np.float32(bank)


@lru_cache(maxsize=8)
def _packed_bank(sample_rate_hz: int, frame: int, bands: int) -> np.ndarray:
    """float32 (frame, bands): `mel_bank` for the squares of what `spectra` makes."""
    return mel_bank(sample_rate_hz, frame, bands).repeat(2, axis=0)[1:-1]


@lru_cache(maxsize=16)
def _sectors(n: int, angle_min: float, angle_increment: float, beams: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For a scan's geometry: its beams in order of sector, the sectors that have any, and where each starts."""
    angle = angle_min + angle_increment * np.arange(n)
    sector = np.floor(angle / (2 * np.pi) * beams + 0.5).astype(int) % beams
    order = np.argsort(sector, kind="stable")
    present, starts = np.unique(sector[order], return_index=True)
    return order, present, starts


def _wrong_image(spec: StreamSpec, image: Any) -> tuple[str, str] | None:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        return "uint8 (height, width, 3)", _describe(image)
    return None if image.size else ("pixels", f"an empty image {image.shape}")


def _wrong_audio(spec: StreamSpec, audio: Any) -> tuple[str, str] | None:
    if not isinstance(audio, Audio) or audio.samples.dtype != np.int16 or audio.samples.ndim != 2:
        return "Audio with int16 (n, channels) samples", _describe(getattr(audio, "samples", audio))
    if audio.sample_rate_hz != spec.sample_rate_hz:
        return f"{spec.sample_rate_hz} Hz", f"{audio.sample_rate_hz} Hz"
    channels = audio.samples.shape[1]
    if channels not in ((spec.channels,) if spec.channels > 1 else range(1, 65)) or len(audio.samples) == 0:
        wanted = f"{spec.channels}" if spec.channels > 1 else "1 to 64"
        return f"samples of {wanted} channels", f"shape {audio.samples.shape}"
    return None if audio.first_sample >= 0 else ("a sample number", str(audio.first_sample))


def _wrong_scan(spec: StreamSpec, scan: Any) -> tuple[str, str] | None:
    if not isinstance(scan, Scan) or scan.ranges.dtype != np.float32 or scan.ranges.ndim != 1 or len(scan.ranges) < 2:
        return "Scan with float32 (n,) ranges", _describe(getattr(scan, "ranges", scan))
    if not (abs(scan.angle_min) <= MAX_ANGLE_RAD and 0 < abs(scan.angle_increment) <= MAX_ANGLE_RAD):  # False for NaN
        got = f"angle_min {scan.angle_min}, angle_increment {scan.angle_increment}"
        return f"angles up to {MAX_ANGLE_RAD:g} rad, and an increment", got
    if not 0 <= scan.range_min < scan.range_max:  # False for NaN
        return "0 <= range_min < range_max", f"{scan.range_min}, {scan.range_max}"
    measured = len(scan.ranges) - np.count_nonzero(np.isnan(scan.ranges))
    if measured < SCAN_MIN_VALID * len(scan.ranges):
        return f"at least {SCAN_MIN_VALID:.0%} of {len(scan.ranges)} beams measured", f"{measured}"
    return None


def _wrong_floats(shape: tuple[int | None, ...]) -> Callable[[StreamSpec, Any], tuple[str, str] | None]:
    def wrong(spec: StreamSpec, data: Any) -> tuple[str, str] | None:
        want = tuple(spec.shape[0] if n == -1 else n for n in shape)
        if not isinstance(data, np.ndarray) or data.dtype != np.float32 or data.ndim != len(want):
            return f"float32 {want}".replace("None", "n"), _describe(data)
        if any(w is not None and w != n for w, n in zip(want, data.shape)):
            return f"shape {want}".replace("None", "n"), str(data.shape)
        if spec.kind == "points":
            return None if len(data) else ("points", "an empty cloud")
        return None if np.isfinite(data).all() else ("finite values", str(data[~np.isfinite(data)][:3]))

    return wrong


def _wrong_text(spec: StreamSpec, text: Any) -> tuple[str, str] | None:
    if not isinstance(text, str):
        return "str", _describe(text)
    return None if len(text) <= 1000 else ("at most 1000 characters", f"{len(text)}")


def _describe(data: Any) -> str:
    return f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__


_WRONG: dict[str, Callable[[StreamSpec, Any], tuple[str, str] | None]] = {
    "image": _wrong_image,
    "audio": _wrong_audio,
    "scan": _wrong_scan,
    "points": _wrong_floats((None, 3)),
    "imu": _wrong_floats((6,)),
    "vector": _wrong_floats((-1,)),
    "text": _wrong_text,
}
