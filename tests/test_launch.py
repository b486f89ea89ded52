"""The ROS package as it is installed, its parameter file in real nodes, and its launch files where ROS's launch is."""

import ast
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mm_edge.messages import readable
from mm_edge.types import KINDS

pytestmark = pytest.mark.real_time

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ros2_ws" / "src" / "mm_edge_ros"
NODES = {f"{name}_node" for name in ("edge", "watchdog", "caption", "record", "view", "search", "sim", "demo")}
NODES |= {"camera_node", "microphone_node", "events_node"}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """The package installed, with its programs where ament looks for them."""
    pytest.importorskip("setuptools", reason="needed to build an ament_python package")
    folder = tmp_path_factory.mktemp("install")
    source = shutil.copytree(PACKAGE, folder / "source")  # so that building leaves nothing behind in the checkout
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--prefix", str(folder / "prefix"), str(source)], check=True)
    (folder / "prefix" / "lib" / "mm_edge_ros").symlink_to(folder / "prefix" / "bin")
    return folder / "prefix"


def test_an_install_has_everything_ament_looks_for(prefix):
    share = prefix / "share"
    assert (share / "ament_index/resource_index/packages/mm_edge_ros").is_file()
    assert {path.name for path in (share / "mm_edge_ros").iterdir()} == {"package.xml", "config", "launch"}
    for folder, source in (("config", PACKAGE / "config"), ("launch", ROOT / "launch")):
        for path in source.iterdir():
            if path.is_file():
                assert (share / "mm_edge_ros" / folder / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in (prefix / "bin").iterdir()} == NODES


def test_the_package_depends_on_what_it_imports():
    names = set()
    for path in [*PACKAGE.glob("mm_edge_ros/*.py"), *(ROOT / "launch").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names |= {(getattr(node, "module", None) or node.names[0].name).split(".")[0]}
    apt = {"numpy": "python3-numpy", "cv2": "python3-opencv"}
    imported = {apt.get(name, name) for name in names - sys.stdlib_module_names - {"mm_edge", "mm_edge_ros"}}
    depends = re.findall(r"<exec_depend>(.*)</exec_depend>", (PACKAGE / "package.xml").read_text())
    # Streams come in whatever message holds them; AudioChunk is taken where it was built.
    by_type = {type_name.split("/")[0] for kind in KINDS for type_name in readable(kind)} - {"mm_edge_msgs"}
    assert sorted(depends) == sorted({*imported, *by_type, "ros2launch"})  # the command that the launch files are for


def test_launch_files_start_programs_that_exist():
    for path in (ROOT / "launch").glob("*.launch.py"):
        assert set(re.findall(r'executable="(\w+)"', path.read_text())) <= NODES


@pytest.mark.parametrize("name", ["drive.yaml", "vlm.yaml", "av.yaml"])
def test_the_parameter_file_reaches_the_nodes_and_names_only_what_they_know(tmp_path, name):
    import ros  # skips where there is no ROS 2
    from rcl_interfaces.srv import GetParameters
    from toy_bundle import write_toy_bundle
    from toy_ear import write_toy_ear
    from toy_language import write_toy_language

    write_toy_bundle(tmp_path / "edge_node")
    write_toy_language(tmp_path / "caption_node")
    write_toy_ear(tmp_path / "words_node")
    write_toy_ear(tmp_path / "events_node")
    given = yaml.safe_load((ROOT / "launch" / name).read_text())["/**"]
    for node, change in {
        "watchdog_node": {"deadline_ms": 170.0},
        "edge_node": {"image_transport": "compressed"},
        "caption_node": {"rate_hz": 0.5, "labels": ["a red ball", "blue"]},
    }.items():
        if node in given:
            given[node]["ros__parameters"] |= change
    (tmp_path / "given.yaml").write_text(yaml.safe_dump({"/**": given}))
    with ros.ros_graph(tmp_path / "logs") as graph:
        for node, parameters in given.items():
            own = {"bundle": tmp_path / node} if (tmp_path / node).exists() else {}
            program = "events_node" if node == "words_node" else node
            remaps = {"__ns": "/robot", **({"__node": node} if program != node else {})}
            graph.nodes.start(program, own, remaps, params_file=tmp_path / "given.yaml")
            wanted = parameters["ros__parameters"]
            answer = graph.call(GetParameters, f"/robot/{node}/get_parameters", names=[*wanted])
            kinds = {bool: "bool_value", str: "string_value", float: "double_value", list: "string_array_value"}
            got = [getattr(value, kinds[type(want)]) for want, value in zip(wanted.values(), answer.values)]
            assert got == [*wanted.values()]
            graph.nodes.stop(program)


@contextlib.contextmanager
def launched(prefix, tmp_path, *arguments, name="drive", file=None):
    """A launch file of ours, or of the user's, with the bundle "toy" in a ROS graph of its own. Yields the graph."""
    import ros

    code = """if True:
        import sys
        from launch import LaunchDescription, LaunchService
        from launch.actions import IncludeLaunchDescription
        from launch.launch_description_sources import AnyLaunchDescriptionSource
        arguments = [argument.split(":=") for argument in sys.argv[2:]]
        source = AnyLaunchDescriptionSource(sys.argv[1])
        service = LaunchService()
        service.include_launch_description(
            LaunchDescription([IncludeLaunchDescription(source, launch_arguments=arguments)])
        )
        sys.exit(service.run())"""
    with ros.ros_graph(tmp_path / "logs") as graph:
        path = os.pathsep.join([str(prefix), graph.nodes.env["AMENT_PREFIX_PATH"]])
        launch_file = file or prefix / f"share/mm_edge_ros/launch/{name}.launch.py"
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(launch_file), f"bundle:={tmp_path}/toy", *arguments],
            env={**graph.nodes.env, "AMENT_PREFIX_PATH": path},
            cwd=tmp_path,  # not the checkout, whose folder `launch` hides ROS's
            start_new_session=True,
        )
        try:
            yield graph
        finally:
            os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal reaches them all
            assert process.wait(15) == 0


needs_launch = pytest.mark.skipif(not importlib.util.find_spec("launch_ros"), reason="ROS's launch is not installed")


@needs_launch
def test_drive_launch_drives_the_robot_it_is_told_about(prefix, tmp_path):
    from geometry_msgs.msg import TwistStamped
    from test_ros import Robot
    from toy_bundle import write_toy_bundle

    write_toy_bundle(tmp_path / "toy")
    with launched(prefix, tmp_path, "namespace:=robot", "imu:=/body/imu", "cmd_vel:=/base/cmd_vel") as graph:
        robot, wheels = Robot(graph, "/robot", imu="/body/imu"), graph.subscribe(TwistStamped, "/base/cmd_vel")
        graph.wait(lambda: robot.acts(about=1.4), "action")
        graph.wait(lambda: any(msg.twist.linear.x > 0 for msg in wheels), "cmd_vel")
        assert graph.wait(robot.output, "output").mask == {"camera": True, "imu": True, "text": True}


@needs_launch
def test_a_topic_without_an_argument_is_remapped_by_a_launch_file_around_ours(prefix, tmp_path):
    from std_msgs.msg import String
    from test_ros import Robot
    from toy_bundle import write_toy_bundle

    write_toy_bundle(tmp_path / "toy")
    around = tmp_path / "my_robot.launch.xml"
    around.write_text(
        """<launch>
          <arg name="bundle"/>
          <set_remap from="image" to="/front/image_raw"/>
          <set_remap from="edge/output" to="/said"/>
          <include file="$(find-pkg-share mm_edge_ros)/launch/drive.launch.py">
            <arg name="bundle" value="$(var bundle)"/>
          </include>
        </launch>"""
    )
    with launched(prefix, tmp_path, file=around) as graph:
        robot, said = Robot(graph, image="/front/image_raw"), graph.subscribe(String, "/said")
        graph.wait(lambda: any('"camera": true' in msg.data for msg in said), "output that saw the camera")
        assert not robot.outputs


@needs_launch
def test_a_model_that_was_killed_or_hangs_is_started_anew_and_drives_on(prefix, tmp_path):
    import ros
    from geometry_msgs.msg import TwistStamped
    from test_ros import GREY, Robot
    from test_ros_faults import BRIGHT, show, stops_in_time, write_bundle_that_can_hang

    write_bundle_that_can_hang(tmp_path / "toy")
    with launched(prefix, tmp_path) as graph:
        robot, wheels, raw = Robot(graph), ros.Wheels(graph), graph.subscribe(TwistStamped, "cmd_vel_raw")

        def pid():
            return int(raw[-1].header.frame_id.split("@")[1])

        def stopped_and_replaced(strike):
            wheels.wait_until_driving()
            before = pid()
            delay = wheels.stop_delay(strike)
            show(robot, GREY)
            wheels.wait_until_driving()
            assert pid() != before
            return delay

        assert stops_in_time(lambda: stopped_and_replaced(lambda: os.kill(pid(), signal.SIGKILL)))
        assert stops_in_time(lambda: stopped_and_replaced(lambda: show(robot, BRIGHT)))


@needs_launch
def test_vlm_launch_speaks_of_the_camera_it_is_told_about(prefix, tmp_path):
    from std_msgs.msg import String
    from test_caption_node import Camera
    from toy_language import write_toy_language

    write_toy_language(tmp_path / "toy")
    with launched(prefix, tmp_path, "image:=front", "caption:=said", name="vlm") as graph:
        said = graph.subscribe(String, "said")
        Camera(graph, topic="front")
        assert graph.wait(lambda: said, "caption")[0].data == "a red ball"


@needs_launch
def test_av_launch_tells_words_and_commands_the_robot_by_them(prefix, tmp_path):
    from std_msgs.msg import String
    from test_events_node import LATCHED, Microphones
    from toy_ear import STOP_HZ, tone, write_toy_ear

    write_toy_ear(tmp_path / "ear")
    arguments = (f"words:={tmp_path}/ear", "events:=none", "text:=orders")
    with launched(prefix, tmp_path, *arguments, name="av") as graph:
        ears, words = Microphones(graph), graph.subscribe(String, "words")
        outputs, orders = graph.subscribe(String, "words/output"), graph.subscribe(String, "orders", LATCHED)
        graph.wait(lambda: len(outputs) > 2, "output")
        ears.play(tone(STOP_HZ, 0.5))
        graph.wait(lambda: words and orders, "word and command")
        assert orders[0].data == "stop"
