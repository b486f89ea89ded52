"""For tests: a ROS 2 graph of its own, with nodes as real processes and this process as one more node in it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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

    def spin(self) -> None:
        self._executor.spin_once(timeout_sec=0.005)

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
