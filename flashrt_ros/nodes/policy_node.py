"""The policy node: a lifecycle node that drives a robot with a vision-language-action policy.

The executor's thread moves messages and answers services; the model has a worker thread, commands have a
control thread (see pipeline.py).
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.subscription import Subscription
from std_msgs.msg import String

from flashrt_ros.core.commander import Output
from flashrt_ros.core.contract import RobotContract
from flashrt_ros.core.contract_overrides import contract_of, recontracted
from flashrt_ros.core.parameters import FIXED, PARAMETERS, READ_AT_CONFIGURE, PolicyParameters
from flashrt_ros.core.problem import NONE, Problem
from flashrt_ros.core.reasons import Reason
from flashrt_ros.msg import ActionChunk, LatencyMetrics, PolicyStatus
from flashrt_ros.srv import SetPrompt
from flashrt_runtime.device_loss import EXIT_STATUS

from . import parameters, safety, services, status, streams
from .calibration import Calibrations
from .chunk_service import ChunkService
from .exotic_images import cv_bridge_decoder
from .failures import EXPECTED, describe, reason_of
from .outputs import CommandPublisher, chunk_message
from .pipeline import Pipeline, PlacedChunk
from .policy_runner import PolicyLike
from .running import run
from .scheduling import yield_this_thread

STATUS_PERIOD = 0.5  # [s]
DIAGNOSTICS_PERIOD = 1.0  # also of ~/metrics [s]
WAKE_PERIOD = 0.05  # how soon a stream that fell silent is noticed [s]
GUARD_PERIOD = 0.1  # how soon a second publisher of commands is noticed once it is discovered [s]
LOG_PERIOD = 2.0  # between two warnings of the same reason and stream [s]
FIRST_MESSAGE = 1.0  # a stream may take this long after activation before the log asks where it is [s]

PolicyLoader = Callable[[PolicyParameters, RobotContract], PolicyLike]


def load_policy(values: PolicyParameters, contract: RobotContract) -> PolicyLike:
    """The real policy, by flashrt_runtime; called on the worker thread. Raises its errors."""
    import torch

    import flashrt_runtime
    from flashrt_runtime.checkpoints.open_facts import given

    # More threads than one make the latency of everything else in this process unpredictable.
    torch.set_num_threads(1)
    yield_this_thread()  # this is the worker's own
    rules = [text for part in (values.rules or "").split(",") if (text := part.strip())]
    policy = flashrt_runtime.load_model(
        values.checkpoint,
        framework=values.framework,
        config=values.config,
        num_views=len(contract.views),
        hardware=values.hardware,
        precision=values.precision,
        expert=values.expert,
        num_steps=values.num_steps,
        decode_cuda_graph=values.decode_cuda_graph,
        decode_graph_steps=values.decode_graph_steps,
        rtc=contract.timeline.rtc.mode.value,
        calibration=values.calibration_file,
        **given(values.asset_id, values.action_horizon, values.delta_actions, rules),
    )
    if values.calibration == "required" and not policy.calibrated:
        policy.close()
        raise flashrt_runtime.errors.CalibrationNotFoundError(
            f"parameter calibration is 'required' and there is none for {values.checkpoint} at precision "
            f"{policy.precision} with these views: make one with `flashrt calibrate`, or configure with "
            "calibration:=auto"
        )
    if values.calibration == "required" and policy.weights_missing:
        missing = policy.weights_missing
        policy.close()
        raise flashrt_runtime.errors.CalibrationNotFoundError(
            f"parameter calibration is 'required': {missing}, or configure with calibration:=auto"
        )
    return policy


class PolicyNode(LifecycleNode):
    """ROS interface of a Pipeline: parameters, topics, services and life cycle."""

    def __init__(
        self, load: PolicyLoader = load_policy, stopping: Callable[[], bool] = lambda: False, **options: Any
    ) -> None:
        """`stopping` is asked while a checkpoint loads whether to give up; `options` are those of a Node."""
        super().__init__("policy_node", **options)
        parameters.declare(self)
        self.add_on_set_parameters_callback(self._judge_parameters)
        self.add_post_set_parameters_callback(self._adopt_parameters)
        self._load = load
        self._stopping = stopping
        self._values: PolicyParameters | None = None
        self._pipeline: Pipeline | None = None
        self._transition_problem = NONE  # why the last configure or activate failed
        self.exit_status = 0  # when it is another, the process is to end with it
        self._ending = safety.Ending()
        self._warned: dict[tuple[Reason, str], float] = {}  # when each was last logged [s, monotonic]
        self._commands: CommandPublisher | None = None
        self._stream_subscriptions: list[Subscription] = []
        self._chunks = self.create_publisher(ActionChunk, "~/action_chunk", 10)
        self._status = self.create_publisher(PolicyStatus, "~/status", 10)
        self._metrics = self.create_publisher(LatencyMetrics, "~/metrics", 10)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_service(SetPrompt, "~/set_prompt", lambda q, a: services.set_prompt(self._pipeline, q, a))
        self._calibrations = Calibrations(self, lambda: self._pipeline, self._on_calibration)
        ChunkService(self, lambda: self._pipeline)
        safety.create_services(self, lambda: self._pipeline, self._conflict)
        # Reports must go on when simulated time stands still.
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(STATUS_PERIOD, self._publish_status, clock=steady)
        self.create_timer(DIAGNOSTICS_PERIOD, self._publish_diagnostics, clock=steady)
        self.create_timer(WAKE_PERIOD, self._wake, clock=steady)
        self.create_timer(GUARD_PERIOD, self._guard_commands, clock=steady)

    @property
    def autostart(self) -> bool:
        """Whether the node is to configure and activate itself."""
        return bool(self.get_parameter("autostart").value)

    @property
    def start_status(self) -> int:
        """What the process ends with when the node could not configure and activate itself."""
        return EXIT_STATUS if self._transition_problem.reason is Reason.DEVICE_LOST else 1

    def _judge_parameters(self, changes: list[Parameter]) -> SetParametersResult:
        """A change that would be accepted without effect is refused, and so is one to a value of no use."""
        if self._pipeline is None or self._values is None:
            return SetParametersResult(successful=True)
        fixed = [change.name for change in changes if change.name in READ_AT_CONFIGURE]
        if fixed:
            return SetParametersResult(successful=False, reason=f"{', '.join(fixed)}: {FIXED}")
        try:
            values = self._values.changed({change.name: change.value for change in changes})
            recontracted(self._pipeline.contract, values)
        except Exception as error:
            return SetParametersResult(successful=False, reason=describe(error))
        return SetParametersResult(successful=True)

    def _adopt_parameters(self, changes: list[Parameter]) -> None:
        """Put what was judged in force."""
        names = {spec.name for spec in PARAMETERS}
        given = {change.name: change.value for change in changes if change.name in names}
        if self._pipeline is None or self._values is None or not given:
            return
        values = self._values.changed(given)
        self._pipeline.adopt_limits(recontracted(self._pipeline.contract, values), values.max_policy_failures)
        self._pipeline.runner.wait_for_frame = values.wait_for_frame
        self._values = values

    # Life cycle

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Read parameters and contract, load the checkpoint, check one against the other, subscribe."""
        self._transition_problem = NONE
        try:
            self._configure()
        except Exception as error:
            self._release()
            problem = Problem(reason_of(error, Reason.CHECKPOINT_INVALID), "", describe(error))
            self._transition_problem = problem
            self.get_logger().error(f"cannot configure: {problem}")
            if not isinstance(error, (*EXPECTED, InterruptedError)):
                self.get_logger().debug("traceback of the error above", exc_info=True)
            return TransitionCallbackReturn.FAILURE
        # What lives now lives long: the collector need not look at it again, and its pauses stay short.
        gc.collect()
        gc.freeze()
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Begin to infer and to command, unless a fault is latched, a calibration runs, or somebody else
        commands the robot: another node, or a thread of the last activation."""
        assert self._pipeline is not None
        pipeline = self._pipeline
        problem = pipeline.latch.fault or pipeline.stuck or self._conflict()
        problem = problem or self._calibrations.hinders(pipeline)
        self._transition_problem = problem or NONE
        if problem is not None:
            self.get_logger().error(f"cannot activate: {problem}")
            return TransitionCallbackReturn.FAILURE
        self._calibrations.before_activation(pipeline)
        if self._commands is not None and not self._dry_run:
            self._commands.open()
        pipeline.start()
        self._calibrations.after_activation(pipeline)
        pipeline.wake()
        self.get_logger().info("active" + (" (dry run: no commands are sent)" if self._dry_run else ""))
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Send a hold, then no more commands."""
        assert self._pipeline is not None
        self._pipeline.stop()
        if self._commands is not None:
            self._commands.close()
        self.get_logger().info("inactive: no more commands")
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the model and the contract's topics."""
        self._release()
        self._transition_problem = NONE
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
        contract = contract_of(values)
        pipeline = Pipeline(
            contract,
            self.get_clock(),
            publish_command=self._publish_command,
            publish_chunk=self._publish_chunk,
            on_problem=self._warn,
            fallback_decoder=cv_bridge_decoder(),
            seed=values.seed,
            max_failures=values.max_policy_failures,
        )
        self._pipeline, self._values = pipeline, values
        pipeline.runner.wait_for_frame = values.wait_for_frame
        pipeline.load(lambda: self._load(values, contract), values.prompt, lambda: not self._stopping())
        self._commands = CommandPublisher(self, contract)
        self._stream_subscriptions = streams.subscribe(
            self, contract, pipeline.synchroniser, on_image=pipeline.wake, inspector=pipeline.inspector
        )
        # Latched, so that a prompt published before this node was there counts.
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        prompts = self.create_subscription(String, "~/prompt", self._on_prompt, latched)
        self._stream_subscriptions.append(prompts)
        assert pipeline.policy is not None
        self.get_logger().info(
            f"configured: {values.checkpoint} on robot {contract.robot}, "
            f"precision {pipeline.policy.precision}, commands on {', '.join(self._commands.topics())}"
        )
        if contract.outliving:
            self.get_logger().warning(
                f"velocities on {', '.join(contract.outliving)}: if this node is killed the robot "
                "goes on with the last one, unless its controller has a command timeout"
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
            self._commands.close()
            self._commands = None

    def _on_prompt(self, message: String) -> None:
        """As ~/set_prompt without reset; there is nobody to answer to, so a refusal is logged."""
        request = SetPrompt.Request(prompt=message.data)
        answer = services.set_prompt(self._pipeline, request, SetPrompt.Response())
        if not answer.success:
            self._warn(Problem(Reason.PROMPT_INVALID, "~/prompt", f"refused: {answer.message}"))

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

    def _on_calibration(self, problem: Problem | None) -> None:
        """A calibration that failed is reported until one succeeds, or the next transition."""
        self._transition_problem = problem or NONE
        if problem is not None and self._pipeline is not None:
            self._pipeline.raise_fault(problem)

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
        return status.policy_status(self._pipeline, stamp, self._transition_problem)

    def _publish_status(self) -> None:
        self._status.publish(self.report())

    def _publish_diagnostics(self) -> None:
        robot = self._pipeline.contract.robot if self._pipeline is not None else ""
        name = f"{self.get_fully_qualified_name()}: policy"
        report = self.report()
        self._diagnostics.publish(status.diagnostics(self._pipeline, report, name, robot))
        if self._pipeline is not None:
            self._metrics.publish(status.metrics(self._pipeline, report.header))

    def _conflict(self) -> Problem | None:
        """Who else commands the robot, where that matters."""
        values, commands = self._values, self._commands
        if values is None or commands is None or values.dry_run or values.allow_other_publishers:
            return None
        return safety.other_publishers(self, commands.topics(), commands.opened)

    def _guard_commands(self) -> None:
        pipeline = self._pipeline
        if pipeline is None or not pipeline.active:
            return
        if pipeline.latch.fault is not None:
            # Without autostart it is for whatever manages the life cycle to say when.
            if self.autostart and not self.exit_status and self._ending.due(pipeline):
                self.exit_status = EXIT_STATUS
                self.get_logger().fatal(f"ends with status {EXIT_STATUS}: {pipeline.latch.fault}")
            return
        if (conflict := self._conflict()) is not None:
            pipeline.raise_fault(conflict)

    def _wake(self) -> None:
        if self._pipeline is not None:
            self._pipeline.wake()


def main(args: list[str] | None = None, load: PolicyLoader = load_policy) -> int:
    """Run the node until SIGINT or SIGTERM, or until it ends itself; its exit status."""
    return run(lambda stopping: PolicyNode(load, stopping), args)


if __name__ == "__main__":
    sys.exit(main())
