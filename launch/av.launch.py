"""Tells what happens and what is said: ros2 launch mm_edge_ros av.launch.py image:=/camera/image_raw audio:=/audio

    ros2 topic echo /events     # {"label": "metal falls", "score": 0.93, "start_ns": ..., "bearing_rad": 0.41, ...}
    ros2 topic echo /words      # {"label": "stop", ...}, and "stop" on command_text

Beside drive.launch.py, whose watchdog stops the wheels at a spoken "stop". One of both nodes alone: words:=none, or
events:=none.
"""

import runpy
from pathlib import Path

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument
from launch.conditions import IfCondition
from launch.substitutions import LaunchConfiguration, PythonExpression
from launch_ros.actions import LifecycleNode
from launch_ros.parameter_descriptions import ParameterValue

HERE = Path(__file__).parent  # holds av.yaml and drive.launch.py, in a checkout as in an install
TOPICS = {"text": "command_text", "image": "image", "audio": "audio"}  # as those of drive.launch.py


def generate_launch_description() -> LaunchDescription:
    arguments = {
        "words": ("words", "folder of the bundle that hears words; words: the shipped one; none: no words_node"),
        "events": ("events", "folder of the bundle that tells events; events: the shipped one; none: no events_node"),
        "namespace": ("", "of all nodes and relative topics: one for each robot"),
        "params_file": (str(HERE / "av.yaml"), "parameters of the nodes"),
        "use_sim_time": ("false", "take time from /clock"),
        "respawn": ("true", "start a node anew when it dies"),
        **{name: (topic, f"the robot's topic instead of {topic}") for name, topic in TOPICS.items()},
    }

    def node(name: str, topic: str) -> LifecycleNode:
        """Both are the same program; what they tell goes to a topic of each one's own."""
        bundle = ParameterValue(LaunchConfiguration(topic), value_type=str)
        return LifecycleNode(
            package="mm_edge_ros",
            executable="events_node",
            name=name,
            namespace=LaunchConfiguration("namespace"),
            output="screen",
            respawn=LaunchConfiguration("respawn"),
            respawn_delay=1.0,
            remappings=[
                *((usual, LaunchConfiguration(own)) for own, usual in TOPICS.items()),
                *((f"events{end}", f"{topic}{end}") for end in ("", "/output", "/overlay")),
            ],
            parameters=[
                LaunchConfiguration("params_file"),
                {"use_sim_time": LaunchConfiguration("use_sim_time"), "bundle": bundle},
            ],
            condition=IfCondition(PythonExpression(['r"""', LaunchConfiguration(topic), ' """ != \'none \''])),
        )

    return LaunchDescription(
        [
            *(
                DeclareLaunchArgument(name, default_value=value, description=text)
                for name, (value, text) in arguments.items()
            ),
            *runpy.run_path(str(HERE / "drive.launch.py"))["dds_profile"](),
            node("words_node", "words"),
            node("events_node", "events"),
        ]
    )
