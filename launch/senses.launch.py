"""A camera and a microphone of this computer: ros2 launch mm_edge_ros senses.launch.py camera:=0 microphone:=default

Beside drive.launch.py or vlm.launch.py. A device that fails is tried again every second; a file plays again and again.
"""

import runpy
from pathlib import Path

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument
from launch.conditions import IfCondition
from launch.substitutions import LaunchConfiguration, PythonExpression
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

HERE = Path(__file__).parent  # holds drive.launch.py, in a checkout as in an install


def generate_launch_description() -> LaunchDescription:
    arguments = {
        "camera": ("0", "its number or device, a video file, the URL of a stream; none: no camera_node"),
        "rate_hz": ("0.0", "of the camera; frames in between are left out; 0: all come"),
        "compressed": ("false", "publish image/compressed, too"),
        "microphone": ("default", "its number or name, or a sound file; none: no microphone_node"),
        "sample_rate_hz": ("16000", "of the microphone"),
        "channels": ("2", "of the microphone"),
        "namespace": ("", "of all nodes and relative topics: one for each robot"),
        "respawn": ("true", "start a node anew when it ends"),
        "image": ("image", "the topic instead of image"),
        "audio": ("audio", "the topic instead of audio"),
    }

    common = {
        "package": "mm_edge_ros",
        "namespace": LaunchConfiguration("namespace"),
        "output": "screen",
        "respawn": LaunchConfiguration("respawn"),
        "respawn_delay": 1.0,
    }

    def parameters(**kinds: type) -> dict[str, ParameterValue]:
        return {name: ParameterValue(LaunchConfiguration(name), value_type=kind) for name, kind in kinds.items()}

    def wanted(sense: str) -> IfCondition:
        # The space, since the name of a device may end in the quote that would end the text.
        return IfCondition(PythonExpression(['r"""', LaunchConfiguration(sense), ' """ != \'none \'']))

    return LaunchDescription(
        [
            *(
                DeclareLaunchArgument(name, default_value=value, description=text)
                for name, (value, text) in arguments.items()
            ),
            *runpy.run_path(str(HERE / "drive.launch.py"))["dds_profile"](),
            Node(
                name="camera_node",
                executable="camera_node",
                remappings=[("image", LaunchConfiguration("image"))],
                parameters=[parameters(camera=str, rate_hz=float, compressed=bool)],
                condition=wanted("camera"),
                **common,
            ),
            Node(
                name="microphone_node",
                executable="microphone_node",
                remappings=[("audio", LaunchConfiguration("audio"))],
                parameters=[parameters(microphone=str, sample_rate_hz=int, channels=int)],
                condition=wanted("microphone"),
                **common,
            ),
        ]
    )
