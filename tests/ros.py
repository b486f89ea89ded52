"""For tests: a ROS 2 graph of its own, with nodes as real processes and this process as one more node in it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mm_edge.commands.ros import Nodes, RosMissing, find_ros, free_domain

try:
    ROS = find_ros()
except RosMissing as missing:
    pytest.skip(str(missing), allow_module_level=True)
# For this process's own rclpy, before it is imported; its libraries were found when Python started.
NAMES = ("AMENT_PREFIX_PATH", "FASTRTPS_DEFAULT_PROFILES_FILE")
os.environ.update({name: ROS.env[name] for name in NAMES if name in ROS.env}, ROS_AUTOMATIC_DISCOVERY_RANGE="LOCALHOST")

import rclpy
from geometry_msgs.msg import TwistStamped
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSProfile


class Graph:
    """`nodes` starts processes; `wait` lets this process's node work until a condition holds."""

    def __init__(self, nodes: Nodes, context: rclpy.Context):
        self.nodes = nodes
        self.node = rclpy.create_node("tester", context=context)
        self._executor = SingleThreadedExecutor(context=context)
        self._executor.add_node(self.node)

    def subscribe(self, kind: type, topic: str, qos: QoSProfile | int = 100) -> list[Any]:
        """A list that fills with the messages of `topic`."""
        heard: list[Any] = []
        self.node.create_subscription(kind, topic, heard.append, qos)
        return heard

    def spin(self, timeout_s: float = 0.005) -> None:
        self._executor.spin_once(timeout_sec=timeout_s)

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 15.0) -> Any:
        """The condition's first true value; meanwhile every node must stay alive."""
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < end, f"no {what} within {seconds} s"
            self.nodes.check()
            self.spin()
        return value

    def call(self, kind: type, name: str, **request: Any) -> Any:
        client = self.node.create_client(kind, name)
        self.wait(client.service_is_ready, f"service {name}")
        future = client.call_async(kind.Request(**request))
        self.wait(future.done, f"answer of {name}")
        self.node.destroy_client(client)
        return future.result()

    def close(self) -> None:
        self._executor.shutdown()
        self.node.destroy_node()


class Command(NamedTuple):
    """One on cmd_vel. `heard_s` is this process's steady clock, `sent_s` the sender's ROS clock."""

    heard_s: float
    sent_s: float
    moves: bool


class Delay(NamedTuple):
    """From a fault to the first zero command heard here; `deaf_s`: this process's own longest pause meanwhile, for
    which the measurement may be too long."""

    s: float
    deaf_s: float


class Wheels:
    """What a base would hear, and when."""

    def __init__(self, graph: Graph, topic: str = "cmd_vel"):
        self._graph = graph
        self.heard: list[Command] = []
        graph.node.create_subscription(TwistStamped, topic, self._hear, 100)

    def _hear(self, msg: TwistStamped) -> None:
        sent_s = msg.header.stamp.sec + msg.header.stamp.nanosec * 1e-9
        moves = bool(msg.twist.linear.x or msg.twist.angular.z)
        self.heard.append(Command(time.monotonic(), sent_s, moves))

    def wait_until_driving(self, seconds: float = 15.0) -> None:
        """On what is heard from now on."""
        self.heard.clear()
        self._graph.wait(lambda: any(command.moves for command in self.heard), "command to drive", seconds)

    def stop_delay(self, strike: Callable[[], Any]) -> Delay:
        """Call it while driving. From then on every command must be zero: four more are awaited."""
        self.heard.clear()
        struck_s = time.monotonic()
        strike()
        last_s, deaf_s, zeros = time.monotonic(), 0.0, list[Command]()
        while len(zeros) < 5:
            self._graph.spin()
            now_s = time.monotonic()
            last_s, deaf_s = now_s, max(deaf_s, now_s - last_s) if not zeros else deaf_s
            assert now_s < struck_s + 15, f"no stop within 15 s; heard {self.heard[-5:]}"
            zeros = [command for command in self.heard if not command.moves]
        first = self.heard.index(zeros[0])
        assert self.heard[first:] == zeros, f"it moved after the stop: {self.heard[first:]}"
        return Delay(zeros[0].heard_s - struck_s, deaf_s)


@contextlib.contextmanager
def ros_graph(logs: Path) -> Iterator[Graph]:
    with free_domain() as domain, Nodes(ROS, domain, logs) as nodes:
        context = rclpy.Context()
        rclpy.init(context=context, domain_id=domain)
        graph = Graph(nodes, context)
        try:
            yield graph
        finally:
            graph.close()
            rclpy.shutdown(context=context)
