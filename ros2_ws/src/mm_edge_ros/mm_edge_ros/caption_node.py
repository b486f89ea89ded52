"""Says what a camera sees: captions as the scene changes or at a set rate, answers to questions, and scores of labels.

It runs at a low priority, in one thread: a robot has more urgent things to do.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from rcl_interfaces.msg import SetParametersResult
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from sensor_msgs.msg import Image
from std_msgs.msg import String

from mm_edge.bundle import SHIPPED_VLM, Bundle
from mm_edge.errors import BundleError, EdgeError, EngineError, SampleError
from mm_edge.health import Health
from mm_edge.language import CHANGE, Language, Token, ZeroShotPipeline, caption_of, change, words_of
from mm_edge.messages import output_to_json, to_ros
from mm_edge.overlay import draw_words
from mm_edge.pipeline import Pipeline
from mm_edge.types import Caption, Output, Sample, StreamSpec
from mm_edge_ros.bundle_node import BundleNode, take_one_thread
from mm_edge_ros.node import ERROR, EVENTS_QOS, LATCHED_QOS, OK, WARN, declare, run
from mm_edge_ros.streams import StreamSubscription

NICE = 10
MOST_QUESTIONS, PATIENCE_S = 8, 5.0  # that wait, and how long for a frame
MOST_LABELS = 256
QUESTION = StreamSpec("question", "text", (1,), rate_hz=200, max_age_ms=0)  # many may come at once


class CaptionNode(BundleNode):
    """Active, it speaks of the frame that the model saw at the last tick, never of one that is stale.

    After each tick it does at most one thing: it answers the oldest question, or else says a caption if one is due.
    Frames that come meanwhile are skipped, and the next tick is of the newest. A caption gives way to a question, and
    is then begun anew; but only once, so that many questions leave some time for captions.
    """

    HANG_S = 60.0  # without a tick or a token: large models are slow
    YIELDS = "a caption"

    def __init__(self):
        super().__init__("caption_node", SHIPPED_VLM)
        differs = "a caption comes when the scene differs by more from that of the last: by the cosine distance of"
        differs += " embeddings, 0 to 2; without embeddings by the mean difference of small grey pictures, 0 to 1"
        declare(self, "change", CHANGE, differs, 0.0, 2.0, fixed=False)
        anyway = "captions a second, whether or not the scene changes; 0: none"
        declare(self, "rate_hz", 0.0, anyway, 0.0, 100.0, fixed=False)
        labels = declare(self, "labels", [""], "texts to score each frame by; a single empty one: none", fixed=False)
        self._labels = _labels(labels)
        self.add_on_set_parameters_callback(self._on_parameters)
        self._language: Language | None = None
        self._says = False  # captions, not only answers or labels
        self._zero_shot: ZeroShotPipeline | None = None
        self._questions: dict[str, float] = {}  # and since when they wait, in steady seconds; the oldest first
        self._asking = threading.Lock()
        self._scene: np.ndarray | None = None  # that the last caption is of
        self._change = math.inf  # since then
        self._why: list[str] = []  # there can be no caption
        self._timed_s = 0.0  # when one was due by rate_hz
        self._gave_way = False  # to a question, since the last caption
        self._seen_ns = self._captioned_ns = 0  # stamps of the frame seen last, and of the one captioned last
        self._unshown: tuple[Sample, str, list[Token], str] | None = None  # frame, text, its tokens, question
        self._arrived = self._looked = self._captions = self._answers = 0
        self._first_token_s: deque[float] = deque(maxlen=100)
        self._pace: deque[tuple[int, float]] = deque(maxlen=100)  # tokens after the first, and how long they took

        self._outputs = self.create_publisher(String, "caption/output", 10)
        self._texts = self.create_publisher(String, "caption", LATCHED_QOS)
        self._tokens = self.create_publisher(String, "caption/token", QoSProfile(depth=100))
        self._overlay = self.create_publisher(Image, "caption/overlay", LATCHED_QOS)
        self._replies = self.create_publisher(String, "answer", EVENTS_QOS)
        self._scores = self.create_publisher(String, "labels", 10)
        self._start()

    def _open(self, bundle: Bundle, engine: str) -> Pipeline:
        pipeline = Pipeline(bundle, engine)
        language = Language(bundle, model=pipeline.model)
        _check(self._labels, language)
        self._language, self._zero_shot = language, None
        self._says = bool(language.spec.decoder and "caption" in language.spec.decoder.prompts)
        self._shown = {self._language.stream.name}
        self._first_token_s.clear()
        self._pace.clear()
        return pipeline

    def _begin(self) -> None:
        self._scene, self._change, self._unshown, self._gave_way = None, math.inf, None, False
        self._seen_ns = self._arrived = self._looked = 0
        super()._begin()

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._language = self._zero_shot = None  # both hold the model, and the next may need its memory
        return super().on_cleanup(state)

    def _halt(self) -> None:
        super()._halt()
        self._refuse("the node was deactivated", waited_s=0.0)

    def _subscribe(self) -> None:
        before = bool(self._streams)
        super()._subscribe()
        if self._streams and not before:
            self._streams.append(StreamSubscription(self, QUESTION, "question", False, self._on_question, self._deaf))

    # ---- executor's thread

    def _push(self, sample: Sample) -> bool:
        pushed = super()._push(sample)
        self._arrived += pushed and sample.stream in self._shown
        return pushed

    def _on_question(self, sample: Sample) -> None:
        """The newest few wait, each text once."""
        with self._asking:
            self._questions.setdefault(sample.data, time.monotonic())
            crowded = [*self._questions][:-MOST_QUESTIONS]
            for question in crowded:
                del self._questions[question]
        for question in crowded:
            self._reply(question, reason=f"more than {MOST_QUESTIONS} questions wait, and newer ones go first")

    def _deaf(self, error: EdgeError) -> None:
        self.get_logger().warning(str(error), throttle_duration_sec=1.0)

    def _on_parameters(self, parameters: list[Parameter]) -> SetParametersResult:
        for parameter in parameters:
            if parameter.name == "labels":
                labels = _labels(parameter.value)
                try:
                    _check(labels, self._language)
                except EdgeError as error:
                    return SetParametersResult(successful=False, reason=str(error))
                self._labels = labels  # the inference thread reads them
        return SetParametersResult(successful=True)

    # ---- inference thread

    def _ticked(self, output: Output, frame: Sample | None) -> None:
        name, caption = self._language.stream.name, None
        reasons = output.reasons or (() if output.mask[name] else output.notes)
        stamp_ns = output.sources.get(name, 0)
        if reasons or frame is None:
            self._refuse("; ".join(reasons) or f"{name} never seen", waited_s=PATIENCE_S)
        else:
            fresh, self._seen_ns = stamp_ns != self._seen_ns, stamp_ns
            self._looked += fresh
            try:
                scene = self._language.scene(frame.data)
                due = fresh and self._is_due(scene)
                question = None if due and self._gave_way else self._next_question()
                if question is not None:
                    self._gave_way = True
                    self._answer(question, stamp_ns, frame)
                if fresh:
                    self._score(stamp_ns)
                if due and question is None:
                    caption = self._captioned(scene, stamp_ns, frame)
            except EngineError as error:
                reasons = (str(error),)
                self._trouble = str(error)
                self._refuse(self._trouble, waited_s=PATIENCE_S)
        self._why = list(reasons)
        self._show()
        output = dataclasses.replace(output, reasons=reasons, caption=caption)
        self._outputs.publish(String(data=output_to_json(output)))

    def _is_due(self, scene: np.ndarray) -> bool:
        """Is it time for a caption, if the model knows any?"""
        self._change = math.inf if self._scene is None else change(scene, self._scene)
        timely = time.monotonic() - self._timed_s >= self._period_s()
        return self._says and (timely or self._change > self.get_parameter("change").value)

    def _period_s(self) -> float:
        rate_hz = self.get_parameter("rate_hz").value
        return 1 / rate_hz if rate_hz > 0 else math.inf

    def _captioned(self, scene: np.ndarray, stamp_ns: int, frame: Sample) -> Caption | None:
        """None if it was given up."""
        period_s, now_s = self._period_s(), time.monotonic()
        tokens = self._say("caption", self._language.prompt("caption"), stamp_ns)
        if tokens is None:
            return None
        if (since_s := now_s - self._timed_s) >= period_s:  # in step, unless it is behind
            self._timed_s = self._timed_s + period_s if since_s < 2 * period_s else now_s
        self._scene, self._captioned_ns, self._gave_way = scene, stamp_ns, False
        self._captions += 1
        caption = caption_of(tokens)
        self._texts.publish(String(data=_printable(caption.text)))
        self._unshown = frame, caption.text, tokens, ""
        return caption

    def _answer(self, question: str, stamp_ns: int, frame: Sample) -> None:
        """Whatever happens, somebody waits for it."""
        try:
            tokens = self._say("answer", self._language.prompt("question", question), stamp_ns, question)
        except (SampleError, BundleError) as error:
            self._reply(question, reason=str(error))
            return
        except Exception as error:
            self._reply(question, reason=str(error) or type(error).__name__)
            raise
        if not tokens:
            self._reply(question, reason="the model says nothing" if tokens == [] else "the node was deactivated")
            return
        answer = caption_of(tokens)
        self._answers += 1
        self._reply(question, stamp_ns, answer)
        self._unshown = frame, answer.text, tokens, question

    def _say(self, kind: str, prompt: list[int], stamp_ns: int, question: str | None = None) -> list[Token] | None:
        """All tokens, each published as it comes; None if it was given up. Raises EngineError."""
        tokens, begun_s, first_s, last_s = list[Token](), time.perf_counter(), 0.0, 0.0
        for token in self._language.say(prompt):
            self._under_way, last_s = object(), time.perf_counter()
            if not tokens:
                first_s = last_s
                self._first_token_s.append(first_s - begun_s)
            tokens.append(token)
            said = {"stamp_ns": stamp_ns, "kind": kind, "question": question, "text": token.text}
            self._tokens.publish(String(data=json.dumps({**said, "token": _last(tokens)})))
            if self._stop.is_set() or (question is None and self._questions and not self._gave_way):
                return None
        if len(tokens) > 1:
            self._pace.append((len(tokens) - 1, last_s - first_s))
        return tokens

    def _score(self, stamp_ns: int) -> None:
        """The frame, by each label."""
        labels = self._labels
        if not labels:
            return
        if self._zero_shot is None or self._zero_shot.labels != labels:
            self._zero_shot = ZeroShotPipeline(self._language, labels)
        scores = self._zero_shot.scores()
        self._scores.publish(String(data=json.dumps({"stamp_ns": stamp_ns, "scores": scores}, allow_nan=False)))

    def _show(self) -> None:
        """The last that was said, to whoever looks."""
        if self._unshown and self._overlay.get_subscription_count():
            (frame, text, tokens, question), self._unshown = self._unshown, None
            msg = Image()
            picture = draw_words(frame.data, text, words_of(tokens), question)
            to_ros("image", msg, frame.stamp_ns, picture, frame.stream)
            self._overlay.publish(msg)

    # ---- questions

    def _next_question(self) -> str | None:
        with self._asking:
            question = next(iter(self._questions), None)
            if question is not None:
                del self._questions[question]
            return question

    def _refuse(self, reason: str, waited_s: float) -> None:
        """Those that wait for so long."""
        until_s = time.monotonic() - waited_s
        with self._asking:
            refused = [question for question, since_s in self._questions.items() if since_s <= until_s]
            for question in refused:
                del self._questions[question]
        for question in refused:
            self._reply(question, reason=reason)

    def _reply(self, question: str, stamp_ns: int | None = None, said: Caption | None = None, reason: str = "") -> None:
        answer, score = (said.text, said.score) if said else (None, None)
        fields = {"question": question, "answer": answer, "score": score, "stamp_ns": stamp_ns, "reason": reason}
        self._replies.publish(String(data=json.dumps(fields)))

    # ---- diagnostics

    def _silence(self) -> str:
        """Whoever speaks is not silent."""
        silence = "" if self._under_way else super()._silence()
        if silence:
            self._refuse(silence, waited_s=PATIENCE_S)
        return silence

    def _model_status(self, health: Health, reasons: list[str], trouble: str) -> tuple[bytes, str, dict[str, Any]]:
        first, pace = list(self._first_token_s), list(self._pace)
        p50, p99 = 1e3 * np.percentile(first, [50, 99]) if first else (np.nan, np.nan)
        tokens_per_s = sum(n for n, _ in pace) / sum(s for _, s in pace) if pace else np.nan
        age_s = (self.get_clock().now().nanoseconds - self._captioned_ns) / 1e9 if self._captioned_ns else np.inf
        values = {
            "captions": self._captions,
            "answers": self._answers,
            "questions_waiting": len(self._questions),
            "frames_skipped": self._arrived - self._looked,
            "time_to_first_token_p50_ms": f"{p50:.2f}",
            "time_to_first_token_p99_ms": f"{p99:.2f}",
            "tokens_per_s": f"{tokens_per_s:.1f}",
            "caption_age_s": f"{age_s:.3f}",  # of its frame
            "change": f"{self._change:.4f}",  # since then
        }
        reasons = reasons or self._why
        if trouble:
            return ERROR, trouble, values
        idle = "looking" if self._says else "looking; this bundle knows no captions"
        return WARN if reasons else OK, "; ".join(reasons) or idle, values


def _labels(value: Sequence[str] | None) -> tuple[str, ...]:
    labels = tuple(value or ())
    return () if labels == ("",) else labels


def _check(labels: Sequence[str], language: Language | None) -> None:
    """Raises EdgeError for labels that cannot be scored; by which bundle, may not be known yet."""
    if len(labels) > MOST_LABELS or len(set(labels)) < len(labels):
        raise EdgeError(f"labels: expected at most {MOST_LABELS}, each once, got {len(labels)}")
    for label in labels if language else ():
        language.readable(label)


def _printable(text: str) -> str:
    """A large model may say anything; a 0 would end a message's text."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _last(tokens: list[Token]) -> str:
    """What the last one added."""
    return tokens[-1].text[len(tokens[-2].text) if len(tokens) > 1 else 0 :]


def main() -> None:
    os.nice(NICE)
    take_one_thread()
    run(CaptionNode)


if __name__ == "__main__":
    main()
