"""`pip install .` gives flashrt_runtime alone, complete, and usable where there is no ROS."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

# Runs in the new environment: makes a checkpoint with the installed command line and drives the policy.
USE = """
import sys
import numpy as np
import flashrt_runtime
from flashrt_runtime.ops import native

assert flashrt_runtime.__file__.startswith(sys.prefix), flashrt_runtime.__file__
policy = flashrt_runtime.load_model(sys.argv[1])
images = [np.full((48, 64, 3), 127, np.uint8) for _ in policy.spec.views]
actions = policy.predict(images, prompt="wave", state=np.zeros(policy.spec.state_dim, np.float32), seed=1)
assert actions.shape == (policy.spec.horizon, policy.spec.action_dim)
assert np.isfinite(actions).all()
policy.close()
native.available()
ros = {"rclpy", "flashrt_ros", "std_msgs", "rosidl_parser"} & {name.split(".")[0] for name in sys.modules}
assert not ros, ros
print("used", actions.shape)
"""


def run(*command: object, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources: setuptools writes beside them. The kernels have their own tests."""
    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("flashrt_runtime", "native_kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", out)
    without_kernels = os.environ | {"FLASHRT_BUILD_KERNELS": "0"}
    run(sys.executable, "-m", "pip", "--quiet", "wheel", *options, source, env=without_kernels)
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_the_runtime_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    installed = {name for name in names if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in installed} == {"flashrt_runtime"}
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "flashrt_runtime").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }
    assert installed == sources


def test_usable_without_ros(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    # The heavy dependencies come from this interpreter's environment, as plain directories on the path.
    libraries = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    ours = sysconfig.get_paths()
    (libraries / "heavy.pth").write_text(f"{ours['purelib']}\n{ours['platlib']}\n")
    pip = (sys.executable, "-m", "pip", "--quiet", "--python", python, "install", "--no-deps", "--no-index")
    run(*pip, wheel)

    keep = ("HOME", "LANG", "TMPDIR")
    plain = {name: os.environ[name] for name in keep if name in os.environ} | {"PATH": "/usr/bin:/bin"}
    checkpoint = tmp_path / "checkpoint"
    flashrt = environment / "bin" / "flashrt"
    run(flashrt, "make-checkpoint", "--size", "tiny", "--preset", "demo_arm", "--out", checkpoint, env=plain)
    assert "used (50, 7)" in run(python, "-P", "-c", USE, checkpoint, env=plain)
