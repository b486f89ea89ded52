"""Preprocessing: exact values for small inputs, and what is refused."""

import math

import numpy as np
import pytest

from mm_edge import preprocess
from mm_edge.align import View
from mm_edge.errors import SampleError
from mm_edge.preprocess import (
    LogMel,
    Vocabulary,
    check,
    log_mel,
    nearest_points,
    prepare,
    resample_scan,
    resize,
    words_of,
)
from mm_edge.types import Audio, Scan, StreamSpec

RATE = 16000
AUDIO = StreamSpec("audio", "audio", (3, 24, 8), 50, 250, window_ms=172, sample_rate_hz=16000, channels=2)
SCAN = StreamSpec("scan", "scan", (2, 4), 10, 400, range_max_m=10.0)
IMU = StreamSpec("imu", "imu", (2, 7), 200, 100, window_ms=10, mean=(0, 0, 10, 0, 0, 0), std=(2, 2, 2, 1, 1, 1))
IMAGE = StreamSpec("camera", "image", (2, 2, 3), 15, 300)
TEXT = StreamSpec("text", "text", (4,), 0, 0, latched=True)


def four_beams(*ranges: float) -> Scan:
    """Behind, right, ahead, left."""
    return Scan(np.array(ranges, np.float32), -math.pi, math.pi / 2, 0.1, 10.0)


def test_an_image_of_the_right_size_is_taken_as_it_is():
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert resize(image, 2, 2) is image


def test_halving_averages():
    image = np.zeros((4, 4, 3), np.uint8)
    image[:2, :2] = 200
    image[0, 0] = 0
    assert resize(image, 2, 2)[..., 0].tolist() == [[150, 0], [0, 0]]


def test_resizing_does_not_alias():
    stripes = np.zeros((480, 640, 3), np.uint8)
    stripes[:, ::2] = 255
    small = resize(stripes, 96, 128)
    assert small.shape == (96, 128, 3)
    assert small.std() < 10


def test_scan_sectors_start_ahead_and_run_to_the_left():
    x = resample_scan(four_beams(4.0, 3.0, 1.0, 2.0), 4, 10.0)
    assert x[0].tolist() == pytest.approx([0.9, 0.8, 0.6, 0.7])  # closeness ahead, left, behind, right
    assert x[1].tolist() == [1, 1, 1, 1]


def test_no_return_is_nothing_there_and_nan_is_not_measured():
    x = resample_scan(four_beams(math.inf, math.nan, -math.inf, 2.0), 4, 10.0)
    assert x[0].tolist() == pytest.approx([1.0, 0.8, 0.0, 0.0])
    assert x[1].tolist() == [1, 1, 1, 0]


def test_the_nearest_of_a_sectors_beams_counts_and_unscanned_sectors_are_marked():
    ahead = Scan(np.float32([5.0, 2.0, 4.0]), -0.2, 0.2, 0.1, 10.0)
    x = resample_scan(ahead, 4, 10.0)
    assert x[0].tolist() == pytest.approx([0.8, 0, 0, 0])
    assert x[1].tolist() == [1, 0, 0, 0]


def test_imu_is_normalised_and_missing_rows_are_zero():
    rows = np.float32([[0] * 6, [2, 0, 14, 0.5, 0, 0]])
    x = prepare(IMU, View(rows, np.array([False, True]), 1, 0.0, 0.0, True, True, 0.1, False))
    assert x.tolist() == [[0] * 7, [1, 0, 2, 0.5, 0, 0, 1]]


def tone(hz: float, left: float, right: float) -> np.ndarray:
    t = np.arange(round(0.172 * 16000)) / 16000
    return np.int16(np.stack([left * np.sin(2 * np.pi * hz * t), right * np.sin(2 * np.pi * hz * t)], 1) * 32767)


def test_a_tone_lights_its_band_and_says_where_it_comes_from():
    x = log_mel(tone(1000, 0.5, 0.05), None, AUDIO)
    level, difference, heard = x
    band = level.mean(axis=1).argmax()
    edges = 700 * (10 ** (np.linspace(*(2595 * np.log10(1 + np.array([100, 7600]) / 700)), 26) / 2595) - 1)
    assert edges[band] < 1000 < edges[band + 2]
    assert difference[band].mean() == pytest.approx(2.0, abs=0.01)  # 10 times the amplitude: 20 dB
    assert (heard == 1).all()


def test_silence_that_never_came_is_marked():
    valid = np.ones(2752, bool)
    valid[:512] = False
    x = log_mel(np.zeros((2752, 2), np.int16), valid, AUDIO)
    assert x[-1, 0, 0] == 0
    assert x[-1, 0, -1] == 1


def test_points_nearest_first():
    points = np.float32([[3, 0, 0], [0, 1, 0], [np.nan, 0, 0], [0, 0, 20]])
    assert nearest_points(points, 3, 10.0).tolist() == [
        [0, pytest.approx(0.1), 0, 1],
        [pytest.approx(0.3), 0, 0, 1],
        [0] * 4,
    ]


def test_words_become_tokens():
    words = Vocabulary(["ball", "go", "red", "the", "to"])
    assert words.encode("Go to the RED ball!", 6).tolist() == [2, 5, 4, 3, 1, 0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It's 3 m, go!", ["it", "s", "3", "m", "go"]),
        ("GRU\u0308N gr\u00fcn", ["gr\u00fcn", "gr\u00fcn"]),  # composed or not
        ("\uff33\uff34\uff2f\uff30 s\u200btop", ["stop", "stop"]),  # as wide as a Chinese sign; with an invisible one
        ("काला कील", ["काला", "कील"]),  # vowels are marks
        ("stop \u26a0\ufe0f! 3\ufe0f\u20e3", ["stop", "3"]),  # a sign as a picture, a digit on a key
        ("it\u00b4s stop\u00b4", ["it", "s", "stop"]),  # an accent that is on no letter
        ("e\u200d\u0301", ["\u00e9"]),
    ],
)
def test_words_of_any_script(text, words):
    assert words_of(text) == words


@pytest.mark.parametrize(
    ("spec", "data", "expected", "got"),
    [
        (IMAGE, np.zeros((2, 2), np.uint8), "uint8 (height, width, 3)", "uint8 (2, 2)"),
        (IMAGE, np.zeros((0, 2, 3), np.uint8), "pixels", "an empty image (0, 2, 3)"),
        (AUDIO, Audio(np.zeros((320, 2), np.int16), 0, 8000), "16000 Hz", "8000 Hz"),
        (AUDIO, Audio(np.zeros((320, 1), np.int16), 0, 16000), "samples of 2 channels", "shape (320, 1)"),
        (SCAN, four_beams(1, math.nan, math.nan, math.nan), "at least 50% of 4 beams measured", "1"),
        (SCAN, four_beams(1, 2, 3, 4)._replace(range_max=math.nan), "0 <= range_min < range_max", "0.1, nan"),
        (SCAN, four_beams(1, 2, 3, 4)._replace(angle_increment=0.0), "an increment", "angle_increment 0.0"),
        (IMU, np.float32([0, 0, np.inf, 0, 0, 0]), "finite values", "[inf]"),
        (IMU, np.zeros(3, np.float32), "shape (6,)", "(3,)"),
        (TEXT, "go to the moon", "words among the 3 the model knows", "unknown ['moon']"),
        (TEXT, "go to the go to", "1 to 4 words", "5"),
        (TEXT, " !", "1 to 4 words", "0"),
    ],
)
def test_bad_data_is_refused_with_stream_expected_and_got(spec, data, expected, got):
    with pytest.raises(SampleError) as refused:
        check(spec, data, Vocabulary(["go", "the", "to"]))
    assert refused.value.stream == spec.name
    assert expected in str(refused.value)
    assert got in str(refused.value)


def heard(samples, end, valid=None):
    return View(
        samples, np.ones(len(samples), bool) if valid is None else valid, 1, 0, 0, True, True, 0.1, False, 0, end
    )


def test_what_was_heard_before_is_not_looked_at_again(monkeypatch):
    """And comes out as if it were; one, three or no hops later."""
    sound = np.random.default_rng(0).integers(-9000, 9000, (RATE, 2), np.int16)
    window, hop, ear, looked = round(AUDIO.window_ms * RATE / 1e3), 320, LogMel(AUDIO), []
    levels = preprocess._levels
    monkeypatch.setattr(preprocess, "_levels", lambda x, spec, out: looked.append(out.shape[2]) or levels(x, spec, out))
    for end in (window, window + hop, window + 4 * hop, window + 4 * hop):
        got = ear(heard(sound[end - window : end], end))
        np.testing.assert_allclose(got, log_mel(sound[end - window : end], None, AUDIO), atol=1e-5)
    assert looked == [8, 8, 1, 8, 3, 8, 8]  # after each of its own, all of the comparison


def test_an_ear_begins_anew_where_hops_do_not_fit_or_samples_are_missing():
    sound = np.random.default_rng(0).integers(-9000, 9000, (RATE, 2), np.int16)
    window, ear = round(AUDIO.window_ms * RATE / 1e3), LogMel(AUDIO)
    lost = np.ones(window, bool)
    lost[-700:-400] = False
    for end, valid in (
        (window, None),
        (window + 100, None),
        (window + 420, lost),
        (window + 740, None),
        (window, None),
    ):
        samples = sound[end - window : end]
        got = ear(heard(samples, end, valid))
        np.testing.assert_allclose(got, log_mel(samples, valid, AUDIO), atol=1e-5)


@pytest.mark.parametrize("cv2", ["there", "missing"])
def test_spectra_are_fourier_transforms_packed_alike_with_opencv_and_without(cv2, monkeypatch):
    if cv2 == "missing":
        monkeypatch.setattr(preprocess, "_cv2", lambda: None)
    else:
        pytest.importorskip("cv2")
    frames = np.float32([[1, 0, 0, 0, 0, 0, 0, 0], np.cos(np.arange(8) * np.pi / 2 + 0.3), [1, -1] * 4])
    got = preprocess.spectra(frames)
    re, im = 4 * math.cos(0.3), 4 * math.sin(0.3)
    expected = [[1, 1, 0, 1, 0, 1, 0, 1], [0, 0, 0, re, im, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 8]]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_log_mel_is_what_transformers_makes():
    audio = pytest.importorskip("transformers.audio_utils", reason="transformers is not installed")
    sound = np.random.default_rng(0).integers(-9000, 9000, (round(AUDIO.window_ms * RATE / 1e3), 2), np.int16)
    bands = audio.mel_filter_bank(257, 24, 100.0, 0.475 * RATE, RATE, norm=None, mel_scale="htk")
    left, right = (
        audio.spectrogram(
            channel[-7 * 320 - 512 :] / np.float32(32768), np.hanning(512), 512, 320, power=2.0, center=False,
            mel_filters=bands, mel_floor=0.0,
        )
        for channel in sound.T
    )  # fmt: skip
    left, right = np.log10(left + 1e-6), np.log10(right + 1e-6)
    got = log_mel(sound, None, AUDIO)
    np.testing.assert_allclose(got[0], (left + right) / 2, atol=1e-4)
    np.testing.assert_allclose(got[1], left - right, atol=1e-4)
