"""The house's rules: who imports whom, and who may look at a clock."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "mm_edge").rglob("*.py"))
READS_A_CLOCK = {"time", "perf_counter", "monotonic", "time_ns", "perf_counter_ns", "monotonic_ns", "now"}


def test_importing_all_of_mm_edge_brings_in_neither_torch_nor_rclpy():
    names = [str(p.relative_to(ROOT).with_suffix("")).replace("/", ".") for p in MODULES if p.name != "trt.py"]
    code = (
        "import importlib, sys\n"
        f"for name in {names}: importlib.import_module(name.removesuffix('.__init__'))\n"
        "print([m for m in ('torch', 'rclpy', 'training', 'export') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_only_sources_and_commands_read_a_clock():
    guilty = []
    for path in MODULES:
        if path.parent.name == "commands" or path.name == "sources.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            module = getattr(getattr(node, "func", None), "value", None)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(module, ast.Name):
                if module.id in ("time", "datetime") and node.func.attr in READS_A_CLOCK:
                    guilty.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert guilty == []


def test_rclpy_is_imported_by_the_ros_package_alone():
    importers = {
        path.relative_to(ROOT).parts[0]
        for folder in ("mm_edge", "training", "export", "launch", "ros2_ws")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        if name.split(".")[0] == "rclpy"
    }
    assert importers == {"ros2_ws"}
