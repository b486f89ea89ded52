"""The caption node as a process, over real DDS: what it says of a camera's frames, and when, and what it is asked."""

import json
import math
import os
import subprocess
import sys
import time
from itertools import cycle, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import ros  # skips this file where there is no ROS 2
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import Image
from std_msgs.msg import String
from test_ros import BEST_EFFORT, LATCHED
from toy_bundle import write_toy_bundle
from toy_language import BLUE, RED, write_toy_language

from mm_edge.messages import to_ros

pytestmark = pytest.mark.real_time

KEPT = QoSProfile(depth=20, durability=DurabilityPolicy.TRANSIENT_LOCAL)
WARN, ERROR = b"\x01", b"\x02"


@pytest.fixture
def graph(tmp_path):
    with ros.ros_graph(tmp_path / "logs") as graph:
        yield graph


@pytest.fixture
def toy(tmp_path):
    write_toy_language(tmp_path / "toy")
    return tmp_path / "toy"


class Camera:
    """A picture at 10 Hz while this process waits, once the node is heard, and what is said of it."""

    def __init__(self, graph, picture=RED, topic="image"):
        self.picture, self.heard = picture, False
        self.publisher = graph.node.create_publisher(Image, topic, BEST_EFFORT)
        self.outputs = graph.subscribe(String, "caption/output")
        self.texts = graph.subscribe(String, "caption")
        self.tokens = graph.subscribe(String, "caption/token")
        self.answers = graph.subscribe(String, "answer")
        self.diagnostics = graph.subscribe(DiagnosticArray, "/diagnostics")
        self.timer = graph.node.create_timer(0.1, self.feed)

    def feed(self):
        self.heard = self.heard or len(self.outputs) > 2
        if not self.heard:
            return
        msg = Image()
        to_ros("image", msg, time.time_ns(), self.picture)
        self.publisher.publish(msg)

    def said(self):
        return [msg.data for msg in self.texts]

    def captions(self):
        """The outputs with one."""
        outputs = [SimpleNamespace(**json.loads(msg.data)) for msg in self.outputs]
        return [output for output in outputs if output.caption]

    def replies(self):
        """Question -> the last reply to it."""
        return {reply["question"]: SimpleNamespace(**reply) for reply in (json.loads(m.data) for m in self.answers)}

    def model(self):
        """The latest diagnostics of the model, once there are values."""
        for msg in reversed(self.diagnostics):
            for status in msg.status:
                if status.name.endswith("caption_node: model") and status.values:
                    values = {pair.key: pair.value for pair in status.values}
                    return SimpleNamespace(level=status.level, message=status.message, **values)
        return None


def ask(graph, *questions):
    publisher = graph.node.create_publisher(String, "question", KEPT)
    graph.wait(publisher.get_subscription_count, "node that listens")
    for question in questions:
        publisher.publish(String(data=question))
    return publisher


def test_a_caption_comes_when_the_scene_changes_and_not_before(graph, toy):
    node, camera = graph.nodes.start("caption_node", {"bundle": toy}), Camera(graph)
    graph.wait(camera.captions, "caption")
    camera.outputs.clear()
    graph.wait(lambda: len(camera.outputs) > 10, "ticks without anything new")
    assert camera.said() == ["a red ball"] and not camera.captions()
    camera.picture = BLUE
    graph.wait(lambda: camera.said() == ["a red ball", "a blue ball"], "caption of what is new")
    (output,) = graph.wait(camera.captions, "output")
    assert output.caption["text"] == "a blue ball" and 0.99 < output.caption["score"] < 1
    assert output.mask == {"camera": True} and output.ages_s["camera"] < 0.3 and not output.reasons
    assert os.getpriority(os.PRIO_PROCESS, node.pid) == os.getpriority(os.PRIO_PROCESS, 0) + 10


def test_each_token_is_told_as_it_is_said(graph, toy):
    graph.nodes.start("caption_node", {"bundle": toy})
    camera = Camera(graph)
    graph.wait(camera.captions, "caption")
    graph.wait(lambda: len(camera.tokens) == 3, "tokens")
    tokens, stamp_ns = [json.loads(msg.data) for msg in camera.tokens], camera.captions()[0].sources["camera"]
    assert [(token["token"], token["text"]) for token in tokens] == [
        ("a", "a"), (" red", "a red"), (" ball", "a red ball"),
    ]  # fmt: skip
    assert {(token["kind"], token["question"], token["stamp_ns"]) for token in tokens} == {("caption", None, stamp_ns)}


def test_captions_come_at_a_set_rate_whether_or_not_the_scene_changes(graph, toy):
    graph.nodes.start("caption_node", {"bundle": toy, "rate_hz": 4.0, "change": 2.0})
    camera = Camera(graph)
    captions = graph.wait(lambda: len(camera.captions()) > 8 and camera.captions(), "captions")
    stamps_s = [output.sources["camera"] / 1e9 for output in captions]
    assert 8 / 4 - 0.15 <= stamps_s[8] - stamps_s[0] < 2 * 8 / 4  # to a frame
    assert stamps_s[1] - stamps_s[0] > 0.15  # also the first two


def test_a_bundle_without_embeddings_compares_the_pictures(graph, tmp_path):
    write_toy_language(tmp_path / "toy", embedding=False)
    graph.nodes.start("caption_node", {"bundle": tmp_path / "toy"})
    camera = Camera(graph)
    graph.wait(lambda: len(camera.said()) == 1, "caption")
    camera.picture = RED + np.uint8(20)
    camera.outputs.clear()
    graph.wait(lambda: len(camera.outputs) > 10, "ticks")
    assert len(camera.said()) == 1
    # Infinite until the first caption, and diagnostics come once a second: the latest may still be of then.
    told = graph.wait(lambda: (m := camera.model()) and 0.05 < float(m.change) < math.inf and m, "change")
    assert told.change == "0.0784"
    camera.picture = RED // 2
    graph.wait(lambda: len(camera.said()) == 2, "caption of what is darker")


def test_a_question_is_answered_by_name_with_the_stamp_of_its_frame(graph, toy):
    graph.nodes.start("caption_node", {"bundle": toy})
    camera = Camera(graph)
    graph.wait(camera.captions, "caption")
    camera.picture = BLUE
    graph.wait(lambda: len(camera.captions()) == 2, "caption of what is new")
    asked_ns = time.time_ns()
    ask(graph, "is it red")
    reply = graph.wait(camera.replies, "answer")["is it red"]
    assert (reply.answer, reply.reason) == ("no", "") and reply.score > 0.9
    assert asked_ns - 0.3e9 < reply.stamp_ns < time.time_ns()
    tokens = [json.loads(msg.data) for msg in camera.tokens]
    assert [t["text"] for t in tokens if t["kind"] == "answer" and t["question"] == "is it red"] == ["no"]


def test_a_question_asked_before_the_node_was_there_is_answered_to_who_comes_later(graph, toy):
    graph.node.create_publisher(String, "question", LATCHED).publish(String(data="is it red"))
    graph.nodes.start("caption_node", {"bundle": toy})
    camera = Camera(graph)
    graph.wait(camera.replies, "answer")
    late = graph.subscribe(String, "answer", LATCHED)
    assert json.loads(graph.wait(lambda: late, "answer that is kept")[0].data)["answer"] == "yes"


def test_whoever_keeps_no_question_is_heard_too(graph, toy):
    graph.nodes.start("caption_node", {"bundle": toy})
    camera = Camera(graph)
    publisher = graph.node.create_publisher(String, "question", BEST_EFFORT)
    graph.node.create_timer(0.2, lambda: publisher.publish(String(data="is it red")))
    assert graph.wait(camera.replies, "answer")["is it red"].answer == "yes"


def test_no_question_is_too_odd_for_an_answer(graph, toy):
    graph.nodes.start("caption_node", {"bundle": toy})
    camera = Camera(graph)
    odd = {
        "": "text: expected some words, got ''",
        "\x07\x1b \t": r"text: expected some words, got '\x07\x1b \t'",
        "x" * 5000: "text: expected at most 1000 characters, got 5000",
        "它是红色的吗": "text: expected words that the model knows, got unknown ['它是红色的吗']",
        "is it Purple?": "text: expected words that the model knows, got unknown ['purple']",
        "is it " * 20: "text: expected less than 12 tokens with the prompt, got 42",
    }
    ask(graph, *odd, "Is\x1b it\n red?")
    replies = graph.wait(lambda: len(camera.replies()) == 7 and camera.replies(), "answers")
    assert {question: reply.reason for question, reply in replies.items() if reply.answer is None} == odd
    assert {reply.stamp_ns for reply in replies.values() if reply.answer is None} == {None}
    assert replies["Is\x1b it\n red?"].answer == "yes"
    graph.wait(camera.captions, "caption after all that")


def test_eight_questions_wait_for_a_frame_and_then_hear_why_there_is_none(graph, toy):
    graph.nodes.start("caption_node", {"bundle": toy})
    camera = Camera(graph)
    camera.timer.cancel()
    words = ["is", "it", "red", "blue", "ball", "a", "yes", "no", "is it", "it is"]
    ask(graph, *words[:4], *words)
    graph.wait(lambda: len(camera.replies()) == 2, "answers to those that waited longest")
    crowd = "more than 8 questions wait, and newer ones go first"
    assert {q: (r.answer, r.reason) for q, r in camera.replies().items()} == dict.fromkeys(words[:2], (None, crowd))
    replies = graph.wait(lambda: len(camera.replies()) == 10 and camera.replies(), "answers to all")
    assert {replies[word].reason for word in words[2:]} == {"warming up: no sensor seen yet"}
    model = graph.wait(camera.model, "diagnostics")
    assert model.level == WARN and "warming up: no sensor seen yet" in model.message
    assert not camera.said() and json.loads(camera.outputs[-1].data)["reasons"] == ["warming up: no sensor seen yet"]


def test_who_repeats_a_question_hears_too_why_there_is_no_answer(graph, toy):
    graph.nodes.start("caption_node", {"bundle": toy})
    camera = Camera(graph)
    camera.timer.cancel()
    publisher = ask(graph)
    graph.node.create_timer(0.5, lambda: publisher.publish(String(data="is it red")))
    assert graph.wait(camera.replies, "answer")["is it red"].reason == "warming up: no sensor seen yet"


def test_of_a_stale_frame_nothing_is_said(graph, toy):
    graph.nodes.start("caption_node", {"bundle": toy, "rate_hz": 100.0})
    camera = Camera(graph)
    graph.wait(camera.captions, "caption")
    camera.timer.cancel()
    graph.wait(lambda: "no sensor is present" in json.loads(camera.outputs[-1].data)["reasons"], "reason")
    assert all(output.ages_s["camera"] <= 0.3 for output in camera.captions())
    camera.outputs.clear()
    publisher = ask(graph, "is it red")
    assert graph.wait(camera.replies, "answer")["is it red"].reason == "no sensor is present"
    assert camera.outputs and not camera.captions()
    camera.timer.reset()
    publisher.publish(String(data="is it red"))
    graph.wait(lambda: camera.replies()["is it red"].answer == "yes", "answer of a frame that is new")


def test_a_decoder_that_fails_is_told_to_who_asks_and_in_diagnostics(graph, toy):
    graph.nodes.start("caption_node", {"bundle": toy})
    camera = Camera(graph, np.full((8, 8, 3), (255, 0, 0), np.uint8))
    why = f"{toy}: the decoder's logits are not finite"
    graph.wait(lambda: camera.outputs and json.loads(camera.outputs[-1].data)["reasons"] == [why], "reason")
    ask(graph, "is it red")
    reply = graph.wait(camera.replies, "answer")["is it red"]
    assert (reply.answer, reply.reason) == (None, why)
    graph.wait(lambda: (m := camera.model()) and m.level == ERROR and m.message == why, "diagnostics")
    camera.picture = RED
    graph.wait(camera.captions, "caption of a picture that it can bear")


def test_who_asks_of_a_frame_that_the_model_makes_nothing_of_is_told_so(graph, toy):
    """A black one: its embedding is 0 / 0."""
    graph.nodes.start("caption_node", {"bundle": toy})
    camera = Camera(graph, 0 * RED)
    ask(graph, "is it red")
    why = f"{toy}: expected an embedding of length 1, got one of nan"
    assert graph.wait(camera.replies, "answer")["is it red"].reason == why
    assert json.loads(camera.outputs[-1].data)["reasons"] == [why] and not camera.said()


def test_who_waits_is_told_when_the_node_is_deactivated(graph, toy):
    graph.nodes.start("caption_node", {"bundle": toy})
    camera = Camera(graph)
    camera.timer.cancel()
    ask(graph, "is it red")
    graph.wait(lambda: (m := camera.model()) and m.questions_waiting == "1", "diagnostics")
    transition = Transition(id=Transition.TRANSITION_DEACTIVATE)
    assert graph.call(ChangeState, "caption_node/change_state", transition=transition).success
    assert graph.wait(camera.replies, "answer")["is it red"].reason == "the node was deactivated"


def test_labels_are_scored_and_can_be_changed_but_not_to_what_cannot_be_read(graph, toy):
    graph.nodes.start("caption_node", {"bundle": toy, "labels": ["a red ball", "a blue ball"]})
    camera, scores = Camera(graph), graph.subscribe(String, "labels")

    def choose(*labels):
        value = ParameterValue(type=ParameterType.PARAMETER_STRING_ARRAY, string_array_value=labels)
        return graph.call(
            SetParameters, "caption_node/set_parameters", parameters=[Parameter(name="labels", value=value)]
        ).results[0]

    first = json.loads(graph.wait(lambda: scores, "scores")[0].data)
    assert first["scores"] == pytest.approx({"a red ball": 0.9993, "a blue ball": 0.0007}, abs=1e-4)
    assert graph.wait(camera.captions, "caption")[0].sources["camera"] >= first["stamp_ns"] > time.time_ns() - 60e9
    for labels, reason in {
        ("a red ball", "an elephant"): "text: expected words that the model knows, got unknown ['an', 'elephant']",
        ("red", ""): "text: expected some words, got ''",
        ("red", "red"): "labels: expected at most 256, each once, got 2",
        ("is it " * 10,): "text: expected at most 12 tokens, got 20",
    }.items():
        refusal = choose(*labels)
        assert not refusal.successful and refusal.reason == reason
    assert choose("red", "blue", "a ball").successful
    scores.clear()
    graph.wait(lambda: scores and json.loads(scores[-1].data)["scores"].keys() == {"red", "blue", "a ball"}, "scores")
    assert choose().successful
    graph.wait(lambda: len(camera.outputs) > 3, "ticks")
    scores.clear()
    camera.outputs.clear()
    graph.wait(lambda: len(camera.outputs) > 3, "ticks without labels")
    assert not scores


def test_whoever_looks_sees_the_last_caption_on_its_frame(graph, toy):
    graph.nodes.start("caption_node", {"bundle": toy})
    camera = Camera(graph)
    graph.wait(camera.captions, "caption")
    camera.picture = BLUE
    graph.wait(lambda: len(camera.captions()) == 2, "caption of what is new")
    pictures, ticks = graph.subscribe(Image, "caption/overlay", BEST_EFFORT), len(camera.outputs)
    graph.wait(lambda: pictures, "overlay")
    graph.wait(lambda: len(camera.outputs) > ticks + 5, "ticks without anything new")
    (picture,) = pictures
    assert picture.header.stamp.sec * 10**9 + picture.header.stamp.nanosec == camera.captions()[1].sources["camera"]
    assert picture.width == 640 and picture.height > 640  # with a row of words below the frame
    ask(graph, "is it blue")
    graph.wait(lambda: len(pictures) == 2, "overlay of the answer")


def slow(graph, toy, parameters, token_s=0.2):
    """The node with a decoder that takes so long for a token."""
    code = f"""if True:
        import time
        from mm_edge.engine.decoder import Decoder
        from mm_edge_ros.caption_node import main
        feed = Decoder.feed
        Decoder.feed = lambda *args: (time.sleep({token_s}), feed(*args))[1]
        main()"""
    given = [a for pair in ({"bundle": toy} | parameters).items() for a in ("-p", "{}:={}".format(*pair))]
    return subprocess.Popen([sys.executable, "-c", code, "--ros-args", *given], env=graph.nodes.env)


def test_a_slow_model_skips_frames_and_never_queues_them(graph, toy):
    node = slow(graph, toy, {"rate_hz": 100.0})
    try:
        camera = Camera(graph)
        captions = graph.wait(lambda: len(camera.captions()) > 4 and camera.captions(), "captions", 30)
        stamps_s = [output.sources["camera"] / 1e9 for output in captions]
        assert all(after - before > 0.6 for before, after in pairwise(stamps_s))  # of frames that come each 0.1 s
        assert np.median([output.ages_s["camera"] for output in captions]) < 0.2
        model = graph.wait(lambda: (m := camera.model()) and int(m.captions) > 4 and m, "diagnostics")
        assert int(model.frames_skipped) > 20
        assert float(model.time_to_first_token_p50_ms) > 200 and 4 < float(model.tokens_per_s) <= 5
        assert "inference hangs" not in str(camera.diagnostics)
    finally:
        node.kill()
        node.wait()


def test_a_caption_gives_way_to_a_question(graph, toy):
    node = slow(graph, toy, {"rate_hz": 100.0}, token_s=0.5)
    try:
        camera = Camera(graph)
        graph.wait(lambda: camera.tokens, "first token of a caption", 30)
        ask(graph, "is it red")
        graph.wait(camera.replies, "answer", 30)
        texts = [json.loads(msg.data)["text"] for msg in camera.tokens]
        before = texts[: texts.index("yes")]
        assert before[-1] in ("a", "a red", "a red ball") and camera.replies()["is it red"].answer == "yes"
        captions = len(camera.said())
        assert before.count("a") == captions + 1  # one was begun and given up
        graph.wait(lambda: len(camera.said()) > captions, "caption after the answer", 30)
    finally:
        node.kill()
        node.wait()


def test_who_asks_without_end_leaves_time_for_captions(graph, toy):
    node, texts = slow(graph, toy, {"rate_hz": 100.0}, token_s=0.1), cycle(["is it red", "is it blue"])
    try:
        camera = Camera(graph)
        publisher = ask(graph)
        graph.node.create_timer(0.1, lambda: publisher.publish(String(data=next(texts))))
        graph.wait(lambda: len(camera.answers) > 1, "answers", 30)
        captions, answers = len(camera.said()), len(camera.answers)
        graph.wait(lambda: len(camera.said()) > captions + 2, "captions between answers", 30)
        assert len(camera.answers) > answers + 1
    finally:
        node.kill()
        node.wait()


def test_a_bundle_without_words_is_refused(graph, tmp_path):
    write_toy_bundle(tmp_path / "toy")
    assert graph.nodes.start("caption_node", {"bundle": tmp_path / "toy"}).wait(30) == 1
    assert "toy: expected a bundle with a language" in graph.nodes.log("caption_node").read_text()
