"""package.xml, pyproject.toml and the requirement files agree with each other and with the sources."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest
from catkin_pkg.package import parse_package

import flashrt_runtime

ROOT = Path(__file__).resolve().parents[3]

# Import name -> PyPI name, where they differ.
DISTRIBUTIONS = {
    "cv2": "opencv-python-headless",
    "yaml": "pyyaml",
    "PIL": "pillow",
    "prometheus_client": "prometheus-client",
    "python_multipart": "python-multipart",
}


def imported(folder: Path) -> set[str]:
    """Third-party top-level modules imported at module level or inside functions under `folder`."""
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"flashrt_runtime", "flashrt_ros"}


def test_one_version() -> None:
    package = parse_package(ROOT / "package.xml")
    assert package.version == flashrt_runtime.__version__


def test_package_xml_check(tmp_path: Path) -> None:
    """The check passes the manifest, and finds what it is there to find."""
    spec = importlib.util.spec_from_file_location("check", ROOT / "scripts" / "check_package_xml.py")
    assert spec is not None
    assert spec.loader is not None
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    assert check.problems(ROOT / "package.xml") == []

    text = (ROOT / "package.xml").read_text()
    broken = tmp_path / "package.xml"
    licence = "<license>Apache-2.0</license>"
    for wrong, expected in [
        (text.replace(licence, ""), "license"),
        (
            text.replace(licence, "").replace("</package>", f"{licence}</package>"),
            "must come before <export>",
        ),
        (
            text.replace("<exec_depend>rclpy<", "<run_depend>rclpy<").replace("rclpy</exec", "rclpy</run"),
            "run_dep",
        ),
    ]:
        assert wrong != text
        broken.write_text(wrong)
        assert any(expected in problem for problem in check.problems(broken)), expected


def test_runtime_imports_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    optional = (line for name in ("jax", "datasets", "plot", "server") for line in extras[name])
    lines = [*project["dependencies"], *optional]
    declared = {re.split(r"[<>=!\[ ;]", line)[0].lower() for line in lines}
    # Imported by the parity command only, in an environment of its own.
    modules = imported(ROOT / "flashrt_runtime") - {"lerobot", "transformers", "openpi"}
    needed = {DISTRIBUTIONS.get(module, module).lower() for module in modules}
    assert needed <= declared, f"pyproject.toml does not declare {sorted(needed - declared)}"


def test_ros_imports_are_declared() -> None:
    package = parse_package(ROOT / "package.xml")
    declared = {depend.name for depend in [*package.exec_depends, *package.build_depends]}
    modules = imported(ROOT / "flashrt_ros") | imported(ROOT / "launch")
    pattern = re.compile(r"_msgs$|_srvs$|_interfaces$|^rclpy$|^launch|^rosbag2|^cv_bridge$")
    ros = {name for name in modules if pattern.search(name)}
    assert ros, "no ROS import found: this test reads the wrong folder"
    assert ros <= declared, f"package.xml does not declare {sorted(ros - declared)}"


@pytest.mark.parametrize("folder", ["flashrt_runtime", "flashrt_ros/core"])
def test_imports_point_one_way(folder: str) -> None:
    modules = imported(ROOT / folder)
    assert not {
        name for name in modules if re.match(r"(rclpy|launch.*|.*_msgs|.*_srvs|.*_interfaces)$", name)
    }
    if folder == "flashrt_ros/core":
        assert "torch" not in modules
    else:
        sources = "".join(path.read_text() for path in (ROOT / folder).rglob("*.py"))
        assert not re.search(r"^\s*(from|import) flashrt_ros\b", sources, re.MULTILINE)


def test_requirements_are_pinned() -> None:
    """Every direct requirement has one exact version, here or in the constraints."""
    folder = ROOT / "scripts" / "requirements"
    pins = set()
    for line in (folder / "constraints.txt").read_text().splitlines():
        if "==" in line:
            pins.add(re.sub(r"[-_.]+", "-", line.split("==")[0]).lower())
    for name in ("build", "dev", "openpi_client", "ros", "runtime", "torch"):
        for line in (folder / f"{name}.txt").read_text().splitlines():
            requirement = line.split("#")[0].strip()
            if requirement and "==" not in requirement:
                bare = re.split(r"[<>=\[; ]", requirement)[0]
                assert re.sub(r"[-_.]+", "-", bare).lower() in pins, f"{name}.txt: {requirement} has no pin"
