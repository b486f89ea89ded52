"""Moments asked for over real ROS 2."""

import json
import subprocess
import sys

import numpy as np
import pytest
import ros  # skips this file where there is no ROS 2

cv2 = pytest.importorskip("cv2", reason="sheets are drawn with OpenCV")
pytest.importorskip("lancedb", reason="lancedb is not installed")
pytest.importorskip("rosbags", reason="rosbags is not installed")

from diagnostic_msgs.srv import AddDiagnostics
from test_search import T0, colour, record
from toy_language import write_toy_language

from mm_edge.types import NS

pytestmark = pytest.mark.real_time


@pytest.fixture
def graph(tmp_path):
    with ros.ros_graph(tmp_path / "logs") as graph:
        yield graph


def test_the_service_answers_with_moments_also_of_recordings_that_came_later(graph, tmp_path):
    def ask(what):
        answer = graph.call(AddDiagnostics, "search_node/search", load_namespace=what)
        return json.loads(answer.message) if answer.success else answer.message

    rec, sheet = tmp_path / "rec", tmp_path / "sheet.png"
    record(rec / "0", [0, 100])
    bundle = write_toy_language(tmp_path / "toy").path
    graph.nodes.start("search_node", {"recordings": rec, "bundle": bundle, "sheet": sheet})
    answer = ask("a red gnome")
    assert [m["recording"] for m in answer["moments"]] == [str(rec / "0")] and answer["unknown_words"] == ["gnome"]
    assert answer["moments"][0]["stamp_ns"] == T0 + NS and answer["sheet"] == str(sheet) and sheet.stat().st_size
    record(rec / "1", [200])
    assert [m["recording"] for m in ask("red")["moments"]] == [str(rec / "1"), str(rec / "0")]
    cv2.imwrite(str(tmp_path / "like.png"), np.ascontiguousarray(colour(100)[..., ::-1]))
    found = ask(f"file://{tmp_path / 'like.png'}")["moments"][0]
    assert found["recording"] == str(rec / "0") and found["score"] == pytest.approx(1, abs=1e-6)
    assert ask("gnomes") == "text: expected words that the model knows, got unknown ['gnomes']"
    assert "No such file" in ask("file:///nowhere.jpg")


def test_what_is_wrong_with_recordings_is_told_once_each(graph, tmp_path):
    for name in "ab":
        record(tmp_path / "rec" / name, [0])
        (tmp_path / "rec" / name / f"{name}.mcap").write_bytes(b"no recording")
    bundle = write_toy_language(tmp_path / "toy").path
    graph.nodes.start("search_node", {"recordings": tmp_path / "rec", "bundle": bundle})
    for _ in range(2):
        answer = graph.call(AddDiagnostics, "search_node/search", load_namespace="red")
        assert answer.success and json.loads(answer.message)["moments"] == []
    log = graph.nodes.log("search_node").read_text()
    assert [log.count(f"{tmp_path / 'rec' / name}: cannot be read") for name in "ab"] == [1, 1]


def test_a_single_recording_can_be_searched(graph, tmp_path):
    record(tmp_path / "rec" / "0", [0])
    record(tmp_path / "rec" / "1", [0])
    bundle = write_toy_language(tmp_path / "toy").path
    graph.nodes.start("search_node", {"recordings": tmp_path / "rec" / "0", "bundle": bundle})
    answer = graph.call(AddDiagnostics, "search_node/search", load_namespace="red")
    assert [m["recording"] for m in json.loads(answer.message)["moments"]] == [str(tmp_path / "rec" / "0")]


def test_a_folder_that_is_not_there_ends_the_node_with_one_line(tmp_path):
    command = [sys.executable, "-m", "mm_edge_ros.search_node", "--ros-args", "-p", f"recordings:={tmp_path / 'none'}"]
    done = subprocess.run(command, env=ros.ROS.env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("none: expected a recording or a folder of them, there is nothing")
