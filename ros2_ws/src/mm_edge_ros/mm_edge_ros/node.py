"""What every node here does the same way: start, spin, end, stamp, report."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rcl_interfaces.msg import FloatingPointRange, ParameterDescriptor
from rclpy.clock import Clock, ClockType
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSDurabilityPolicy, QoSProfile, QoSReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from rclpy.subscription import Subscription

from mm_edge.errors import EdgeError

OK, WARN, ERROR, STALE = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR, DiagnosticStatus.STALE
STEADY = Clock(clock_type=ClockType.STEADY_TIME)
LEAVE_S = 10

COMMAND_QOS = QoSProfile(depth=1)  # reliable, and only the newest counts
SENSOR_QOS = QoSProfile(depth=5, reliability=QoSReliabilityPolicy.BEST_EFFORT)
EVENTS_QOS = QoSProfile(depth=10, durability=QoSDurabilityPolicy.TRANSIENT_LOCAL)
LATCHED_QOS = QoSProfile(depth=1, durability=QoSDurabilityPolicy.TRANSIENT_LOCAL)


def run(make_node: Callable[[], Node], spin: Callable[[Node, SingleThreadedExecutor], None] | None = None) -> None:
    """A node's main: until SIGINT or SIGTERM. An EdgeError ends it with status 1 and its message; SIGALRM does, if the
    middleware takes more than LEAVE_S for its way out.

    Signals are ours, since rclpy's handlers shut its context down at once, and then `destroy_node` could not publish a
    last word any more. Python sees a signal only between waits, which is why these are short.
    """
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    executor, node, received = SingleThreadedExecutor(), None, list[int]()
    try:
        node = make_node()
        for sign in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sign, lambda number, _: received.append(number))
        executor.add_node(node)
        while not received:
            if spin:
                spin(node, executor)
            else:
                executor.spin_once(timeout_sec=0.1)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except EdgeError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        try:
            if node is not None:
                node.destroy_node()  # which may end with an error, or with a status of its own
        finally:
            executor.shutdown()  # not whenever it is collected, which may be after the context that it needs
            # All is done but the middleware's own way out, on which it has been seen to hang: whoever waits for this
            # process, to respawn it, must not wait for that.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(LEAVE_S)
            rclpy.try_shutdown()


def declare(
    node: Node,
    name: str,
    default: Any,
    description: str,
    low: float | None = None,
    high: float | None = None,
    fixed: bool = True,
) -> Any:
    """Declare a parameter and return its value. `low` and `high` bound a float. `fixed`: it is read here and now, and
    whoever sets it later is refused; what would have no effect must not seem to have one. Raises EdgeError for another
    type, or one out of bounds."""
    descriptor = ParameterDescriptor(description=description, read_only=fixed)
    if low is not None and high is not None:
        descriptor.floating_point_range = [FloatingPointRange(from_value=low, to_value=high)]
    try:
        value = node.declare_parameter(name, default, descriptor).value
        return [] if value is None and isinstance(default, list) else value  # of YAML's [] nobody knows the type
    except (InvalidParameterTypeException, InvalidParameterValueException) as error:
        hint = "; in YAML a whole number is 1.0" if "DOUBLE" in str(error) else ""
        raise EdgeError(f"{name}: {error}{hint}") from None


def with_info(callback: Callable[[Any, Mapping[str, Any]], None]) -> Callable[..., None]:
    """For a subscription: also given what the middleware tells of each message; of nothing in Humble, which does not
    hand it on."""
    return callback if hasattr(Subscription, "CallbackType") else partial(callback, info={})


def diagnostics(node: Node, statuses: list[tuple[bytes, str, str, Mapping[str, Any]]]) -> DiagnosticArray:
    """A message of (level, name, message, values); names are prefixed with the node's own."""
    msg = DiagnosticArray()
    msg.header.stamp = node.get_clock().now().to_msg()
    prefix = node.get_fully_qualified_name().lstrip("/")
    for level, name, message, values in statuses:
        pairs = [KeyValue(key=key, value=str(value)) for key, value in values.items()]
        msg.status.append(
            DiagnosticStatus(level=level, name=f"{prefix}: {name}", message=message, hardware_id=prefix, values=pairs)
        )
    return msg
