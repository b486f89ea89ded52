"""Says what a camera sees: ros2 launch mm_edge_ros vlm.launch.py bundle:=/path image:=/camera/image_raw

    ros2 topic echo /caption
    ros2 topic pub --once /question std_msgs/msg/String '{data: "which coloured object is left of the red ball"}'

It can run beside drive.launch.py, on the same camera: it takes what processor time others leave.
"""

import runpy
from pathlib import Path

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode
from launch_ros.parameter_descriptions import ParameterValue

HERE = Path(__file__).parent  # holds vlm.yaml and drive.launch.py, in a checkout as in an install
TOPICS = ("image", "question", "answer", "caption", "labels")


def generate_launch_description() -> LaunchDescription:
    arguments = {
        "bundle": ("", "folder of the bundle; empty: the shipped one"),
        "namespace": ("", "of all nodes and relative topics: one for each robot"),
        "params_file": (str(HERE / "vlm.yaml"), "parameters of the node"),
        "use_sim_time": ("false", "take time from /clock"),
        "respawn": ("true", "start the node anew when it dies"),
        **{topic: (topic, f"the robot's topic instead of {topic}") for topic in TOPICS},
    }
    bundle = ParameterValue(LaunchConfiguration("bundle"), value_type=str)
    return LaunchDescription(
        [
            *(
                DeclareLaunchArgument(name, default_value=value, description=text)
                for name, (value, text) in arguments.items()
            ),
            *runpy.run_path(str(HERE / "drive.launch.py"))["dds_profile"](),
            LifecycleNode(
                package="mm_edge_ros",
                executable="caption_node",
                name="caption_node",
                namespace=LaunchConfiguration("namespace"),
                output="screen",
                respawn=LaunchConfiguration("respawn"),
                respawn_delay=1.0,
                remappings=[(topic, LaunchConfiguration(topic)) for topic in TOPICS],
                parameters=[
                    LaunchConfiguration("params_file"),
                    {"use_sim_time": LaunchConfiguration("use_sim_time"), "bundle": bundle},
                ],
            ),
        ]
    )
