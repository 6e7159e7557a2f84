"""Who else commands the robot, the services that hold it, let it go and reset what is latched, and when the
node is to end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rclpy.node import Node
from std_srvs.srv import Trigger

from flashrt_ros.core.problem import Problem
from flashrt_ros.core.reasons import Reason

if TYPE_CHECKING:
    from .pipeline import Pipeline

LAST_REPORTS = 1.2  # longer than the periods of ~/status and /diagnostics [s]
NOT_CONFIGURED = "no policy is loaded: configure the node first"
NOT_ACTIVE = "the node is not active: nothing is commanded"


def other_publishers(node: Node, topics: Sequence[str], own_publishers: bool) -> Problem | None:
    """COMMAND_CONFLICT, naming topics and nodes, when anyone but this node publishes on one of `topics`.

    `own_publishers`: whether this node has one on each. Takes microseconds while there is no other. A
    publisher is seen once discovery has found it.
    """
    own = node.get_fully_qualified_name()
    found = []
    for topic in topics:
        if node.count_publishers(topic) <= own_publishers:
            continue
        names = [_full_name(info) for info in node.get_publishers_info_by_topic(topic)]
        if own_publishers and own in names:
            names.remove(own)  # once: a second node of this name is another
        if names:
            found.append(f"{', '.join(sorted(names))} on {topic}")
    if not found:
        return None
    text = f"another node publishes commands: {'; '.join(found)}: stop it, or set allow_other_publishers"
    return Problem(Reason.COMMAND_CONFLICT, "", text)


def _full_name(info: object) -> str:
    namespace, name = getattr(info, "node_namespace", ""), getattr(info, "node_name", "")
    return f"{namespace.rstrip('/')}/{name}"


class Ending:
    """When a node that starts itself ends itself, because only another process can go on."""

    def __init__(self) -> None:
        self._since: float | None = None  # [s, monotonic]

    def due(self, pipeline: Pipeline) -> bool:
        """Whether now: the fault is for good, has been reported for LAST_REPORTS, and the robot stands still.

        Never for a node that was held or deactivated, or that has another fault for somebody to look at: the
        one that follows it would drive the robot.
        """
        control, latch = pipeline.control, pipeline.latch
        lost = latch.for_good and latch.unseen is None
        if not lost or not pipeline.active or pipeline.held or control is None:
            self._since = None
            return False
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        moving = pipeline.commander.moving and control.running
        return not moving and now - self._since >= LAST_REPORTS


def create_services(
    node: Node, pipeline: Callable[[], Pipeline | None], conflict: Callable[[], Problem | None]
) -> None:
    """~/hold, ~/resume, ~/reset and ~/reset_fault. `conflict` says who else commands the robot now."""
    handlers: dict[str, Callable[[Pipeline], str]] = {
        "hold": _hold,
        "resume": _resume,
        "reset": _reset,
        "reset_fault": lambda it: _reset_fault(it, conflict()),
    }

    def answer(handler: Callable[[Pipeline], str]) -> Callable[..., Trigger.Response]:
        def call(_: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
            it = pipeline()
            refusal = NOT_CONFIGURED if it is None else handler(it)
            response.success, response.message = not refusal, refusal
            return response

        return call

    for name, handler in handlers.items():
        node.create_service(Trigger, f"~/{name}", answer(handler))


# Each returns why it refuses, "" when it does not.


def _hold(pipeline: Pipeline) -> str:
    if not pipeline.active:
        return NOT_ACTIVE
    pipeline.hold()
    return ""


def _resume(pipeline: Pipeline) -> str:
    if not pipeline.active:
        return NOT_ACTIVE
    fault = pipeline.resume()
    return "" if fault is None else f"a fault is latched ({fault}): nothing was changed"


def _reset(pipeline: Pipeline) -> str:
    pipeline.new_episode()
    return ""


def _reset_fault(pipeline: Pipeline, conflict: Problem | None) -> str:
    latched = pipeline.latch.fault
    if pipeline.latch.for_good:
        return f"~/reset_fault cannot help: {latched}"
    if latched is not None and latched.reason is Reason.COMMAND_CONFLICT and conflict is not None:
        return f"the fault is still there: {conflict.message}"
    pipeline.reset_fault()  # also ends a row of failures that has not latched yet
    return "" if pipeline.fault is None else str(pipeline.fault)
