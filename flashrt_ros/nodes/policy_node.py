"""The policy node: a lifecycle node that drives a robot with a vision-language-action policy.

The executor's thread moves messages and answers services; the model has a worker thread, commands have a
control thread (see pipeline.py).
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.executors import Executor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.signals import SignalHandlerOptions
from rclpy.subscription import Subscription

from flashrt_ros.core.commander import Output
from flashrt_ros.core.contract import RobotContract, load_contract
from flashrt_ros.core.problem import Problem
from flashrt_ros.core.reasons import Reason
from flashrt_ros.msg import ActionChunk, PolicyStatus
from flashrt_ros.srv import Calibrate, SetPrompt

from . import parameters, services, status, streams
from .executors import make_executor
from .exotic_images import cv_bridge_decoder
from .failures import EXPECTED, describe, reason_of
from .outputs import CommandPublisher, chunk_message
from .parameters import PolicyParameters
from .pipeline import Pipeline, PlacedChunk
from .policy_runner import PolicyLike

STATUS_PERIOD = 0.5  # [s]
DIAGNOSTICS_PERIOD = 1.0  # [s]
WAKE_PERIOD = 0.05  # how soon a stream that fell silent is noticed [s]
LOG_PERIOD = 2.0  # between two warnings of the same reason and stream [s]
FIRST_MESSAGE = 1.0  # a stream may take this long after activation before the log asks where it is [s]
# How long a thread may have to wait for the Python code of another [s]: with the default, 5 ms, the control
# thread would be late by that much.
SWITCH_INTERVAL = 0.0005
WORKER_NICENESS = 5
# A second signal after this long ends the process at once, whatever the model does; the hold went out [s].
PATIENCE = 2.0

PolicyLoader = Callable[[PolicyParameters, RobotContract], PolicyLike]


def load_policy(values: PolicyParameters, contract: RobotContract) -> PolicyLike:
    """The real policy, by flashrt_runtime; called on the worker thread. Raises its errors."""
    import torch

    import flashrt_runtime

    # More threads than one make the latency of everything else in this process unpredictable.
    torch.set_num_threads(1)
    # This is the worker's own thread: on a CPU that both need, the control thread goes first.
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WORKER_NICENESS)
    return flashrt_runtime.load_model(
        values.checkpoint,
        framework=values.framework,
        config=values.config,
        num_views=len(contract.views),
        hardware=values.hardware,
        precision=values.precision,
        num_steps=values.num_steps,
    )


class PolicyNode(LifecycleNode):
    """ROS interface of a Pipeline: parameters, topics, services and life cycle."""

    def __init__(
        self, load: PolicyLoader = load_policy, stopping: Callable[[], bool] = lambda: False, **options: Any
    ) -> None:
        """`stopping` is asked while a checkpoint loads whether to give up; `options` are those of a Node."""
        super().__init__("policy_node", **options)
        parameters.declare(self)
        self.add_on_set_parameters_callback(self._judge_parameters)
        self._load = load
        self._stopping = stopping
        self._values: PolicyParameters | None = None
        self._pipeline: Pipeline | None = None
        self._configure_problem = status.NONE
        self._warned: dict[tuple[Reason, str], float] = {}  # when each was last logged [s, monotonic]
        self._commands: CommandPublisher | None = None
        self._stream_subscriptions: list[Subscription] = []
        self._chunks = self.create_publisher(ActionChunk, "~/action_chunk", 10)
        self._status = self.create_publisher(PolicyStatus, "~/status", 10)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_service(SetPrompt, "~/set_prompt", lambda q, a: services.set_prompt(self._pipeline, q, a))
        self.create_service(Calibrate, "~/calibrate", lambda q, a: services.calibrate(self._pipeline, q, a))
        # Reports must go on when simulated time stands still.
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(STATUS_PERIOD, self._publish_status, clock=steady)
        self.create_timer(DIAGNOSTICS_PERIOD, self._publish_diagnostics, clock=steady)
        self.create_timer(WAKE_PERIOD, self._wake, clock=steady)

    @property
    def autostart(self) -> bool:
        """Whether the node is to configure and activate itself."""
        return bool(self.get_parameter("autostart").value)

    def _judge_parameters(self, changes: list[Parameter]) -> SetParametersResult:
        """A change that would be accepted without effect is refused."""
        fixed = [change.name for change in changes if change.name in parameters.READ_AT_CONFIGURE]
        if self._pipeline is None or not fixed:
            return SetParametersResult(successful=True)
        reason = f"{', '.join(fixed)}: read at configure: deactivate and clean up first"
        return SetParametersResult(successful=False, reason=reason)

    # Life cycle

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Read parameters and contract, load the checkpoint, check one against the other, subscribe."""
        self._configure_problem = status.NONE
        try:
            self._configure()
        except Exception as error:
            self._release()
            problem = Problem(reason_of(error, Reason.CHECKPOINT_INVALID), "", describe(error))
            self._configure_problem = problem
            self.get_logger().error(f"cannot configure: {problem}")
            if not isinstance(error, (*EXPECTED, InterruptedError)):
                self.get_logger().debug("traceback of the error above", exc_info=True)
            return TransitionCallbackReturn.FAILURE
        # What lives now lives long: the collector need not look at it again, and its pauses stay short.
        gc.collect()
        gc.freeze()
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Begin to infer and to command."""
        assert self._pipeline is not None
        self._pipeline.start()
        self._pipeline.wake()
        self.get_logger().info("active" + (" (dry run: no commands are sent)" if self._dry_run else ""))
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Send a hold, then no more commands."""
        assert self._pipeline is not None
        self._pipeline.stop()
        self.get_logger().info("inactive: no more commands")
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the model and the contract's topics."""
        self._release()
        gc.unfreeze()
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """As deactivate and cleanup."""
        self._release()
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Back to unconfigured, with nothing commanded and nothing loaded."""
        self._release()
        return TransitionCallbackReturn.SUCCESS

    def _LifecycleNodeMixin__change_state(self, transition_id: int) -> TransitionCallbackReturn:
        """Refuse a transition that the state does not have, where rclpy's own would end the node."""
        possible = [transition[0] for transition in self._state_machine.available_transitions]
        if transition_id not in possible:
            state = self._state_machine.current_state[1]
            self.get_logger().error(f"transition {transition_id} refused: impossible in state {state}")
            return TransitionCallbackReturn.FAILURE
        return super()._LifecycleNodeMixin__change_state(transition_id)

    def destroy_node(self) -> None:
        """End the threads first: they publish."""
        self._release()
        super().destroy_node()

    @property
    def _dry_run(self) -> bool:
        return self._values is not None and self._values.dry_run

    def _configure(self) -> None:
        values = parameters.read(self)
        contract = load_contract(values.robot)
        pipeline = Pipeline(
            contract,
            self.get_clock(),
            publish_command=self._publish_command,
            publish_chunk=self._publish_chunk,
            on_problem=self._warn,
            fallback_decoder=cv_bridge_decoder(),
            seed=values.seed,
        )
        self._pipeline, self._values = pipeline, values
        pipeline.load(lambda: self._load(values, contract), values.prompt, lambda: not self._stopping())
        self._commands = CommandPublisher(self, contract)
        self._stream_subscriptions = streams.subscribe(
            self, contract, pipeline.synchroniser, on_image=pipeline.wake
        )
        assert pipeline.policy is not None
        self.get_logger().info(
            f"configured: {values.checkpoint} on robot {contract.robot}, "
            f"precision {pipeline.policy.precision}, commands on {', '.join(self._commands.topics())}"
        )

    def _release(self) -> None:
        """Back to nothing, from any state; may be called twice."""
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            try:
                pipeline.close()
            except Exception as error:  # the rest must be taken down all the same
                self.get_logger().error(f"closing: {type(error).__name__}: {error}")
        for subscription in self._stream_subscriptions:
            self.destroy_subscription(subscription)
        self._stream_subscriptions = []
        if self._commands is not None:
            self._commands.destroy(self)
            self._commands = None

    # Messages out: the first on the control thread, the next two on the worker's or the control thread

    def _publish_command(self, output: Output, stamp: int) -> None:
        if self._commands is not None and not self._dry_run:
            self._commands.publish(output, stamp)

    def _publish_chunk(self, placed: PlacedChunk) -> None:
        pipeline = self._pipeline
        if pipeline is None:
            return
        prediction = placed.prediction
        self._chunks.publish(
            chunk_message(
                prediction.actions,
                pipeline.contract,
                due=placed.due,
                prompt=prediction.prompt,
                sequence=placed.accepted.sequence,
                generation=placed.accepted.generation,
                stamps=prediction.observation.stamps,
                inference_time=prediction.inference_time,
            )
        )

    def _warn(self, problem: Problem) -> None:
        pipeline = self._pipeline
        starting = pipeline is not None and pipeline.running_for < FIRST_MESSAGE
        if starting and problem.reason is Reason.NO_MESSAGE:
            return  # every start begins without messages
        # rclpy's own throttle knows this line only: one problem would hide all others.
        key, now = (problem.reason, problem.stream), time.monotonic()
        if now - self._warned.get(key, -LOG_PERIOD) >= LOG_PERIOD:
            self._warned[key] = now
            self.get_logger().warning(str(problem))

    # Timers, on the executor's thread

    def report(self) -> PolicyStatus:
        """What ~/status says now."""
        stamp = self.get_clock().now().to_msg()
        return status.policy_status(self._pipeline, stamp, self._configure_problem)

    def _publish_status(self) -> None:
        self._status.publish(self.report())

    def _publish_diagnostics(self) -> None:
        robot = self._pipeline.contract.robot if self._pipeline is not None else ""
        name = f"{self.get_fully_qualified_name()}: policy"
        self._diagnostics.publish(status.diagnostics(self._pipeline, self.report(), name, robot))

    def _wake(self) -> None:
        if self._pipeline is not None:
            self._pipeline.wake()


def main(args: list[str] | None = None, load: PolicyLoader = load_policy) -> int:
    """Run the node until SIGINT or SIGTERM: 0. With `autostart`, 1 when it cannot start itself."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    stop = threading.Event()
    asked = 0.0

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        now = time.monotonic()
        if not stop.is_set():
            asked = now
            stop.set()
        elif now - asked > PATIENCE:  # a terminal and a launcher may both pass one Ctrl-C on
            os._exit(1)

    # rclpy's own handlers would take the publishers away before the hold could be sent.
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    node = PolicyNode(load, stop.is_set)
    executor = make_executor()
    executor.add_node(node)
    with contextlib.ExitStack() as ending:  # in reverse, each whatever the others raise
        ending.callback(gc.freeze)  # else the interpreter spends most of a second on the collector at its end
        ending.callback(rclpy.try_shutdown)
        ending.callback(node.destroy_node)
        ending.callback(executor.shutdown)
        if node.autostart and not _start(node) and not stop.is_set():
            return 1
        while not stop.is_set():
            _spin_once(executor, node)
        return 0


def _spin_once(executor: Executor, node: PolicyNode) -> None:
    """One callback; what it raises is logged, as a robot must not lose its node to one bad message."""
    try:
        executor.spin_once(timeout_sec=0.1)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        node.get_logger().error(f"callback failed: {text}", throttle_duration_sec=LOG_PERIOD)


def _start(node: PolicyNode) -> bool:
    succeeded = TransitionCallbackReturn.SUCCESS
    return node.trigger_configure() == succeeded and node.trigger_activate() == succeeded


if __name__ == "__main__":
    sys.exit(main())
