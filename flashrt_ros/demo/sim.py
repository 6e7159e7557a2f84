"""The demo's arm: MuJoCo physics and off-screen cameras, no ROS.

`ArmSim` steps the physics; `CameraRenderer` draws a state of it. They share only the (constant) model, so one
thread can step while another renders.
"""

from __future__ import annotations

import ctypes.util
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

# MuJoCo picks its OpenGL backend when it is imported; a robot computer has no window to draw in.
if "MUJOCO_GL" not in os.environ:
    _libraries = (("egl", "EGL"), ("osmesa", "OSMesa"))
    os.environ["MUJOCO_GL"] = next((gl for gl, lib in _libraries if ctypes.util.find_library(lib)), "disable")
# Mesa's software rasteriser: draw in the calling thread; at these sizes worker threads only cost CPU.
os.environ.setdefault("LP_NUM_THREADS", "0")

import mujoco

MODEL_PATH = Path(__file__).with_name("arm.xml")
CAMERAS = ("base_camera", "wrist_camera")
BAD_STATE = [int(getattr(mujoco.mjtWarning, f"mjWARN_BAD{what}")) for what in ("QPOS", "QVEL", "QACC")]


class SimulationError(RuntimeError):
    """The physics diverged (MuJoCo raised a warning about a bad state)."""


class RenderError(RuntimeError):
    """No OpenGL context for off-screen rendering can be had on this machine."""


@dataclass(frozen=True)
class JointReading:
    """Joints at `time` [s]: positions [rad, m], velocities [rad/s, m/s], efforts [N m, N]; each (dof,)."""

    time: float
    positions: NDArray[np.float64]
    velocities: NDArray[np.float64]
    efforts: NDArray[np.float64]


class ArmSim:
    """Physics of the arm and its table. Not thread-safe: the owner locks.

    Public: model (shared with renderers, constant), joint_names in actuator order, lower, upper and home
    (dof,) [rad, m], timestep [s].
    """

    def __init__(self, model_path: Path = MODEL_PATH) -> None:
        self.model = mujoco.MjModel.from_xml_path(str(model_path))
        self._data = mujoco.MjData(self.model)
        joints = self.model.actuator_trnid[:, 0]
        self.joint_names = tuple(self.model.joint(joint).name for joint in joints)
        self.lower = self.model.actuator_ctrlrange[:, 0].copy()
        self.upper = self.model.actuator_ctrlrange[:, 1].copy()
        self.home = self.model.key("home").ctrl.copy()
        self.timestep = float(self.model.opt.timestep)
        self._qpos_index = self.model.jnt_qposadr[joints]
        self._dof_index = self.model.jnt_dofadr[joints]
        self.reset()

    @property
    def time(self) -> float:
        """Simulated time [s]."""
        return float(self._data.time)

    def reset(self) -> None:
        """Back to the home pose, blocks in their places, time 0."""
        mujoco.mj_resetDataKeyframe(self.model, self._data, self.model.key("home").id)
        mujoco.mj_forward(self.model, self._data)

    def step(self, targets: NDArray[np.float64], count: int = 1) -> None:
        """Advance `count` timesteps towards targets (dof,) [rad, m], which MuJoCo clamps to the limits.

        Raises ValueError for targets of another shape or not finite, SimulationError if the physics diverged.
        """
        if targets.shape != self.lower.shape or not np.all(np.isfinite(targets)):
            raise ValueError(f"targets must be {self.lower.size} finite numbers, got {targets}")
        self._data.ctrl[:] = targets
        mujoco.mj_step(self.model, self._data, nstep=count)
        # MuJoCo resets a diverged state by itself and only counts a warning.
        if self._data.warning.number[BAD_STATE].any():
            raise SimulationError(f"physics diverged near t = {self.time:.3f} s; it was given {targets}")

    def joints(self) -> JointReading:
        """The joints as they are now."""
        data = self._data
        return JointReading(
            self.time,
            data.qpos[self._qpos_index].copy(),
            data.qvel[self._dof_index].copy(),
            data.actuator_force.copy(),
        )

    def state(self) -> NDArray[np.float64]:
        """Generalised positions (nq,) of everything in the scene, what `CameraRenderer.render` takes."""
        state: NDArray[np.float64] = self._data.qpos.copy()
        return state


class CameraRenderer:
    """Draws camera images of scene states. Create, use and close it in one thread: it owns an OpenGL context.

    Raises RenderError on creation when the machine has no way to render off-screen.
    """

    def __init__(self, model: mujoco.MjModel, width: int, height: int) -> None:
        self._model = model
        self._data = mujoco.MjData(model)
        try:
            self._renderer = mujoco.Renderer(model, height, width)
        except Exception as error:  # the kind differs by backend
            raise RenderError(
                f"cannot render off-screen with MUJOCO_GL={os.environ['MUJOCO_GL']} ({error}): "
                "install libegl1 and libgl1-mesa-dri (or libosmesa6)"
            ) from error

    def render(self, state: NDArray[np.float64], camera: str) -> NDArray[np.uint8]:
        """RGB image (height, width, 3) of scene state (nq,) as `ArmSim.state` gives it."""
        self._data.qpos[:] = state
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_camlight(self._model, self._data)
        self._renderer.update_scene(self._data, camera)
        image: NDArray[np.uint8] = self._renderer.render()
        return image

    def close(self) -> None:
        """Free the OpenGL context; safe to call twice."""
        self._renderer.close()

    def __enter__(self) -> CameraRenderer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
