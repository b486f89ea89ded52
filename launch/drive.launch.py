"""Drives a robot: ros2 launch mm_edge_ros drive.launch.py bundle:=/path image:=/camera/image_raw scan:=/scan
Moves an arm, if params_file:= names its joints: ... joint_trajectory:=/arm_controller/joint_trajectory

A node that dies is started anew and brings itself up; the watchdog stops the wheels meanwhile. The base must have a
wheel time-out of its own all the same.
"""

import os
from pathlib import Path

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, SetEnvironmentVariable
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode, Node
from launch_ros.parameter_descriptions import ParameterValue

HERE = Path(__file__).parent  # holds drive.yaml, in a checkout as in an install
SENSORS = ("image", "scan", "imu", "audio", "points", "joint_states")
TOPICS = {"text": "command_text", **{name: name for name in (*SENSORS, "cmd_vel", "joint_trajectory")}}
PROFILES = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")


def generate_launch_description() -> LaunchDescription:
    arguments = {
        "bundle": ("", "folder of the bundle; empty: the shipped one"),
        "namespace": ("", "of all nodes and relative topics: one for each robot"),
        "params_file": (str(HERE / "drive.yaml"), "parameters of the nodes"),
        "use_sim_time": ("false", "take time from /clock"),
        "respawn": ("true", "start a node anew when it dies"),
        **{name: (topic, f"the robot's topic instead of {topic}") for name, topic in TOPICS.items()},
    }
    common = {
        "package": "mm_edge_ros",
        "namespace": LaunchConfiguration("namespace"),
        "output": "screen",
        "respawn": LaunchConfiguration("respawn"),
        "respawn_delay": 1.0,
        "remappings": [(topic, LaunchConfiguration(name)) for name, topic in TOPICS.items()],
    }
    parameters = [LaunchConfiguration("params_file"), {"use_sim_time": LaunchConfiguration("use_sim_time")}]
    return LaunchDescription(
        [
            *(
                DeclareLaunchArgument(name, default_value=value, description=text)
                for name, (value, text) in arguments.items()
            ),
            *dds_profile(),
            LifecycleNode(
                name="edge_node",
                executable="edge_node",
                parameters=[*parameters, {"bundle": ParameterValue(LaunchConfiguration("bundle"), value_type=str)}],
                **common,
            ),
            Node(name="watchdog_node", executable="watchdog_node", parameters=parameters, **common),
        ]
    )


def dds_profile() -> list:
    """Our Fast DDS profile, unless the user has one."""
    profile = HERE.parent / "config" / "fastdds.xml"
    if not profile.is_file():  # run from a checkout, not through the package
        profile = HERE.parent / "ros2_ws/src/mm_edge_ros/config/fastdds.xml"
    if not profile.is_file() or any(name in os.environ for name in PROFILES):
        return []
    return [SetEnvironmentVariable(PROFILES[0], str(profile))]
