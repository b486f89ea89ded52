"""The simulated robot, driven: ros2 launch mm_edge_ros demo.launch.py episodes:=3 seed:=0

Ends by itself after the last episode and leaves clip.mp4 and strip.png in the folder `out`.
"""

from pathlib import Path

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, EmitEvent, IncludeLaunchDescription
from launch.events import Shutdown
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

HERE = Path(__file__).parent


def generate_launch_description() -> LaunchDescription:
    arguments = {
        "bundle": ("", "folder of the bundle; empty: the shipped one"),
        "namespace": ("", "of all nodes and relative topics"),
        "episodes": ("3", "rooms to drive through"),
        "seed": ("0", "of the first room"),
        "out": ("runs/demo", "folder for clip and strip"),
        "faults": ("", "what goes wrong, as in mm-edge demo --fault; with spaces between them"),
    }
    passed = {name: LaunchConfiguration(name) for name in ("bundle", "namespace")}
    namespace, episodes, seed, out = map(LaunchConfiguration, ("namespace", "episodes", "seed", "out"))
    faults = ParameterValue(LaunchConfiguration("faults"), value_type=str)
    return LaunchDescription(
        [
            *(
                DeclareLaunchArgument(name, default_value=value, description=text)
                for name, (value, text) in arguments.items()
            ),
            IncludeLaunchDescription(
                PythonLaunchDescriptionSource(str(HERE / "drive.launch.py")), launch_arguments=passed.items()
            ),
            Node(
                package="mm_edge_ros",
                executable="demo_node",
                name="demo_node",
                namespace=namespace,
                output="screen",
                parameters=[{"episodes": episodes, "out": ParameterValue(out, value_type=str), "faults": faults}],
                on_exit=EmitEvent(event=Shutdown(reason="demo over")),
            ),
            Node(
                package="mm_edge_ros",
                executable="sim_node",
                name="sim_node",
                namespace=namespace,
                output="screen",
                parameters=[{"episodes": episodes, "seed": seed, "pause_s": 1.0, "faults": faults}],
            ),
        ]
    )
