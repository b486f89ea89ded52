"""Frames of a drive as a video and as one picture.

clip = Clip(Path("out"))
clip.add(rgb, episode=0)
video, strip = clip.close()
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mm_edge.errors import EdgeError, disk_is_full, needs

FPS = 15.0
CODECS = (("mp4v", ".mp4"), ("MJPG", ".avi"))  # a cv2 without ffmpeg still has the second
FILES = ("clip.mp4", "clip.avi", "strip.png")
COLUMNS = 5
SETTLED_FRAMES = 6
THUMB = 320  # pixels wide


class Video:
    """Writes a video of the first frame's size to `path`, which ends with .avi where this cv2 cannot write .mp4.

    Raises MissingDependency without cv2, EdgeError if no video can be written.
    """

    def __init__(self, path: Path, fps: float):
        with needs("writing a video", "cv2", "camera"):
            import cv2
        if not path.parent.is_dir():
            raise EdgeError(f"{path}: there is no folder {path.parent}")
        self._cv2 = cv2
        self.path, self._fps = path, fps
        self._writer: Any = None
        self._size = (0, 0)

    def add(self, rgb: np.ndarray) -> None:
        """uint8 (h, w, 3)."""
        if self._writer is None:
            self._open(rgb.shape[1], rgb.shape[0])
        bgr = np.ascontiguousarray(rgb[..., ::-1])
        self._writer.write(bgr if rgb.shape[1::-1] == self._size else self._cv2.resize(bgr, self._size))

    def close(self) -> list[Path]:
        """The file written; none if there was no frame."""
        if self._writer is None:
            return []
        self._writer.release()
        if disk_is_full(self.path.parent):  # cv2 says nothing of it
            raise EdgeError(f"{self.path}: cut short: its disk is full")
        return [self.path]

    def _open(self, width: int, height: int) -> None:
        self._size = (width, height)
        for codec, suffix in CODECS:
            path = self.path.with_suffix(suffix)
            self._writer = self._cv2.VideoWriter(str(path), self._cv2.VideoWriter.fourcc(*codec), self._fps, self._size)
            if self._writer.isOpened():
                self.path = path
                return
        raise EdgeError(
            f"{self.path}: this cv2 writes none of {[codec for codec, _ in CODECS]}, or the folder is read-only"
        )


class Clip:
    """Writes `clip.mp4` (or .avi) and `strip.png`, one row an episode, into `folder`. Raises as `Video` does."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._video = Video(folder / "clip.mp4", FPS)
        import cv2

        self._cv2 = cv2
        self._folder = folder
        self._episodes: dict[int, _Thumbs] = {}

    def add(self, rgb: np.ndarray, episode: int) -> None:
        """uint8 (h, w, 3). The first frame's size is the video's."""
        self._video.add(rgb)
        height = round(THUMB * rgb.shape[0] / rgb.shape[1])
        bgr = np.ascontiguousarray(rgb[..., ::-1])
        thumb = self._cv2.resize(bgr, (THUMB, height), interpolation=self._cv2.INTER_AREA)
        self._episodes.setdefault(episode, _Thumbs()).add(thumb)

    def close(self) -> list[Path]:
        """The files written: the video, then the strip; none if there was no frame."""
        if not (written := self._video.close()):
            return []
        height = max(thumbs.frames[0].shape[0] for thumbs in self._episodes.values())
        rows = [
            np.hstack([self._cv2.resize(frame, (THUMB, height)) for frame in thumbs.spread(COLUMNS)])
            for thumbs in self._episodes.values()
        ]
        strip = self._folder / "strip.png"
        if not self._cv2.imwrite(str(strip), np.vstack(rows)):
            raise EdgeError(f"{strip}: cannot be written")
        return [*written, strip]


class _Thumbs:
    """Frames spread evenly over an episode of unknown length: when there are too many, every other one goes."""

    def __init__(self) -> None:
        self.frames: list[np.ndarray] = []
        self._every = 1
        self._seen = 0

    def add(self, frame: np.ndarray) -> None:
        if self._seen % self._every == 0:
            self.frames.append(frame)
        self._seen += 1
        if len(self.frames) == 64:
            self.frames, self._every = self.frames[::2], self._every * 2

    def spread(self, n: int) -> list[np.ndarray]:
        """n of them, the last among them, and the first by when every sense has spoken."""
        first = min(SETTLED_FRAMES // self._every, len(self.frames) - 1)
        return [self.frames[round(i)] for i in np.linspace(first, len(self.frames) - 1, n)]
