"""The house's rules: who imports whom, and who may look at a clock."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "mm_edge").rglob("*.py"))


def imports(path: Path) -> set[str]:
    """The top-level names of all that a file imports, wherever in it."""
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, (ast.Import, ast.ImportFrom))]
    names = [n.module or "" if isinstance(n, ast.ImportFrom) else a.name for n in nodes for a in n.names]
    return {name.split(".")[0] for name in names}


def test_importing_all_of_mm_edge_brings_in_neither_torch_nor_rclpy():
    names = [str(p.relative_to(ROOT).with_suffix("")).replace("/", ".") for p in MODULES if p.name != "trt.py"]
    code = (
        "import importlib, sys\n"
        f"for name in {names}: importlib.import_module(name.removesuffix('.__init__'))\n"
        "print([m for m in ('torch', 'rclpy', 'training', 'export') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_only_commands_and_live_sources_read_a_clock():
    importers = [
        str(path.relative_to(ROOT))
        for path in MODULES
        if path.parent.name != "commands" and imports(path) & {"time", "datetime"}
    ]
    assert importers == ["mm_edge/sources.py"]


def test_rclpy_is_imported_by_the_ros_package_alone():
    folders = ("mm_edge", "training", "export", "launch", "ros2_ws")
    importers = {f for f in folders for path in (ROOT / f).rglob("*.py") if "rclpy" in imports(path)}
    assert importers == {"ros2_ws"}
