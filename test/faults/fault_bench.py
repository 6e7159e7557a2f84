"""The demo robot and the policy node under faults: causes, and what the robot was told."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from ros_rig import Rig, RosProcess, wait_until
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from flashrt_ros.bringup import PACKAGE, NodeSpec, node_environment
from flashrt_ros.core.contract import load_contract
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.timing import stamp_to_ns, to_s
from flashrt_ros.msg import ActionChunk, PolicyStatus
from flashrt_ros.runner import node_command
from flashrt_ros.srv import SetPrompt

HERE = Path(__file__).resolve().parent
# What the machine's load may add to a time that is measured through two processes [s].
SLACK = 0.25
NODE = "/policy_node"
QUIET = 0.4  # commands that stand still for this long are a hold, not a turning point [s]
HEALTHY: dict[str, Any] = {
    "base_camera.drop": 0.0, "base_camera.delay": 0.0, "base_camera.freeze_stamp": False,
    "base_camera.stamp_offset": 0.0, "base_camera.truncate": 1.0, "base_camera.width": 96,
    "base_camera.encoding": "rgb8", "wrist_camera.drop": 0.0, "wrist_camera.freeze_stamp": False,
    "wrist_camera.stamp_offset": 0.0, "wrist_camera.truncate": 1.0, "joint_states.drop": 0.0,
    "joint_states.missing": "", "joint_states.rename": "", "joint_states.reverse": False,
    "joint_states.nan": "", "joint_states.inf": "",
}
_PARAMETERS = {bool: ("BOOL", "bool"), int: ("INTEGER", "integer"), float: ("DOUBLE", "double")}


def moving(command: JointTrajectory) -> bool:
    """Whether a command asks for any motion."""
    positions = np.array([point.positions for point in command.points])
    return bool((positions != positions[0]).any())


class FaultBench:
    """One robot and one node in a domain of their own, both restarted when a row has left them unusable."""

    def __init__(self, rig: Rig, contract: Path, checkpoint: Path, scratch: Path) -> None:
        self.rig = rig
        self.contract = load_contract(contract)
        timeline, sync = self.contract.timeline, self.contract.sync
        # The last observation may be as old as max_age, and its chunk be followed to the cap.
        self.watchdog = to_s(timeline.open_loop_cap + sync.max_age + self.contract.rates.control_period)
        self._contract_path, self._checkpoint = contract, checkpoint
        self._order_file, self._orders = scratch / "order.json", 0
        self.commands = rig.collect(JointTrajectory, "/arm_controller/joint_trajectory", 200)
        self.statuses = rig.collect(PolicyStatus, "/policy_node/status")
        self.reports = rig.collect(DiagnosticArray, "/diagnostics")
        self.chunks = rig.collect(ActionChunk, "/policy_node/action_chunk", 200)
        self.node: RosProcess | None = None
        self.robot: RosProcess | None = None

    # Processes

    def start_node(self, namespace: str = "", **parameters: Any) -> RosProcess:
        """The node with faults on demand, configured and activated."""
        self.order()
        values = {
            "checkpoint": str(self._checkpoint), "robot": str(self._contract_path), "prompt": "wave",
            "autostart": True, **parameters,
        }
        spec = NodeSpec(PACKAGE, "policy_node", "policy_node", namespace, parameters=values)
        command = [sys.executable, str(HERE / "fault_node.py"), *node_command(spec)[1:]]
        return self.rig.start(command, {**node_environment(), "FLASHRT_FAULT_ORDER": str(self._order_file)})

    def start_robot(self, namespace: str = "", **parameters: Any) -> RosProcess:
        """The demo robot with small images."""
        sides = {f"{camera}.{side}": 96 for camera in ("base_camera", "wrist_camera")
                 for side in ("width", "height")}
        spec = NodeSpec(
            PACKAGE, "demo_robot_node", "demo_robot", namespace, parameters={**sides, **parameters}
        )
        return self.rig.start(node_command(spec), node_environment())

    def ready(self) -> None:
        """Robot and node run, and the arm moves; both are started again when it does not."""
        if self.robot is None or not self.robot.running:
            self.robot = self.start_robot()
        if self.node is None or not self.node.running:
            self.node = self.start_node()
        try:
            self.wait_running(timeout=60.0)
        except AssertionError:
            for process in (self.robot, self.node):
                self.rig.forget(process)
            self.robot, self.node = self.start_robot(), self.start_node()
            self.wait_running(timeout=60.0)

    def heal(self) -> None:
        """End every cause, whether the row did so or failed before."""
        self.order()
        if self.robot is not None and self.robot.running:
            self.set_parameters("/demo_robot", HEALTHY)
        if self.node is not None and self.node.running:
            self.set_parameters("/policy_node", {"limits.on_violation": "", "rates.inference": -1.0})
            for name in ("reset_fault", "resume"):
                self.call(name)
            self.rig.call(SetPrompt, "/policy_node/set_prompt", prompt="wave", reset=False)

    # Causes

    def order(self, fault: str = "none", count: int = 0, **more: Any) -> None:
        """See fault_node."""
        self._orders += 1
        text = json.dumps({"id": self._orders, "fault": fault, "count": count, **more})
        new = self._order_file.with_suffix(".new")
        new.write_text(text)
        new.replace(self._order_file)  # the node must never read half an order

    def set_robot(self, **options: Any) -> None:
        """Options of the robot's streams; "." in a name is "__" here."""
        values = {name.replace("__", "."): value for name, value in options.items()}
        self.set_parameters("/demo_robot", values)

    def set_parameters(self, node: str, values: dict[str, Any]) -> None:
        settings = []
        for name, value in values.items():
            kind, field = _PARAMETERS.get(type(value), ("STRING", "string"))
            number = getattr(ParameterType, f"PARAMETER_{kind}")
            settings.append(Parameter(
                name=name, value=ParameterValue(type=number, **{f"{field}_value": value})
            ))
        results = self.rig.call(SetParameters, f"{node}/set_parameters", parameters=settings).results
        assert all(result.successful for result in results), [result.reason for result in results]

    def call(self, name: str) -> Any:
        return self.rig.call(Trigger, f"/policy_node/{name}")

    def change(self, transition: int) -> bool:
        request = Transition(id=transition)
        return bool(self.rig.call(
            ChangeState, "/policy_node/change_state", timeout=60.0, transition=request
        ).success)

    # Effects

    def wait_running(self, since: float | None = None, timeout: float = 30.0) -> None:
        """State RUNNING, and a command that moves the arm."""
        since = time.monotonic() if since is None else since
        self.statuses.wait_for(
            lambda message: message.state == PolicyStatus.STATE_RUNNING, timeout=timeout, since=since
        )
        self.commands.wait_for(moving, timeout=10.0, since=since)

    def wait_state(self, state: int, since: float, timeout: float = 10.0) -> PolicyStatus:
        found: PolicyStatus = self.statuses.wait_for(lambda m: m.state == state, timeout=timeout, since=since)
        return found

    def counts(self, node: str = NODE) -> dict[str, str]:
        """Values of the newest /diagnostics entry of `node`."""
        entries = [values for report in self.reports.messages if (values := entry_of(report, node))]
        return entries[-1] if entries else {}

    def wait_code(
        self, reasons: tuple[Reason, ...], since: float, before: dict[str, str], node: str = NODE
    ) -> str:
        """The first of `reasons` that /diagnostics names as the present one of `node`, or counts more often
        than `before`; fails after some seconds."""
        codes = [reason.name for reason in reasons]

        def named(report: DiagnosticArray) -> str:
            values = entry_of(report, node)
            for code in codes:
                if values.get("code") == code:
                    return code
                for kind in ("problems", "chunks_dropped"):
                    key = f"{kind}.{code.lower()}"
                    if int(values.get(key, 0)) > int(before.get(key, 0)):
                        return code
            return ""

        try:
            return named(self.reports.wait_for(lambda report: bool(named(report)), timeout=15.0, since=since))
        except AssertionError as error:
            entries = [entry_of(report, node) for report in self.reports.since(since)]
            seen = [values["code"] for values in entries if values]
            raise AssertionError(f"expected one of {codes} in /diagnostics, got {seen}") from error

    def last_motion(self, since: float) -> float:
        """When the last command that moves the arm came; `since` when none did [s, monotonic]."""
        entries = self.commands.entries
        times = [received for received, command in entries if received > since and moving(command)]
        return times[-1] if times else since

    def wait_hold(self, since: float) -> float:
        """Wait until commands keep the arm still or end; seconds from `since` to the last that moved it."""
        wait_until(
            lambda: time.monotonic() - max(self.last_motion(since), since) > QUIET, self.watchdog + 5.0,
            "commands that hold",
        )
        return self.last_motion(since) - since

    def check_cap(self, since: float) -> None:
        """No command after the open-loop cap of a chunk, and none that reaches further ahead than that."""
        cap, period = self.contract.timeline.open_loop_cap, self.contract.rates.control_period
        due = [stamp_to_ns(chunk.header.stamp) for chunk in self.chunks.messages]
        for command in filter(moving, self.commands.since(since)):
            stamp = stamp_to_ns(command.header.stamp)
            assert any(-2 * period <= stamp - start <= cap + 2 * period for start in due), "beyond the cap"
            assert stamp_to_ns(command.points[-1].time_from_start) <= cap
            positions = np.array([point.positions for point in command.points])
            assert np.isfinite(positions).all()

    def never_stops(self, begin: float, seconds: float) -> None:
        """From `begin` on, for `seconds`: no pause in commands that move the arm."""
        wait_until(lambda: time.monotonic() > begin + seconds, seconds + 2.0, "time to pass")
        times = [received for received, command in self.commands.entries
                 if begin <= received <= begin + seconds and moving(command)]
        gaps = np.diff([begin, *times, begin + seconds])
        assert gaps.max() < QUIET, f"no motion for {gaps.max():.2f} s"


def entry_of(report: DiagnosticArray, node: str = NODE) -> dict[str, str]:
    """Values of the entry of a policy node; empty for a report of someone else."""
    for status in report.status:
        if status.name == f"{node}: policy":
            return {item.key: item.value for item in status.values}
    return {}
