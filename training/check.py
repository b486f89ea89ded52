"""Whether recordings can be learned from, said before training starts, in a table that a person can read.

    python -m training.check FOLDER [--label TOPIC] [--json]      # status 1 if there are errors

An error names the file, the time and the topic, and what is left out if training goes on all the same: the whole
recording, or only the ticks of that stretch. A warning leaves nothing out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median_low

import numpy as np

from mm_edge.errors import EdgeError
from mm_edge.replay import PAUSE_S
from mm_edge.types import NS, StreamSpec
from training.limits import HALT_S, LIVING, STOOD_S, longest_s, pause_s, watched
from training.recordings import (
    STILL,
    TRAJECTORY,
    UNLABELLED_S,
    Label,
    Recording,
    Topic,
    alike,
    commands_of,
    find,
    identity,
    label_of,
    streams_of,
    tick_of,
    words_of,
)

LEAST_S = 1.0  # a shorter episode is none
RATE_DIFFERS = 0.2  # as a share of the rate in the other recordings, or by the time between two stamps
LATE_S = 0.2  # which a stream may lie behind the others, or else four periods
FUTURE_S = 0.05  # the aligner refuses stamps that lie further ahead
CLOCK_JUMP_S = 1.0
MOSTLY_STANDING, ONE_SIDED, WILD, LEAST_COMMANDS = 0.8, 4.0, 5.0, 20
LABEL_HELP = "the commands to learn (expert/cmd_vel, else cmd_vel, else another Twist, else joints)"
BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Finding:
    """`leaves_out`: "recording", "ticks" or, with a warning, nothing. `time_s`: since the recording began."""

    path: Path
    time_s: float
    topic: str
    what: str
    leaves_out: str = ""

    @property
    def severity(self) -> str:
        return "error" if self.leaves_out else "warning"

    def __str__(self) -> str:
        left_out = f" (leaves out the {self.leaves_out})" if self.leaves_out else ""
        return f"{self.severity}: {self.path} at {self.time_s:.2f} s: {self.topic}: {self.what}{left_out}"


@dataclass(frozen=True)
class Row:
    """A stream or the commands, in all recordings together. Latency is log time less stamp; jitter its 5 to 95 %."""

    name: str
    topic: str
    recordings: int  # that have it
    messages: int
    rate_hz: float
    longest_gap_s: float
    latency_ms: float
    jitter_ms: float


@dataclass(frozen=True)
class Balance:
    """Shares of the commands; left and right are None if nothing turns. `histogram`: ten bins from least to most."""

    commands: int
    standing: float
    left: float | None
    right: float | None
    histogram: dict[str, list[int]]


@dataclass(frozen=True)
class Report:
    recordings: int
    seconds: float
    rows: tuple[Row, ...]
    label: Label
    balance: Balance
    findings: tuple[Finding, ...]
    unused: tuple[str, ...]  # topics

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.leaves_out]

    def usable(self, recordings: Sequence[Recording]) -> list[Recording]:
        """What is left to train on. Ticks that are left out have a weight of 0 in their tables."""
        bad = {finding.path for finding in self.findings if finding.leaves_out == "recording"}
        return [recording for recording in recordings if recording.path not in bad]

    def as_dict(self) -> dict:
        findings = [{**asdict(f), "path": str(f.path), "severity": f.severity} for f in self.findings]
        return {**asdict(self), "findings": findings}

    def __str__(self) -> str:
        head = ("stream", "topic", "files", "messages", "Hz", "gap s", "late ms", "jitter ms")
        table = [head] + [
            (r.name, r.topic, f"{r.recordings}", f"{r.messages}", f"{r.rate_hz:.1f}", f"{r.longest_gap_s:.2f}",
             f"{r.latency_ms:.1f}", f"{r.jitter_ms:.1f}") for r in self.rows
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*table)]
        lines = [f"{self.recordings} recordings, {self.seconds:.1f} s"]
        for row in table:
            cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
            lines.append("  ".join(cells).rstrip())
        b, label = self.balance, self.label
        turns = "" if b.left is None or b.right is None else f", turning left {b.left:.0%}, right {b.right:.0%}"
        what = "positions" if label.interface == "position" else "velocities"
        lines += ["", f"commands on {label.topic}: {b.commands} {what}, standing {b.standing:.0%}{turns}"]
        for name, unit, low, high, rate in zip(label.names, label.units, label.min, label.max, label.max_rate):
            most = max(1, *b.histogram[name])
            bars = "".join(BARS[-(-8 * n // most)] for n in b.histogram[name])
            unit = unit and f" {unit}"
            lines.append(f"  {name}: {low:.3g} |{bars}| {high:.3g}{unit}, changes by up to {rate:.3g}{unit} a second")
        if self.unused:
            lines += ["", f"not used: {', '.join(self.unused)}"]
        found = [f"errors: {len(self.errors)}, warnings: {len(self.findings) - len(self.errors)}"]
        return "\n".join([*lines, "", *map(str, self.findings), *found])


def check(recordings: Sequence[Recording], streams: Sequence[StreamSpec], label: Label) -> Report:
    """What is wrong with `recordings` as lessons with these streams and commands. The worst comes first."""
    findings: list[Finding] = []
    for recording in recordings:
        findings += _recording(recording, streams, label)
    for name in [*(spec.name for spec in streams), label.topic]:
        findings += _mixed(recordings, name)
    bad = {finding.path for finding in findings if finding.leaves_out == "recording"}
    usable = [recording for recording in recordings if recording.path not in bad]
    findings += _slips(usable, label)
    findings += _copies(usable, label)
    findings += _unbalanced(recordings, label, balance := _balance(recordings, label))
    topics = [(spec.name, [(r, r.topics[spec.name]) for r in recordings if spec.name in r.topics]) for spec in streams]
    topics.append((label.topic, [(r, r.topics[label.topic]) for r in recordings if label.topic in r.topics]))
    known = {name for name, _ in topics}
    others = {t.topic for r in recordings for name, t in r.topics.items() if name not in known}
    others = others.union(*(r.unused for r in recordings)) - {t.topic for _, found in topics for _, t in found}
    return Report(
        len(recordings), sum(r.end_ns - r.start_ns for r in recordings) / NS, tuple(_row(*topic) for topic in topics),
        label, balance, tuple(sorted(findings, key=lambda f: (not f.leaves_out, str(f.path), f.time_s))),
        tuple(sorted(others)),
    )  # fmt: skip


def _copies(recordings: Sequence[Recording], label: Label) -> Iterator[Finding]:
    first: dict[str, Path] = {}
    for recording in recordings:
        other = first.setdefault(identity(recording, label), recording.path)
        if other != recording.path:
            what = f"the same commands at the same times as {other}: a copy counts twice, and is no judge of the other"
            yield Finding(recording.path, 0.0, label.topic, what)


def _recording(recording: Recording, streams: Sequence[StreamSpec], label: Label) -> Iterator[Finding]:
    path, topics = recording.path, recording.topics
    if recording.error:
        yield Finding(path, 0.0, "all topics", recording.error, "recording")
        return
    yield from _refused(recording)
    seconds = (recording.end_ns - recording.start_ns) / NS
    if seconds < LEAST_S:
        yield Finding(path, 0.0, "all topics", f"an empty episode: sensors sent for {seconds:.2f} s", "recording")
        return
    used = {spec.name: spec for spec in streams}
    for name in used:
        if name not in topics or not len(topics[name].arrival_ns):
            yield Finding(path, 0.0, name, "missing, though other recordings have it")
    for name, topic in topics.items():
        if topic.kind != "command" and len(topic.arrival_ns):
            yield from _timing(recording, topic, used.get(name))
            if name not in used:
                yield Finding(path, 0.0, topic.topic, "not used, as most recordings lack it")
    yield from _labels(recording, label)


def _refused(recording: Recording) -> Iterator[Finding]:
    for topic in recording.topics.values():
        reasons: dict[str, list[tuple[int, str]]] = {}
        for at_ns, why in topic.refused:
            reasons.setdefault(why.partition(", got")[0], []).append((at_ns, why))
        for (first_ns, example), *others in reasons.values():
            what = f"{1 + len(others)} messages of no use; the first: {example}"
            what += "" if len(topic.arrival_ns) else "; none is left"
            yield Finding(recording.path, _since(recording, first_ns), topic.topic, what)


def _labels(recording: Recording, label: Label) -> Iterator[Finding]:
    path, topic = recording.path, recording.topics.get(label.topic)
    if topic is None or not len(topic.values):
        yield Finding(path, 0.0, label.topic, "missing: no commands to learn from", "recording")
        return
    if missing := sorted(set(label.names) - set(topic.names)):
        yield Finding(path, 0.0, topic.topic, f"expected {label.names}, got none for {missing}", "recording")
        return
    if topic.type_name == TRAJECTORY and (more := sorted(set(topic.names) - set(label.names))):
        yield Finding(path, 0.0, topic.topic, f"not learned, as other recordings lack it: {', '.join(more)}")
    if topic.points > 1:
        what = f"trajectories of up to {topic.points} points: the first of each is learned, as if it were due at once"
        yield Finding(path, 0.0, topic.topic, what)
    at_ns, values = commands_of(recording, label)
    bad = ~np.isfinite(values).all(axis=1)
    edges = np.concatenate([[recording.start_ns], at_ns, [recording.end_ns]])
    near, within = np.diff(edges) <= UNLABELLED_S * NS, np.clip(edges, recording.start_ns, recording.end_ns)
    labelled_s = float(np.diff(within)[:-1][near[:-1] & ~bad].sum() / NS)
    if labelled_s < LEAST_S:
        what = f"labelled for {labelled_s:.2f} s: expected finite commands, at least one every {UNLABELLED_S} s"
        yield Finding(path, 0.0, topic.topic, what, "recording")
        return
    if runs := _runs(bad):
        first, last = runs[0]
        names = [name for name, nan in zip(label.names, ~np.isfinite(values[first:last]).all(axis=0)) if nan]
        what = f"{last - first} commands in a row are not finite in {', '.join(names)}"
        more = f"; {len(runs) - 1} more, {bad.sum()} in all" if len(runs) > 1 else ""
        yield Finding(path, _since(recording, at_ns[first]), topic.topic, what + more, "ticks")
    sensors = [t.arrival_ns for t in recording.topics.values() if t.kind not in ("command", "text")]
    gaps = [(begin, end) for begin, end in pairwise(edges.tolist()) if end - begin > UNLABELLED_S * NS]
    if gaps := [(begin, end) for begin, end in gaps if any(((begin < t) & (t < end)).any() for t in sensors)]:
        (begin, end), all_ns = gaps[0], sum(end - begin for begin, end in gaps)
        what = f"unlabelled for {(end - begin) / NS:.2f} s: no command, though sensors went on"
        more = f"; {len(gaps) - 1} more, {all_ns / NS:.2f} s in all" if len(gaps) > 1 else ""
        yield Finding(path, _since(recording, begin), topic.topic, what + more, "ticks")


def _timing(recording: Recording, topic: Topic, spec: StreamSpec | None) -> Iterator[Finding]:
    path, arrival_ns = recording.path, topic.arrival_ns
    edges = np.concatenate([[recording.start_ns], arrival_ns, [recording.end_ns]])
    gaps_s, least_s = np.diff(edges) / NS, pause_s(topic.rate_hz)
    if topic.kind != "text" and (at := int(gaps_s.argmax())) >= 0 and gaps_s[at] > least_s:
        jumped = ": the clock was set, or all stood still" if gaps_s[at] > PAUSE_S else ""
        more = f"; {n - 1} more" if (n := int((gaps_s > least_s).sum())) > 1 else ""
        yield Finding(path, _since(recording, edges[at]), topic.topic, f"silent for {gaps_s[at]:.2f} s{jumped}{more}")
    if topic.kind in LIVING and (same_s := longest_s(topic.stamp_ns, topic.repeats)) > least_s:
        yield Finding(path, 0.0, topic.topic, f"the same data for {same_s:.2f} s, bit for bit: was it frozen?")
    steps_s = np.diff(arrival_ns) / NS
    steps_s = steps_s[steps_s <= least_s]
    came_hz = len(steps_s) / steps_s.sum() if steps_s.any() else topic.rate_hz
    if topic.kind != "text" and abs(came_hz - topic.rate_hz) > RATE_DIFFERS * topic.rate_hz > 0:
        what = f"{came_hz:.1f} messages a second at {topic.rate_hz:.1f} Hz: some are lost, or its rate changes"
        yield Finding(path, 0.0, topic.topic, what)
    late_s, skew_s = topic.latency_s, float(np.median(topic.latency_s))
    others = [t for t in recording.topics.values() if t is not topic and t.kind not in ("command", "text")]
    others_s = [np.median(t.latency_s) for t in others if len(t.arrival_ns)]
    jumps = np.flatnonzero(np.abs(np.diff(late_s)) > CLOCK_JUMP_S) + 1
    if len(jumps):
        what = f"its clock jumps by {late_s[jumps[0] - 1] - late_s[jumps[0]]:+.2f} s against the robot's"
        more = f"; {len(jumps) - 1} more" if len(jumps) > 1 else ""
        yield Finding(path, _since(recording, arrival_ns[jumps[0]]), topic.topic, what + more)
    elif spec and skew_s * 1e3 > spec.max_age_ms:
        what = f"skew: stamped {skew_s:.2f} s before the recording had it, of use for {spec.max_age_ms:g} ms: set its"
        yield Finding(
            path,
            0.0,
            topic.topic,
            f"{what} clock, or record with --use-sim-time if it has the simulator's",
            "recording",
        )
    elif abs(skew_s) > CLOCK_JUMP_S:
        yield Finding(path, 0.0, topic.topic, f"skew: stamped {skew_s:.2f} s before the recording had it")
    elif others_s and (behind_s := skew_s - float(np.median(others_s))) > max(LATE_S, 4 / (topic.rate_hz or np.inf)):
        yield Finding(path, 0.0, topic.topic, f"skew: stamped {behind_s:.2f} s before the other streams")
    elif len(ahead := np.flatnonzero(late_s < -FUTURE_S)):
        what = f"{len(ahead)} messages from the future, by up to {-late_s.min():.2f} s: they are refused"
        yield Finding(path, _since(recording, arrival_ns[ahead[0]]), topic.topic, what)


def _mixed(recordings: Sequence[Recording], name: str) -> Iterator[Finding]:
    found = [(r, r.topics[name]) for r in recordings if name in r.topics and len(r.topics[name].arrival_ns)]
    usual = next((topic.form for topic in alike([topic for _, topic in found])), "")
    for recording, topic in found:
        if topic.form != usual:
            what = f"expected {usual} as in other recordings, got {topic.form}"
            yield Finding(recording.path, 0.0, topic.topic, what, "recording")
    rates = [(r, t, t.rate_hz) for r, t in found if t.rate_hz and t.kind not in ("command", "text")]
    usual_hz = median_low([rate_hz for *_, rate_hz in rates]) if rates else 0.0
    for recording, topic, rate_hz in rates:
        if abs(rate_hz - usual_hz) > RATE_DIFFERS * usual_hz:
            what = f"mixed rates: {rate_hz:.1f} Hz, elsewhere {usual_hz:.1f} Hz"
            yield Finding(recording.path, 0.0, topic.topic, what, "recording")


def _balance(recordings: Sequence[Recording], label: Label) -> Balance:
    each = [values[np.isfinite(values).all(axis=1)] for _, values in (commands_of(r, label) for r in recordings)]
    values = np.concatenate(each)
    moves = np.abs(values) > STILL * np.maximum(np.abs(label.min), np.abs(label.max))
    if "angular_z" in label.names:
        standing, turn = ~moves.any(axis=1), label.names.index("angular_z")
        left, right = (float((moves[:, turn] & (sign * values[:, turn] > 0)).mean()) for sign in (1, -1))
    else:  # joints stand where they are told the same again
        same = [(np.diff(v, axis=0, prepend=np.nan * v[:1]) == 0).all(axis=1) for v in each]
        standing, left, right = np.concatenate(same), None, None
    bins = {n: np.histogram(values[:, i], 10, (label.min[i], label.max[i]))[0] for i, n in enumerate(label.names)}
    return Balance(len(values), float(standing.mean()), left, right, {n: h.tolist() for n, h in bins.items()})


def _unbalanced(recordings: Sequence[Recording], label: Label, balance: Balance) -> Iterator[Finding]:
    folder = recordings[0].path.parent
    if balance.standing > MOSTLY_STANDING:
        yield Finding(folder, 0.0, label.topic, f"label balance: standing in {balance.standing:.0%} of the commands")
    left, right = balance.left, balance.right
    if left is not None and right is not None and max(left, right) > ONE_SIDED * min(left, right):
        what = f"label balance: turns left in {left:.0%}, right in {right:.0%} of the commands"
        yield Finding(folder, 0.0, label.topic, what)
    for name, low, high in zip(label.names, label.min, label.max):
        if low == high and label.interface == "velocity":  # a joint may be held
            yield Finding(folder, 0.0, label.topic, f"label balance: {name} is always 0")


def _slips(recordings: Sequence[Recording], label: Label) -> Iterator[Finding]:
    """The greatest command of each dimension, of positions the one furthest from their median, if hardly any other
    comes near it, or those of any other recording: it would set limits and scale."""
    told = []
    for recording in recordings:
        at_ns, values = commands_of(recording, label)
        finite = np.isfinite(values).all(axis=1)
        if finite.any():
            told.append((recording, at_ns[finite], values[finite]))
    if not told:
        return
    every = np.concatenate([values for *_, values in told])
    middle = np.median(every, axis=0) if label.interface == "position" else np.zeros(len(label.names))
    for i, name in enumerate(label.names):
        sizes = np.abs(every[:, i] - middle[i])
        n, most = len(sizes), sizes.max()
        near = int((sizes > most / WILD).sum())
        if most and n >= LEAST_COMMANDS and near <= max(1, n // 100):
            recording, at_ns, values = max(told, key=lambda one: np.abs(one[2][:, i] - middle[i]).max())
            at = np.abs(values[:, i] - middle[i]).argmax()
            of = f" of {middle[i]:.3g}" if middle[i] else ""
            what = f"{name} of {values[at, i]:g}, but within {most / WILD:.3g}{of} in {n - near} of {n} commands"
            yield Finding(recording.path, _since(recording, at_ns[at]), label.topic, f"{what}: it sets the limits")
            continue
        reach = [float(np.abs(values[:, i] - middle[i]).max()) for *_, values in told]
        usual = float(np.median(reach))
        for (recording, *_), far in zip(told, reach):
            if len(told) > 2 and far > WILD * usual > 0:
                what = f"{name} as far as {far:.3g} from {middle[i]:.3g}, in other recordings {usual:.3g}"
                yield Finding(recording.path, 0.0, label.topic, f"{what}: in another unit? It sets the limits")


def _row(name: str, found: Sequence[tuple[Recording, Topic]]) -> Row:
    topics = [topic for _, topic in found if len(topic.arrival_ns)]
    if not topics:
        return Row(name, name, 0, 0, 0.0, 0.0, 0.0, 0.0)
    gaps_s = [np.diff(topic.arrival_ns).max(initial=0) / NS for topic in topics]
    late_ms = np.concatenate([topic.latency_s for topic in topics]) * 1e3
    low, middle, high = np.percentile(late_ms, [5, 50, 95])
    n, rate_hz = sum(len(topic.arrival_ns) for topic in topics), median_low([topic.rate_hz for topic in topics])
    return Row(name, topics[0].topic, len(topics), n, rate_hz, float(max(gaps_s)), float(middle), float(high - low))


def _runs(true: np.ndarray) -> list[tuple[int, int]]:
    """Where it is true for a while: from, to (not included)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], true, [0]])))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2])]


def _since(recording: Recording, at_ns: int) -> float:
    return round(max(0.0, float(int(at_ns) - recording.start_ns) / NS), 3)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of recordings: MCAP files, ROS 2 bags, ROS 1 bags")
    parser.add_argument("--label", default="", metavar="TOPIC", help=LABEL_HELP)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    try:
        recordings = find(args.folder)
        streams = streams_of(recordings)
        report = check(recordings, streams, label_of(recordings, args.label))
        if usable := report.usable(recordings):
            streams = watched(streams_of(usable), usable)
        if args.json:
            print(json.dumps({**report.as_dict(), "streams": [asdict(s) for s in streams]}, indent=2))
        else:
            tick = tick_of(streams) if streams else None
            print(report, f"ticks as {tick.anchor} comes, every {tick.period_ms:g} ms" if tick else "", sep="\n")
            if known := words_of(usable):
                print(f"words a model will know, and no others: {', '.join(known)}")
            for spec in streams:
                if spec.joints:
                    print(f"{spec.name}, whatever their order: {', '.join(spec.joints)}")
                if spec.kind in LIVING and not spec.frozen_ms:
                    stood = f"while Twists said to stand for {HALT_S + STOOD_S:g} s or longer"
                    print(f"{spec.name} is never called frozen: it was not seen to change {stood}")
                limits = {"frozen": spec.frozen_ms, "skewed": spec.max_latency_ms, "jittering": spec.max_jitter_ms}
                if called := [f"{what} beyond {ms:g} ms" for what, ms in limits.items() if ms]:
                    print(f"{spec.name}, on a robot, is called {', '.join(called)}")
    except (EdgeError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 1 if report.errors else 0


if __name__ == "__main__":
    sys.exit(main())
