"""Rows 23, 25 and 27: what is found out at configure. The node stays up, commands nothing, and says why.

The real node in this process, which has paid for its imports; parameters, contract and checkpoint are real.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path

import pytest
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from fault_bench import entry_of
from fault_table import NOT_COMMANDING, Outcome
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter
from ros_rig import Collector, Rig, nodes_here, wait_until

from flashrt_ros.core.reasons import Reason
from flashrt_ros.nodes.policy_node import PolicyNode, load_policy

SUCCESS, FAILURE = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE


@contextlib.contextmanager
def make_nodes(rig: Rig, defaults: dict[str, str]):
    """make(parameter=…, load=…) -> an unconfigured policy node in the domain of `rig`."""
    with nodes_here(rig) as (context, made):

        def make(load=load_policy, **parameters) -> PolicyNode:
            overrides = [Parameter(name, value=value) for name, value in {**defaults, **parameters}.items()]
            made.append(PolicyNode(load, context=context, parameter_overrides=overrides))
            return made[-1]

        yield make


@pytest.fixture
def rig():
    rig = Rig()
    yield rig
    rig.close()


@pytest.fixture
def reports(rig: Rig) -> Collector:
    return rig.collect(DiagnosticArray, "/diagnostics")


@pytest.fixture
def node(rig: Rig, contract_path: Path, checkpoint: Path):
    values = {"checkpoint": str(checkpoint), "robot": str(contract_path), "prompt": "wave"}
    with make_nodes(rig, values) as make:
        yield make


def refused(node: PolicyNode, reports: Collector, reason: Reason, *words: str) -> str:
    """Configure must fail and leave an unconfigured node that says so on /diagnostics; returns the code
    there."""
    assert node.trigger_configure() == FAILURE
    report = node.report()
    assert (report.state, report.reason) == (report.STATE_UNCONFIGURED, reason), report.message
    assert all(word in report.message for word in words), report.message
    assert node.count_publishers("/arm_controller/joint_trajectory") == 0
    begin = time.monotonic()
    with spinning(node) as spin:
        wait_until(lambda: spin() or reports.since(begin), 10.0, "a report on /diagnostics")
    received = reports.since(begin)[0]
    assert received.status[0].level == DiagnosticStatus.ERROR
    code = entry_of(received)["code"]
    assert code == reason.name
    return code


@contextlib.contextmanager
def spinning(node: PolicyNode):
    """spin() does what the node's executor has to do now."""
    executor = SingleThreadedExecutor(context=node.context)
    executor.add_node(node)
    try:
        yield lambda: executor.spin_once(timeout_sec=0.05)
    finally:
        executor.remove_node(node)
        executor.shutdown()


def works(node: PolicyNode) -> None:
    assert node.trigger_configure() == SUCCESS, node.report().message
    assert node.trigger_activate() == SUCCESS


def test_23_gpu_out_of_memory_at_configure(node, reports, passed) -> None:
    """Simulated, as there may be no GPU: the loader raises what torch raises, and then loads."""
    import torch

    full = [True]

    def load(values, contract):
        if full:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.50 GiB")
        return load_policy(values, contract)

    it = node(load)
    code = refused(it, reports, Reason.OUT_OF_MEMORY, "7.50 GiB")
    full.clear()
    works(it)
    cause = "GPU out of memory at configure (simulated)"
    passed(Outcome(23, cause, code, NOT_COMMANDING, "by configuring again"))


def test_25_corrupt_checkpoint(node, reports, checkpoint: Path, tmp_path: Path, passed) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    weights = damaged / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    it = node(checkpoint=str(damaged))
    code = refused(it, reports, Reason.CHECKPOINT_INVALID, str(damaged))
    weights.write_bytes(whole)
    works(it)
    passed(Outcome(25, "corrupt checkpoint", code, NOT_COMMANDING, "by configuring again"))


def test_27_corrupt_contract(node, reports, contract_path: Path, tmp_path: Path, passed) -> None:
    damaged = tmp_path / "robot.yaml"
    whole = contract_path.read_text()
    damaged.write_text(whole[: len(whole) // 2] + "\n  {")
    it = node(robot=str(damaged))
    code = refused(it, reports, Reason.CONTRACT_INVALID, str(damaged))
    damaged.write_text(whole)
    works(it)
    passed(Outcome(27, "corrupt contract", code, NOT_COMMANDING, "by configuring again"))
