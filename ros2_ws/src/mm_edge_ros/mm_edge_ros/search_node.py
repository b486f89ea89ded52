"""Finds moments in a folder of recordings, for whoever asks: the service `~/search`.

It is a diagnostic_msgs/srv/AddDiagnostics, as the one service with a text in, and success and a text out, that every
ROS 2 has installed: `load_namespace` is what to look for, words or `file:///a/picture.jpg`, and `message` the moments
as JSON, or why there are none.

    ros2 service call /search_node/search diagnostic_msgs/srv/AddDiagnostics '{load_namespace: a red ball}'
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from diagnostic_msgs.srv import AddDiagnostics
from rclpy.node import Node

from mm_edge.bundle import SHIPPED_VLM
from mm_edge.errors import EdgeError
from mm_edge.language import Language
from mm_edge.search import Index, found, picture, write_sheet
from mm_edge_ros.node import declare, run

NICE = 10


class SearchNode(Node):
    """Recordings that came since the last question are read before the next is answered."""

    def __init__(self):
        super().__init__("search_node")
        self._path = Path(declare(self, "recordings", "", "folder of recordings, or one recording"))
        bundle = declare(self, "bundle", "", "folder of the model; empty: the shipped one") or SHIPPED_VLM
        self._top = declare(self, "top", 10, "how many moments at most")
        self._sheet = declare(self, "sheet", "", "picture to write, of the moments found last; empty: none")
        if not self._path.is_absolute():
            raise EdgeError(f"recordings: expected a folder from the root on, got '{self._path}'")
        if self._top < 1:
            raise EdgeError(f"top: expected at least 1 moment, got {self._top}")
        (folder,) = found([self._path])
        self._language = Language(bundle)
        self._index = Index(folder, self._language)
        self._told: set[str] = set()  # what is wrong with recordings
        self._update()
        self.create_service(AddDiagnostics, "~/search", self._on_search)
        self.get_logger().info("ready")

    def _update(self) -> list[Path]:
        (recordings,) = found([self._path]).values()
        if new := self._index.outdated(recordings):
            self.get_logger().info(f"{self._index.path}: reading {len(new)} of {len(recordings)} recordings")
        troubles = {*self._index.update(recordings)}
        for trouble in sorted(troubles - self._told):
            self.get_logger().warning(trouble)
        self._told = troubles
        return recordings

    def _on_search(self, request: AddDiagnostics.Request, response: AddDiagnostics.Response) -> AddDiagnostics.Response:
        try:
            response.message, response.success = self._answer(request.load_namespace), True
        except Exception as error:  # whatever it is: one question must not end the node
            known = isinstance(error, (EdgeError, OSError))
            response.message = str(error) if known else f"{type(error).__name__}: {error}"
            response.success = False
        return response

    def _answer(self, asked: str) -> str:
        unknown = list[str]()
        if asked.startswith("file://"):
            self._language.look(picture(asked.removeprefix("file://")))
            query = self._language.seen()
        else:
            query, unknown = self._language.embed(asked, lenient=True), self._language.unknown(asked)
        moments = self._index.search(query, self._update(), self._top)
        if self._sheet and moments:
            write_sheet(self._sheet, moments, self._language, asked)
        answer = {"sheet": self._sheet, "unknown_words": unknown, "moments": [m._asdict() for m in moments]}
        return json.dumps(answer)


def main() -> None:
    os.nice(NICE)  # the robot comes first
    run(SearchNode)


if __name__ == "__main__":
    main()
