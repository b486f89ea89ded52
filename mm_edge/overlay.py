"""What the robot saw, where it looked, what it did and how old its senses were, drawn on one frame.

picture = draw(rgb, output, title="drive to the red ball")
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mm_edge.errors import needs
from mm_edge.types import NS, Action, Attention, Event, Output

MIN_WIDTH = 640  # smaller frames are enlarged to this, so that text can be read,
MAX_HEIGHT = 1280  # unless they become higher than this
BAR = 54  # height of the bar below the frame
COLUMNS, LINE = 6, 26  # tiles of words in a row; height of a line of text
MOST_VALUES = 3  # that are shown, if there are more than four
EVENT_S = 2.0  # for so long an event can be read
SHEET_COLUMNS, THUMB = 5, (320, 240)
STANDS = 0.02  # of full speed: slower than that is not shown as a way to go
INK, DIM, BAD, GOOD, AMBER, SHADE = (
    (240, 240, 240),
    (150, 150, 150),
    (255, 90, 80),
    (90, 220, 130),
    (255, 200, 60),
    (22, 24, 28),
)


def draw(rgb: np.ndarray, output: Output, title: str = "") -> np.ndarray:
    """uint8 (h, w, 3) -> uint8 (h', w', 3), RGB, the sides even as video wants them; `rgb` is not changed.

    The heat map shows the output's first attention over the whole frame; the arrow the action's first row; its events
    stand below the title; the bar below each stream's age, red if masked. Without an action the reason is written over
    the frame, or what was said or told instead: caption, values.
    Raises MissingDependency without cv2.
    """
    cv2 = _cv2()
    frame = _enlarged(cv2, rgb)
    if output.attention:
        frame = _heated(cv2, frame, output.attention[0])
    if output.action:
        _arrow(cv2, frame, output.action)
    _caption(cv2, frame, title, output)
    return np.vstack([frame, _bar(cv2, frame.shape[1], output)])


class Lingering:
    """Outputs one after the other -> the same, but an event stands until the next, for EVENT_S at most: a tick is too
    short to read it."""

    def __init__(self) -> None:
        self._events, self._since_ns = tuple[Event, ...](), 0

    def __call__(self, output: Output) -> Output:
        if output.events:
            self._events, self._since_ns = output.events, output.stamp_ns
        elif not 0 <= output.stamp_ns - self._since_ns < EVENT_S * NS:
            self._events = ()
        return replace(output, events=self._events)


def draw_words(
    rgb: np.ndarray, text: str, words: Sequence[tuple[str, np.ndarray | None]], question: str = ""
) -> np.ndarray:
    """What was said of a frame, uint8 (h, w, 3) -> uint8 (h', w', 3), RGB, the sides even; `rgb` is not changed.

    Below the frame stand the question, if it was one, and the text; below those a tile for each of its words, with
    where the model looked as it said it: weights (rows, cols), if any are known. A single word's are shown on the
    frame itself. Raises MissingDependency without cv2.
    """
    cv2 = _cv2()
    frame = _enlarged(cv2, rgb)
    height, width = frame.shape[:2]
    rows = [_text(cv2, width, question, DIM)] if question else []
    rows += [_text(cv2, width, text, INK)]
    if len(words) == 1 and words[0][1] is not None:
        frame = _heated(cv2, frame, Attention("", 0, words[0][1]))
    elif any(weights is not None for _, weights in words):
        tile = cv2.resize(frame, (width // COLUMNS, max(1, height // COLUMNS)), interpolation=cv2.INTER_AREA)
        for i in range(0, len(words), COLUMNS):
            row = np.full((len(tile) + LINE, width, 3), SHADE, np.uint8)
            for x, (word, weights) in zip(range(0, width, tile.shape[1]), words[i : i + COLUMNS]):
                cell = row[:, x : x + tile.shape[1]]
                shown = tile if weights is None else _heated(cv2, tile, Attention("", 0, weights))
                cell[: len(tile), 1:-1] = shown[:, 1:-1]
                _write(cv2, cell, word, (6, len(tile) + 17), INK, 0.45)
            rows.append(row)
    picture = np.vstack([frame, *rows])
    return picture[: len(picture) // 2 * 2]


def draw_sheet(pictures: Sequence[tuple[np.ndarray, str, str]], title: str) -> np.ndarray:
    """Pictures, each uint8 (h, w, 3) with two lines for below it, in rows -> uint8 (h', w', 3), RGB.
    Raises MissingDependency without cv2."""
    cv2 = _cv2()
    columns = min(SHEET_COLUMNS, len(pictures))
    (width, height), foot, gap = THUMB, 2 * LINE - 8, 12
    size = (LINE + gap + -(-len(pictures) // columns) * (height + foot + gap), gap + columns * (width + gap))
    sheet = np.full((*size, 3), SHADE, np.uint8)
    _write(cv2, sheet, title, (gap, 25), INK, 0.6)
    for i, (rgb, line, small_line) in enumerate(pictures):
        y, x = LINE + gap + i // columns * (height + foot + gap), gap + i % columns * (width + gap)
        cell = sheet[y : y + height + foot, x : x + width]
        scale = min(width / rgb.shape[1], height / rgb.shape[0])
        w, h = max(1, round(scale * rgb.shape[1])), max(1, round(scale * rgb.shape[0]))
        thumb = cv2.resize(rgb, (w, h), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
        cell[height - h : height, (width - w) // 2 :][:, :w] = thumb
        _write(cv2, cell, line, (2, height + 18), INK)
        _write(cv2, cell, small_line, (2, height + 37), DIM, 0.45)
    return sheet


def in_words(values: dict[str, float]) -> str:
    """Values by their names; of many, the greatest."""
    shown = sorted(values.items(), key=lambda item: -item[1])[:MOST_VALUES] if len(values) > 4 else values.items()
    return ", ".join(f"{name} {value:.2f}" for name, value in shown)


def _enlarged(cv2, rgb: np.ndarray) -> np.ndarray:
    scale = max(1.0, min(MIN_WIDTH / rgb.shape[1], MAX_HEIGHT / rgb.shape[0]))
    width, height = (max(2, 2 * round(n * scale / 2)) for n in rgb.shape[1::-1])
    return cv2.resize(rgb, (width, height), interpolation=cv2.INTER_CUBIC)


def _heated(cv2, frame: np.ndarray, attention: Attention) -> np.ndarray:
    colour, opacity = heat_map(attention, frame.shape[1], frame.shape[0])
    return cv2.blendLinear(colour, frame, opacity, 1 - opacity)


def _text(cv2, width: int, text: str, colour: tuple[int, int, int]) -> np.ndarray:
    """In as many lines as it takes, up to four."""
    lines, line = list[str](), ""
    for word in text.split() or ["-"]:
        if line and _width(cv2, f"{line} {word}", 0.6) > width - 24:
            lines, line = [*lines, line], word
        else:
            line = f"{line} {word}".strip()
    lines = [*lines, line]
    lines = [*lines[:3], " ".join(lines[3:])] if len(lines) > 4 else lines
    strip = np.full((LINE * len(lines) + 8, width, 3), SHADE, np.uint8)
    for i, line in enumerate(lines):
        _write(cv2, strip, line, (12, LINE * i + 22), colour, 0.6)
    return strip


def heat_map(attention: Attention, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Its colours, uint8 (height, width, 3), RGB, and how much of them is to be seen, float32 (height, width), 0 to 1.
    Even attention is nowhere to be seen; the peak glows. Raises MissingDependency without cv2."""
    cv2 = _cv2()
    weights = attention.weights
    excess = np.clip(weights * weights.size - 1, 0, None)  # times above the mean
    excess = excess / max(float(excess.max()), 1.0)
    heat = cv2.resize(excess.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    heat = np.clip(heat, 0, 1)
    colour = cv2.applyColorMap((105 + 150 * heat).astype(np.uint8), cv2.COLORMAP_INFERNO)
    return cv2.cvtColor(colour, cv2.COLOR_BGR2RGB), 0.7 * heat


def _cv2() -> Any:
    with needs("drawing overlays", "cv2", "camera"):
        import cv2
    return cv2


def _arrow(cv2, frame: np.ndarray, action: Action) -> None:
    """The way the first row of the action leads, bent as the robot would turn, none if it stands; of joints their
    positions in words."""
    values = dict(zip(action.names, action.values[0].tolist()))
    if "linear_x" not in values and "angular_z" not in values:
        label = "  ".join(f"{name} {value:+.2f}" for name, value in values.items())
        _write(cv2, frame, label, (12, frame.shape[0] - 12), INK)
        return
    v, w = values.get("linear_x", 0.0), values.get("angular_z", 0.0)
    height, width = frame.shape[:2]
    label = f"{v:+.2f} m/s  {w:+.2f} rad/s"
    _write(cv2, frame, label, (width - _width(cv2, label, 0.5) - 12, height - 12), INK)
    if max(abs(v) / 0.6, abs(w) / 1.8) < STANDS:
        return
    t = np.linspace(0, 1, 24)
    length = height * (0.12 + 0.45 * min(abs(v) / 0.6, 1.0)) * (1 if v >= 0 else -1)
    turn = np.clip(w / 1.8, -1, 1) * math.radians(80) * t
    step = length / len(t)
    x = width / 2 - np.cumsum(np.sin(turn)) * step
    y = height * (0.96 if v >= 0 else 0.6) - np.cumsum(np.cos(turn)) * step
    path = np.stack([x, y], axis=1)
    along = (path[-1] - path[-2]) / abs(step)
    across = along[::-1] * (-1, 1)
    for ink, thick in ((SHADE, 9), (GOOD if v >= 0 else AMBER, 5)):
        size = 13 + thick / 2
        head = path[-1] + np.stack([along * size, across * size * 0.7, across * size * -0.7])
        cv2.polylines(frame, [(16 * path).astype(np.int32)], False, ink, thick, cv2.LINE_AA, shift=4)
        cv2.fillPoly(frame, [head.astype(np.int32)], ink, cv2.LINE_AA)


def _caption(cv2, frame: np.ndarray, title: str, output: Output) -> None:
    if title:
        _write(cv2, frame, title, (12, 26), INK, 0.62)
    if output.events:
        told = ", ".join(f"{event.label} {event.score:.2f}" for event in output.events)
        _write(cv2, frame, told, (12, 56), GOOD, 0.75)
    line = frame.shape[0] - 12
    said = output.caption.text if output.caption else in_words(output.values)
    if output.action is None and (output.reasons or not said):
        _write(cv2, frame, "NO ACTION: " + ("; ".join(output.reasons) or "no reason given"), (12, line), BAD)
    elif said:
        _write(cv2, frame, said, (12, line), INK)
    elif output.notes:
        _write(cv2, frame, output.notes[0], (12, line), AMBER, 0.42)


def _bar(cv2, width: int, output: Output) -> np.ndarray:
    bar = np.full((BAR, width, 3), SHADE, np.uint8)
    cell = width / max(len(output.mask), 1)
    for i, (name, present) in enumerate(output.mask.items()):
        x, age_s = round(i * cell) + 12, output.ages_s.get(name, math.inf)
        cv2.circle(bar, (x + 5, 19), 5, GOOD if present else BAD, -1, cv2.LINE_AA)
        _write(cv2, bar, name, (x + 17, 24), INK if present else BAD, 0.48)
        age = "never seen" if math.isinf(age_s) else f"{age_s * 1e3:.0f} ms" if age_s < 10 else f"{age_s:.0f} s"
        _write(
            cv2,
            bar,
            age if present or math.isinf(age_s) else f"missing, {age}",
            (x + 17, 43),
            DIM if present else BAD,
            0.4,
        )
        if name in output.gates:
            share = min(max(output.gates[name], 0.0), 1.0)
            cv2.rectangle(bar, (x, BAR - 4), (x + round(share * (cell - 24)), BAR - 2), GOOD if present else DIM, -1)
    return bar


def _write(
    cv2, image: np.ndarray, text: str, at: tuple[int, int], colour: tuple[int, int, int], size: float = 0.5
) -> None:
    text = text[:1000].encode("ascii", "replace").decode()  # what the font of cv2 has, and a wide frame has room for
    room = image.shape[1] - at[0] - 8
    while text and _width(cv2, text, size) > room:
        text = text[:-4] + "..." if len(text) > 6 else ""
    # An outline by shifted copies: a thicker stroke makes the letters of some fonts wider.
    for x, y, ink in (*((dx, dy, SHADE) for dx in (-1, 0, 1) for dy in (-1, 0, 1)), (0, 0, colour)):
        cv2.putText(image, text, (at[0] + x, at[1] + y), cv2.FONT_HERSHEY_SIMPLEX, size, ink, 1, cv2.LINE_AA)


def _width(cv2, text: str, size: float) -> int:
    return cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size, 1)[0][0]
