"""Readers of real data sets, straight from their archives: a folder in, arrays out.

    digits = read_digits(folder)     # mnist.npz, fsdd_8k_flac.zip
    words = read_words(folder)       # speech_commands_v002_test.zip
    sounds = read_sounds(folder)     # esc10_16k_ogg.zip
    logs = read_carmen(folder)       # radish_2dlidar_odom_carmen.zip
    segments = read_comma(folder)    # comma2k19_1min_imu_can_pose.zip
    tub = read_donkey(folder)        # donkey_tub_1000.tar.gz

They are packed from public data, on GitHub unless it is said: mnist from rasbt/mnist-pngs (x_train, y_train, x_test,
y_test, 28x28 uint8); fsdd from Jakobovski/free-spoken-digit-dataset (FLAC at 8 kHz, digit_speaker_number);
speech_commands is the official test archive of Speech Commands v0.02 as FLAC; esc10 from karolpiczak/ESC-10 at 16
kHz; radish from MOLAorg/mola_test_datasets; comma2k19 from commaai/comma2k19; donkey_tub from autorope/donkeycar.

Who speaks, which logs and how many of anything there are, the archives say. What cannot be read is an EdgeError that
names the file and the member in it.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import math
import re
import tarfile
import zipfile
import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from mm_edge.errors import EdgeError, MissingDependency, needs

SOUND = (".flac", ".ogg", ".wav")
DAMAGED = (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile, tarfile.TarError, zlib.error)
BASE_S, MAX_BASE_S = 0.5, 1.0  # a velocity is a difference over so long
MAX_SPEED_MPS, MAX_TURN_RADPS = 5.0, 6.0  # odometry that says more has jumped
MAX_REFUSED = 0.01  # of the scans in a log: the last line is often cut, more is another format


class DigitClip(NamedTuple):
    digit: int
    speaker: str
    samples: np.ndarray  # float32 (n,) in [-1, 1]
    sample_rate_hz: int


class Digits(NamedTuple):
    train_images: np.ndarray  # uint8 (n, 28, 28), white on black
    train_labels: np.ndarray  # uint8 (n,)
    test_images: np.ndarray
    test_labels: np.ndarray
    clips: list[DigitClip]


class WordClip(NamedTuple):
    word: str
    speaker: str
    samples: np.ndarray  # float32 (n,) in [-1, 1], 16 kHz


class SoundClip(NamedTuple):
    sound: str
    fold: int
    samples: np.ndarray  # float32 (n,) in [-1, 1], 16 kHz


class LaserLog(NamedTuple):
    """Scans in the order of their log. n scans."""

    stamps_s: np.ndarray  # float64 (n,) as they lie in the log: they may repeat, and run back
    rising: np.ndarray  # bool (n,): the longest row of scans whose stamps rise; the others' stamps cannot be true
    ranges: np.ndarray  # float32 (n, beams) metres, from right to left; range_max_m is no return
    angle_min: float  # radians, 0 ahead
    angle_increment: float  # radians
    range_max_m: float
    odometry: np.ndarray  # float64 (n, 3) x m, y m, heading rad
    linear_mps: np.ndarray  # float64 (n,) forward; NaN where it is not known
    angular_radps: np.ndarray  # float64 (n,) to the left; NaN where it is not known
    refused: int  # scans that could not be read


class Series(NamedTuple):
    stamps_s: np.ndarray  # float64 (n,), ascending
    values: np.ndarray  # float64 (n, d)


class Segment(NamedTuple):
    """A minute of driving. Stamps of all series are of one clock."""

    accel: Series  # m/s^2: forward, right, down
    gyro: Series  # rad/s: about forward, right, down
    speed: Series  # m/s
    steering: Series  # degrees at the steering wheel, to the left
    pose_velocity: Series | None  # m/s, earth-centred (ECEF)
    pose_orientation: Series | None  # quaternion (w, x, y, z): body in ECEF, body is forward, right, down


class Tub(NamedTuple):
    images: np.ndarray  # uint8 (n, 120, 160, 3) RGB
    steering: np.ndarray  # float32 (n,) in [-1, 1], to the right
    throttle: np.ndarray  # float32 (n,) in [-1, 1]


def read_digits(folder: Path) -> Digits:
    """Written digits and, at 8 kHz and cut close, spoken ones: most last 0.15 to 0.75 s, few up to 1.3 s."""
    path = Path(folder) / "mnist.npz"
    arrays: dict[str, np.ndarray] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: file[k] for k in ("x_train", "y_train", "x_test", "y_test")}
    except DAMAGED as error:
        raise _refused(path, "x_train, y_train, x_test, y_test (see training/real_data.py)", error) from error
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.dtype != np.uint8 or x.shape[1:] != (28, 28) or not len(x):
            raise _refused(f"{path}: x_{part}", "images, uint8 (n, 28, 28)", f"{x.dtype} {x.shape}")
        if y.shape != x.shape[:1] or y.dtype.kind not in "iu" or y.min() < 0 or y.max() > 9:
            raise _refused(f"{path}: y_{part}", f"a label, 0 to 9, for each of {len(x)} images", f"{y.dtype} {y.shape}")
    clips = []
    for _, name, where, samples in _sounds(Path(folder) / "fsdd_8k_flac.zip", 8000):
        digit, speaker = _named(r"(\d)_(.+)_\d+", name, where, "<digit>_<speaker>_<number>")
        clips.append(DigitClip(int(digit), speaker, samples, 8000))
    return Digits(arrays["x_train"], arrays["y_train"], arrays["x_test"], arrays["y_test"], clips)


def read_words(folder: Path) -> list[WordClip]:
    """Spoken words of 1 s at 16 kHz. Words outside of the vocabulary are one class, `_unknown_`. `_silence_`, cut out
    of a few long recordings, has no speaker: each of its clips counts as one of its own."""
    clips = []
    for parent, name, where, samples in _sounds(Path(folder) / "speech_commands_v002_test.zip", 16000):
        pattern = r"(.+)" if parent == "_silence_" else r"(?:[^_]+_)?([^_]+)_nohash_\d+(?:\.wav)?"
        (speaker,) = _named(pattern, name, where, "<speaker>_nohash_<number>")
        clips.append(WordClip(parent, speaker, samples))
    return clips


def read_sounds(folder: Path) -> list[SoundClip]:
    """Sound events at 16 kHz, almost all of 5 s, some of 3.6 to 7.3 s. Their class is the name of the folder."""
    clips = []
    for parent, name, where, samples in _sounds(Path(folder) / "esc10_16k_ogg.zip", 16000):
        (fold,) = _named(r"(\d)-.+", name, where, "<fold>-<clip>-<take>")
        clips.append(SoundClip(re.sub(r"^\d+ - ", "", parent), int(fold), samples))
    return clips


def read_carmen(folder: Path) -> dict[str, LaserLog]:
    """Every CARMEN log in the archive, by its name without suffixes (with them where another has that name): what holds
    FLASER or ROBOTLASER1 lines is one.

    A scan brings the odometry of its moment, so that ODOM lines are not needed. A FLASER line says nothing of its
    geometry: a SICK's is taken, half a turn in steps of 180 / n degrees, and the largest reading as range_max_m.
    Stamps are those of arrival at the logger; Intel's come in bursts (1 ms apart, 5 cm apart) and run back 631 times.
    """
    path = Path(folder) / "radish_2dlidar_odom_carmen.zip"
    logs = {}
    for name, data in _members(path):
        stem, where = re.sub(r"(\.(clf|log|txt|bz2|gz))+$", "", name), f"{path}: {name}"
        try:
            data = bz2.decompress(data) if data[:3] == b"BZh" else data
            data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        except DAMAGED as error:
            raise _refused(where, "a whole .bz2 or .gz", error) from error
        lines = [line.split() for line in data.decode("latin-1").splitlines() if line.startswith(("FLASER ", "ROBOTL"))]
        if lines:
            logs[stem if stem not in logs else name] = _log(where, lines)
        elif re.search(r"\.(clf|log)(\.|$)", name):
            raise _refused(where, "FLASER or ROBOTLASER1 lines", "none")
    if not logs:
        raise _refused(path, "CARMEN logs", "none")
    return logs


def _log(where: str, lines: list[list[str]]) -> LaserLog:
    count = Counter(line[0] for line in lines)
    kind = "ROBOTLASER1" if count["ROBOTLASER1"] >= count["FLASER"] else "FLASER"  # a log may tell each scan twice
    read = [_scan(line) for line in lines if line[0] == kind]
    scans = [scan for scan in read if scan]
    beams = Counter(len(ranges) for ranges, *_ in scans).most_common(1)[0][0] if scans else 0
    scans = [scan for scan in scans if len(scan[0]) == beams]
    refused = len(read) - len(scans)
    if not beams or refused > MAX_REFUSED * len(read):
        raise _refused(where, f"whole {kind} lines of one number of beams", f"{refused} others among {len(read)}")
    ranges, odometry, stamps_s = (np.array([scan[k] for scan in scans]) for k in range(3))
    angle_min, increment, range_max = -math.pi / 2, math.pi / max(beams - beams % 2, 1), float(ranges.max())
    if kind == "ROBOTLASER1":
        angle_min, increment, range_max = scans[0][3]
    rising = rising_row(stamps_s)
    linear, angular = np.full((2, len(scans)), np.nan)
    linear[rising], angular[rising] = odometry_velocity(stamps_s[rising], odometry[rising])
    return LaserLog(stamps_s, rising, ranges, angle_min, increment, range_max, odometry, linear, angular, refused)


def _scan(w: list[str]) -> tuple[Any, ...] | None:
    """Words of a line -> ranges, odometry, stamp, geometry; None if it is not whole."""
    try:
        first = 2 if w[0] == "FLASER" else 9
        end = first + int(w[first - 1])
        pose, length = (-6, end + 9) if w[0] == "FLASER" else (-11, end + 15 + int(w[end]))
        ranges, odometry = np.array(w[first:end], np.float32), np.array(w[pose : pose + 3], np.float64)
        stamp_s, geometry = float(w[-3]), (() if w[0] == "FLASER" else (float(w[2]), float(w[4]), float(w[5])))
    except (ValueError, IndexError):
        return None
    finite = np.isfinite(ranges).all() and np.isfinite([*odometry, stamp_s]).all()
    return (ranges, odometry, stamp_s, geometry) if len(w) == length and len(ranges) and finite else None


def rising_row(stamps_s: np.ndarray) -> np.ndarray:
    """bool (n,): the longest strictly rising row. A stamp far off costs one sample; of equal ones the last stays."""
    smallest: list[float] = []  # of the rows of each length: the smallest last stamp,
    ends: list[int] = []  # and whose it is
    before: list[int] = []
    for i, stamp in enumerate(stamps_s.tolist()):
        k = bisect_left(smallest, stamp)
        before.append(ends[k - 1] if k else -1)
        smallest[k : k + 1], ends[k : k + 1] = [stamp], [i]
    rising, i = np.zeros(len(stamps_s), bool), ends[-1] if ends else -1
    while i >= 0:
        rising[i], i = True, before[i]
    return rising


def odometry_velocity(stamps_s: np.ndarray, odometry: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rising stamps (n,), poses (n, 3) -> forward m/s (n,), turning rad/s (n,): backward differences.

    The difference is to the newest pose that is BASE_S older: over less, jitter of the stamps makes 100 m/s of 5 cm.
    NaN where that is none, or older than MAX_BASE_S, or so far away that odometry must have jumped.
    """
    before = np.searchsorted(stamps_s, stamps_s - BASE_S, side="right") - 1
    dt_s = stamps_s - stamps_s[before]
    dx, dy, turn = (odometry - odometry[before]).T
    turn = (turn + np.pi) % (2 * np.pi) - np.pi
    heading = odometry[before, 2] + turn / 2
    known = (before >= 0) & (dt_s <= MAX_BASE_S)
    known &= (np.hypot(dx, dy) <= MAX_SPEED_MPS * dt_s) & (np.abs(turn) <= MAX_TURN_RADPS * dt_s)
    dt_s = np.where(known, dt_s, np.nan)
    return (dx * np.cos(heading) + dy * np.sin(heading)) / dt_s, turn / dt_s


def read_comma(folder: Path) -> dict[str, Segment]:
    """By the segment's name: IMU at 104 Hz, CAN at 83 Hz (steps of 0.1 to 29 ms), pose, if there is one, at 20 Hz."""
    path = Path(folder) / "comma2k19_1min_imu_can_pose.zip"
    members = dict(_members(path))
    names = sorted({name.split("/processed_log/")[0] for name in members if "/processed_log/" in name})
    if not names:
        raise _refused(path, "<segment>/processed_log/...", f"{len(members)} other members")

    def series(stamps: str, values: str, width: int) -> Series:
        t, x = (_array(f"{path}: {name}", members.get(name)) for name in (stamps, values))
        if t.ndim != 1 or not len(t) or x.size != len(t) * width:
            raise _refused(f"{path}: {values}", f"a row of {width} for each of {t.shape} stamps", x.shape)
        order = np.argsort(t, kind="stable")
        return Series(t[order], x.reshape(-1, width)[order])

    segments = {}
    for name in names:
        log, pose = f"{name}/processed_log", f"{name}/global_pose"
        kinds = (("IMU/accelerometer", 3), ("IMU/gyro", 3), ("CAN/speed", 1), ("CAN/steering_angle", 1))
        sensors = [series(f"{log}/{kind}/t", f"{log}/{kind}/value", width) for kind, width in kinds]
        poses = [
            series(f"{pose}/frame_times", f"{pose}/{kind}", width) if f"{pose}/{kind}" in members else None
            for kind, width in (("frame_velocities", 3), ("frame_orientations", 4))
        ]
        segments[name] = Segment(*sensors, *poses)
    return segments


def read_donkey(folder: Path) -> Tub:
    """Frames of a car's camera in their order, without those marked as deleted. Their stamps are not real."""
    with needs("reading camera images", "cv2", "camera"):
        import cv2
    path = Path(folder) / "donkey_tub_1000.tar.gz"
    members = dict(_members(path))
    rows, deleted = [], set()
    for name, data in members.items():
        tub, where = str(PurePosixPath(name).parent), f"{path}: {name}"
        try:
            if name.endswith(".catalog"):
                for row in map(json.loads, data.splitlines()):
                    angle, throttle = float(row["user/angle"]), float(row["user/throttle"])
                    rows.append((tub, int(row["_index"]), f"{tub}/images/{row['cam/image_array']}", angle, throttle))
            elif PurePosixPath(name).name == "manifest.json":
                deleted |= {(tub, i) for i in json.loads(data.splitlines()[-1]).get("deleted_indexes", [])}
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise _refused(where, "JSON lines of a Donkeycar tub", repr(error)) from error
    rows = sorted(row for row in rows if row[:2] not in deleted)
    if not rows:
        raise _refused(path, "frames in a .catalog", f"none in {len(members)} members")
    images = np.empty((len(rows), 120, 160, 3), np.uint8)
    for i, (_, _, name, _, _) in enumerate(rows):
        jpeg = members.get(name, b"")
        image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR) if jpeg else None
        if image is None or image.shape != images.shape[1:]:
            got = "no such member" if name not in members else "no image" if image is None else image.shape
            raise _refused(f"{path}: {name}", "an image (120, 160, 3)", got)
        images[i] = image[..., ::-1]
    return Tub(images, *np.array([row[3:] for row in rows], np.float32).T)


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a zip's files in the order of their names, of a tar's as they lie; hidden ones left out."""
    name = ""
    if not path.exists():
        raise EdgeError(f"{path}: expected this archive, got no such file; it is public, see training/real_data.py")
    try:
        if path.name.endswith(".tar.gz"):
            with tarfile.open(path) as tar:
                for member in tar:
                    name = member.name
                    if member.isfile() and not PurePosixPath(name).name.startswith("."):
                        yield name, tar.extractfile(member).read()  # type: ignore[union-attr]
        else:
            with zipfile.ZipFile(path) as archive:
                for name in sorted(archive.namelist()):
                    if not name.endswith("/") and not PurePosixPath(name).name.startswith("."):
                        yield name, archive.read(name)
    except DAMAGED as error:
        raise _refused(f"{path}: {name}" if name else path, "a whole archive", error) from error


def _sounds(path: Path, rate_hz: int) -> Iterator[tuple[str, str, str, np.ndarray]]:
    """Of each sound: its folder, its name without suffix, where it is (for messages), samples float32 (n,)."""
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: its library is not there
        raise MissingDependency("reading recorded sound", "soundfile", "train") from None
    found = False
    for name, data in _members(path):
        member, where = PurePosixPath(name), f"{path}: {name}"
        if member.suffix not in SOUND:
            continue
        try:
            samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
        except (RuntimeError, ValueError, TypeError) as error:
            raise _refused(where, f"a sound ({', '.join(SOUND)})", error) from error
        if rate != rate_hz or samples.ndim != 1 or not len(samples):
            raise _refused(where, f"one channel at {rate_hz} Hz", f"{samples.shape} at {rate} Hz")
        found = True
        yield member.parent.name, member.stem, where, np.clip(samples, -1, 1)  # a lossy codec overshoots
    if not found:
        raise _refused(path, f"sounds ({', '.join(SOUND)})", "none")


def _named(pattern: str, name: str, where: str, expected: str) -> tuple[str, ...]:
    match = re.fullmatch(pattern, name)
    if not match:
        raise _refused(where, f"a name like {expected}", name)
    return match.groups()


def _array(where: str, data: bytes | None) -> np.ndarray:
    try:
        array = np.load(io.BytesIO(data or b""), allow_pickle=False).astype(np.float64)
    except DAMAGED as error:
        raise _refused(where, "an array of numbers in numpy's format", error if data else "no such member") from error
    if not np.isfinite(array).all():
        raise _refused(where, "finite numbers", f"{int((~np.isfinite(array)).sum())} that are not")
    return array


def _refused(where: Path | str, expected: str, got: object) -> EdgeError:
    return EdgeError(f"{where}: expected {expected}, got {got}")
