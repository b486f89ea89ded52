"""Readers of real data sets and the samples made of them: exact on small archives made here, by count on the real."""

import bz2
import io
import json
import math
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed: it reads the sounds")
cv2 = pytest.importorskip("cv2", reason="no cv2 is installed")

from mm_edge.errors import EdgeError
from training import real_data
from training.protocols import add_noise, learned_from, motion, pair_digits
from training.real_data import DigitClip, Segment, Series

DATA = Path(__file__).parents[1].parent / "shared" / "data"
real = pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not here")
FSDD, WORDS, ESC = "fsdd_8k_flac.zip", "speech_commands_v002_test.zip", "esc10_16k_ogg.zip"
CARMEN, COMMA, TUB = "radish_2dlidar_odom_carmen.zip", "comma2k19_1min_imu_can_pose.zip", "donkey_tub_1000.tar.gz"


def sound(samples, rate_hz, kind="FLAC"):
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, format=kind)
    return file.getvalue()


def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def write_mnist(folder, labels=(3, 3)):
    x, y = np.zeros((2, 28, 28), np.uint8), np.uint8(labels)
    np.savez(folder / "mnist.npz", x_train=x, y_train=y, x_test=x[:1], y_test=y[:1])


def write_tub(folder, frames, images):
    """Frames (index, angle, throttle), images by name."""
    keys = ("_index", "user/angle", "user/throttle")
    rows = [{**dict(zip(keys, frame)), "cam/image_array": f"{frame[0]}.jpg"} for frame in frames]
    members = {
        "tub/catalog_0.catalog": "\n".join(map(json.dumps, rows)).encode(),
        "tub/._catalog_0.catalog": b"\0\5",
        "tub/manifest.json": b'[]\n{"deleted_indexes": [7]}',
        **{f"tub/images/{name}": data for name, data in images.items()},
    }
    with tarfile.open(folder / TUB, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def flaser(stamp_s, x, y, heading, ranges=(1.0, 2.0, 9.0, 4.0)):
    words = (*ranges, 0, 0, 0, x, y, heading, stamp_s, "nohost", stamp_s)
    return f"FLASER {len(ranges)} " + " ".join(map(str, words))


def array(values):
    file = io.BytesIO()
    np.save(file, np.asarray(values))
    return file.getvalue()


def comma(seconds=4.0, rate_hz=100, speed=lambda t: t):
    t = np.arange(0, seconds, 1 / rate_hz)
    log = {
        "IMU/accelerometer": np.ones((len(t), 3)), "IMU/gyro": np.tile([0.0, 0.0, -0.5], (len(t), 1)),
        "CAN/speed": speed(t)[:, None], "CAN/steering_angle": np.full(len(t), 2.0),
    }  # fmt: skip
    members = {f"car/7/processed_log/{k}/value": array(v) for k, v in log.items()}
    return members | {f"car/7/processed_log/{k}/t": array(t) for k in log}


def test_a_digit_clip_tells_digit_speaker_samples_and_rate_of_a_speaker_never_seen(tmp_path):
    write_mnist(tmp_path)
    write_zip(tmp_path / FSDD, {"README.md": b"", "3_zoe_0.flac": sound([0.5, -0.5], 8000)})
    digits = real_data.read_digits(tmp_path)
    (clip,) = digits.clips
    assert (clip.digit, clip.speaker, clip.sample_rate_hz) == (3, "zoe", 8000)
    assert clip.samples.tolist() == [0.5, -0.5] and clip.samples.dtype == np.float32
    assert digits.train_images.shape == (2, 28, 28) and digits.train_labels.tolist() == [3, 3]
    assert len(digits.test_images) == len(digits.test_labels) == 1


def test_words_tell_their_speaker_also_when_unknown_and_each_silence_has_its_own(tmp_path):
    flac = sound([0.25], 16000)
    names = ("yes/zoe_nohash_3.flac", "_unknown_/bed_zoe_nohash_0.wav.flac", "_silence_/17.flac")
    write_zip(tmp_path / WORDS, dict.fromkeys(names, flac))
    clips = {clip[:2] for clip in real_data.read_words(tmp_path)}
    assert clips == {("yes", "zoe"), ("_unknown_", "zoe"), ("_silence_", "17")}


def test_sounds_tell_class_and_fold(tmp_path):
    write_zip(tmp_path / ESC, {"011 - Door/5-77-A.ogg": sound(np.zeros(1600), 16000, "OGG")})
    (clip,) = real_data.read_sounds(tmp_path)
    assert (clip.sound, clip.fold, len(clip.samples)) == ("Door", 5, 1600)


def test_a_carmen_log_of_any_name_gives_scans_geometry_and_velocities(tmp_path):
    lines = [
        "# a comment", "PARAM robot_frontlaser_offset 0.0 nohost 0", "ODOM 0 0 0 0 0 0 1.0 nohost 0",
        flaser(10.0, 0, 0, math.pi / 2),
        flaser(10.5, 0, 0.5, math.pi / 2),  # ahead, 1 m/s
        flaser(99.0, 0, 0.6, math.pi / 2),  # its stamp runs away
        flaser(10.75, 0, 0.75, math.pi / 2),  # half a second ago is 10.0
        flaser(10.75, 0, 0.75, math.pi / 2),  # again
        flaser(11.25, 0, 0.25, math.pi / 2),  # backwards, 1 m/s
        flaser(11.75, 9, 0.25, math.pi / 2),  # jumped
        flaser(12.25, 9, 0.25, 3.0),
        flaser(12.75, 9, 0.25, -3.0),  # turned on to the left, over the seam
        flaser(15.0, 9, 0.25, -3.0),  # too long ago
    ]  # fmt: skip
    write_zip(tmp_path / CARMEN, {"zoes_lab.clf.bz2": bz2.compress("\n".join(lines).encode()), "LICENSE": b"CC"})
    ((name, log),) = real_data.read_carmen(tmp_path).items()
    assert name == "zoes_lab" and log.refused == 0
    assert log.ranges.dtype == np.float32 and log.ranges[0].tolist() == [1, 2, 9, 4]
    assert (log.angle_min, log.angle_increment, log.range_max_m) == (-math.pi / 2, math.pi / 4, 9)
    assert log.odometry[1].tolist() == [0, 0.5, math.pi / 2]
    assert log.stamps_s[:3].tolist() == [10, 10.5, 99]
    nan, turn = math.nan, 2 * math.pi - 6
    assert np.flatnonzero(~log.rising).size == 2 and not log.rising[2]
    linear, angular = log.linear_mps[log.rising], log.angular_radps[log.rising]
    np.testing.assert_allclose(linear, [nan, 1, 1, -1, nan, 0, 0, nan], atol=1e-9)
    np.testing.assert_allclose(angular, [nan, 0, 0, 0, nan, (3 - math.pi / 2) * 2, turn * 2, nan], atol=1e-9)


def test_a_robotlaser_line_tells_its_own_geometry(tmp_path):
    line = "ROBOTLASER1 0 -1.0 2.0 0.5 30.0 0.01 0 2 1.5 2.5 1 7 0 0 0 4 5 0.5 0 0 1 1 1 100.25 host 100.25"
    write_zip(tmp_path / CARMEN, {"zoe.log": line})
    log = real_data.read_carmen(tmp_path)["zoe"]
    assert (log.angle_min, log.angle_increment, log.range_max_m) == (-1.0, 0.5, 30.0)
    assert log.ranges.tolist() == [[1.5, 2.5]] and log.odometry.tolist() == [[4, 5, 0.5]]
    assert log.stamps_s.tolist() == [100.25]


def test_the_cut_last_line_of_a_long_log_is_counted_and_left_out_but_not_a_tenth_of_it(tmp_path):
    lines = [flaser(k, 0, 0, 0) for k in range(100)]
    write_zip(tmp_path / CARMEN, {"long.clf": "\n".join([*lines, lines[0][:20]])})
    log = real_data.read_carmen(tmp_path)["long"]
    assert (len(log.ranges), log.refused) == (100, 1)
    write_zip(tmp_path / CARMEN, {"short.clf": "\n".join([*lines[:9], lines[0][:20]])})
    with pytest.raises(EdgeError, match=r"short\.clf: .* got 1 others among 10"):
        real_data.read_carmen(tmp_path)


def test_one_stamp_far_off_costs_one_sample_and_of_equal_stamps_the_last_counts():
    assert real_data.rising_row(np.array([1.0, 2, -50, 3, 900, 4, 4, 5])).tolist() == [
        True, True, False, True, False, False, True, True
    ]  # fmt: skip


def test_a_comma_segment_keeps_the_stamps_of_each_stream_and_may_lack_poses(tmp_path):
    write_zip(tmp_path / COMMA, comma())
    ((name, segment),) = real_data.read_comma(tmp_path).items()
    assert name == "car/7" and segment.pose_velocity is None
    assert segment.speed.values.shape == (400, 1) and segment.gyro.values.shape == (400, 3)
    assert segment.speed.stamps_s[:3].tolist() == [0.0, 0.01, 0.02]


def test_a_tub_is_read_in_its_order_as_rgb_without_what_was_deleted(tmp_path):
    red = cv2.imencode(".jpg", np.full((120, 160, 3), (0, 0, 250), np.uint8))[1].tobytes()
    write_tub(tmp_path, [(8, 0.5, 0.25), (7, 0.0, 0.0), (2, -1.0, 0.75)], {"2.jpg": red, "8.jpg": red})
    tub = real_data.read_donkey(tmp_path)
    assert tub.images.shape == (2, 120, 160, 3) and tub.images[0, 0, 0, 0] > 240 and tub.images[0, 0, 0, 2] < 10
    assert tub.steering.tolist() == [-1.0, 0.5] and tub.throttle.tolist() == [0.75, 0.25]


@pytest.mark.parametrize("read", ["digits", "words", "sounds", "carmen", "comma", "donkey"])
def test_a_folder_without_the_file_an_empty_and_a_damaged_archive_name_it(read, tmp_path):
    name = {"digits": FSDD, "words": WORDS, "sounds": ESC, "carmen": CARMEN, "comma": COMMA, "donkey": TUB}[read]
    write_mnist(tmp_path)
    with pytest.raises(EdgeError, match=name):
        getattr(real_data, f"read_{read}")(tmp_path)
    if read == "donkey":
        write_tub(tmp_path, [], {})
    else:
        write_zip(tmp_path / name, {})
    with pytest.raises(EdgeError, match=f"{name}: expected .* got "):
        getattr(real_data, f"read_{read}")(tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EdgeError, match=f"{name}.*: expected a whole archive, got "):
        getattr(real_data, f"read_{read}")(tmp_path)


@pytest.mark.parametrize(
    "member, data, said",
    [
        ("3_zoe_0.flac", b"no sound", "3_zoe_0.flac: expected a sound"),
        ("3zoe.flac", sound([0.5], 8000), "3zoe.flac: expected a name like <digit>_<speaker>_<number>, got 3zoe"),
        ("3_zoe_0.flac", sound([0.5], 16000), r"3_zoe_0.flac: expected one channel at 8000 Hz, got \(1,\) at 16000 Hz"),
        ("3_zoe_0.flac", sound([[0.5, 0.5]], 8000), r"expected one channel at 8000 Hz, got \(1, 2\)"),
    ],
)
def test_what_is_not_a_spoken_digit_is_named(member, data, said, tmp_path):
    write_mnist(tmp_path)
    write_zip(tmp_path / FSDD, {member: data})
    with pytest.raises(EdgeError, match=said):
        real_data.read_digits(tmp_path)


def test_a_word_without_a_speaker_is_refused(tmp_path):
    write_zip(tmp_path / WORDS, {"yes/1.flac": sound([0.5], 16000)})
    with pytest.raises(EdgeError, match=r"yes/1\.flac: expected a name like <speaker>_nohash_<number>, got 1"):
        real_data.read_words(tmp_path)


@pytest.mark.parametrize("labels", [(3,), (3, 10)])
def test_images_and_labels_must_fit(labels, tmp_path):
    write_mnist(tmp_path, labels)
    with pytest.raises(EdgeError, match=r"mnist\.npz: y_train: expected a label, 0 to 9, for each of 2 images"):
        real_data.read_digits(tmp_path)


def test_a_stream_that_is_missing_or_shorter_than_its_stamps_is_named(tmp_path):
    members = comma()
    write_zip(tmp_path / COMMA, members | {"car/7/processed_log/CAN/speed/value": array(np.zeros((9, 1)))})
    with pytest.raises(EdgeError, match=r"car/7/processed_log/CAN/speed/value: .* got \(9, 1\)"):
        real_data.read_comma(tmp_path)
    del members["car/7/processed_log/IMU/gyro/t"]
    write_zip(tmp_path / COMMA, members)
    with pytest.raises(EdgeError, match=r"car/7/processed_log/IMU/gyro/t: .* got no such member"):
        real_data.read_comma(tmp_path)


@pytest.mark.parametrize("images, got", [({}, "no such member"), ({"0.jpg": b"no image"}, "no image")])
def test_a_frame_without_its_image_is_named(images, got, tmp_path):
    write_tub(tmp_path, [(0, 0.0, 0.0)], images)
    with pytest.raises(EdgeError, match=rf"tub/images/0\.jpg: expected an image \(120, 160, 3\), got {got}"):
        real_data.read_donkey(tmp_path)


@pytest.mark.parametrize("snr_db", [20.0, 0.0, -5.0])
def test_noise_has_the_power_asked_for_in_each_row_by_itself(snr_db):
    samples = np.stack([np.full(100_000, 0.5), np.sin(np.arange(100_000))]).astype(np.float32)
    noise = add_noise(samples, snr_db, np.random.default_rng(1)) - samples
    measured_db = 10 * np.log10((samples**2).mean(-1) / (noise**2).mean(-1))
    assert measured_db == pytest.approx(snr_db, abs=0.1)


def test_a_pair_is_of_one_digit_and_its_noise_covers_the_padding_too():
    clips = [
        DigitClip(d, "zoe", np.full(n, level, np.float32), 8000) for d, n, level in ((0, 3000, 0.5), (1, 9000, 0.25))
    ]
    images = np.stack([np.zeros((28, 28), np.uint8), np.full((28, 28), 255, np.uint8)])
    clean = pair_digits(images, np.array([1, 0]), clips, np.random.default_rng(0), image_noise=0.0, snr_db=math.inf)
    assert clean.images[:, 0, 0].tolist() == [0, 1] and clean.labels.tolist() == [1, 0]
    assert clean.sounds.shape == (2, 6000) and np.all(clean.sounds[0] == 0.25)
    assert np.all(clean.sounds[1, :3000] == 0.5) and not clean.sounds[1, 3000:].any()
    noisy = pair_digits(images, np.array([1, 0]), clips, np.random.default_rng(0))
    again = pair_digits(images, np.array([1, 0]), clips, np.random.default_rng(0))
    np.testing.assert_array_equal(noisy.sounds, again.sounds)
    assert (noisy.sounds - clean.sounds).std(1) == pytest.approx([0.25, 0.5**1.5], rel=0.05)  # of the whole 0.75 s
    assert noisy.sounds[1, 3000:].std() == pytest.approx(0.5**1.5, rel=0.05)
    assert (noisy.images - clean.images).std() == pytest.approx(1.2, rel=0.05)
    assert noisy.images.dtype == noisy.sounds.dtype == np.float32


def test_a_digit_that_no_clip_says_and_labels_too_few_are_refused():
    clips, images = [DigitClip(0, "zoe", np.ones(9, np.float32), 8000)], np.zeros((1, 28, 28), np.uint8)
    with pytest.raises(EdgeError, match="got none of 4 among 1"):
        pair_digits(images, np.array([4]), clips, np.random.default_rng(0))
    with pytest.raises(EdgeError, match="expected a label for each of 1 images, got 2"):
        pair_digits(images, np.array([0, 0]), clips, np.random.default_rng(0))
    with pytest.raises(EdgeError, match=r"expected clips at 8000 Hz, got \[16000\]"):
        pair_digits(images, np.array([0]), [clips[0]._replace(sample_rate_hz=16000)], np.random.default_rng(0))


def test_a_cars_motion_is_unknown_where_it_says_nothing():
    t = np.arange(0, 4, 0.01)
    gyro, steering = Series(t, np.tile([0.0, 0.0, -0.5], (len(t), 1))), Series(t, np.ones((len(t), 1)))
    kept = (t < 1.5) | (t > 2.0)
    segment = Segment(gyro, gyro, Series(t[kept], t[kept][:, None]), steering, None, None)
    speed, yaw_rate = motion(segment, np.array([1.0, 1.55, 1.75, 2.5])).T
    assert speed == pytest.approx([1.0, 1.49, np.nan, 2.5], nan_ok=True)  # for 0.1 s it is taken to go on
    assert yaw_rate == pytest.approx([0.5] * 4)  # to the left; the sensor's z is down


def test_a_name_that_is_nearly_another_is_not_passed_over(capsys):
    """Or the one that was to be held out would be learned by."""
    names = ["george", "lucas"]
    with pytest.raises(ValueError, match=r"data\.held_out: there is no luca; did you mean lucas\?"):
        learned_from(SimpleNamespace(data={"held_out": ["luca"]}), names)
    assert learned_from(SimpleNamespace(data={"held_out": ["aces"]}), names) == names
    assert "data.held_out: there is no aces among george, lucas" in capsys.readouterr().err


def test_the_readers_need_no_torch():
    code = "import sys, training.protocols; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.strip() == "False", done.stderr


@real
def test_real_digits_are_as_many_as_told():
    digits = real_data.read_digits(DATA)
    assert digits.train_images.shape == (60000, 28, 28) and len(digits.test_labels) == 5000
    assert Counter(c.speaker for c in digits.clips) == dict.fromkeys(("george", "jackson", "lucas", "nicolas"), 500)
    assert set(Counter(c.digit for c in digits.clips).values()) == {200}
    draw = pair_digits(digits.test_images[:500], digits.test_labels[:500], digits.clips, np.random.default_rng(3))
    clean = pair_digits(
        digits.test_images[:500], digits.test_labels[:500], digits.clips, np.random.default_rng(3), 0.0, math.inf
    )
    power = np.square(clean.sounds, dtype=np.float64).mean(1)
    snr_db = 10 * np.log10(power / np.square(draw.sounds - clean.sounds, dtype=np.float64).mean(1))
    assert snr_db.mean() == pytest.approx(0.0, abs=0.1)


@real
def test_real_words_and_sounds_are_as_many_as_told():
    words = real_data.read_words(DATA)
    assert len(words) == 3882 and len({clip.word for clip in words}) == 12
    assert {len(clip.samples) for clip in words} == {16000}
    assert all(len(clip.speaker) == 8 for clip in words if clip.word != "_silence_")
    sounds = real_data.read_sounds(DATA)
    assert len(sounds) == 318 and len({clip.sound for clip in sounds}) == 10
    assert {clip.fold for clip in sounds} == {1, 2, 3, 4}
    assert max(abs(clip.samples).max() for clip in sounds) == 1.0


@real
def test_real_logs_are_as_long_as_told_and_their_robots_move_like_robots():
    logs = real_data.read_carmen(DATA)
    assert {name: log.ranges.shape for name, log in logs.items()} == {"aces": (7374, 180), "intel": (13631, 180)}
    for log in logs.values():
        linear, angular = log.linear_mps[log.rising], log.angular_radps[log.rising]
        known = np.isfinite(linear)
        assert known.mean() > 0.7
        assert np.nanmin(linear) > -0.5 and np.nanmax(linear) < 2.0 and np.nanmax(np.abs(angular)) < 2.0
        t, pose = log.stamps_s[log.rising], log.odometry[log.rising]
        for i in np.flatnonzero(known)[[10, 2000, -10]]:
            j = max(k for k in range(i) if t[k] <= t[i] - 0.5)
            turn = math.remainder(pose[i, 2] - pose[j, 2], 2 * math.pi)
            (dx, dy), heading = pose[i, :2] - pose[j, :2], pose[j, 2] + turn / 2
            assert linear[i] == pytest.approx((dx * math.cos(heading) + dy * math.sin(heading)) / (t[i] - t[j]))
            assert angular[i] == pytest.approx(turn / (t[i] - t[j]))


@real
def test_a_real_minute_of_driving_and_a_real_tub_are_as_told():
    (segment,) = real_data.read_comma(DATA).values()
    assert len(segment.gyro.values) == 6256 and len(segment.speed.values) == 4974
    assert segment.pose_velocity.values.shape == (1200, 3) and segment.pose_orientation.values.shape == (1200, 4)
    by_pose = np.interp(segment.speed.stamps_s, segment.pose_velocity.stamps_s,
                        np.linalg.norm(segment.pose_velocity.values, axis=1))  # fmt: skip
    assert np.abs(by_pose - segment.speed.values[:, 0]).mean() < 0.3
    tub = real_data.read_donkey(DATA)
    assert tub.images.shape == (1000, 120, 160, 3) and tub.steering.shape == tub.throttle.shape == (1000,)
    assert np.abs(tub.steering).max() <= 1 and np.abs(tub.throttle).max() <= 1
