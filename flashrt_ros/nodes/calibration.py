"""~/calibrate and ~/cancel_calibration, and the calibration that an activation waits for.

The model runs on the worker thread, and the executor answers everything else meanwhile.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import length_hint
from typing import TYPE_CHECKING, Any

from rclpy.node import Node
from std_srvs.srv import Trigger

from flashrt_ros.core.bag_source import DEFAULT_SAMPLES, BagSource, calibration_sample
from flashrt_ros.core.calibration_job import CalibrationJob
from flashrt_ros.core.errors import BagError, TooFewObservationsError, WorkerStoppedError
from flashrt_ros.core.live_source import LiveSource
from flashrt_ros.core.problem import Problem
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.sync import NotReady
from flashrt_ros.core.timing import to_ns
from flashrt_ros.srv import Calibrate
from flashrt_runtime import errors

from .decoding import ros_decoder
from .deferred import UNLOADED, DeferredService, Refused, Reply
from .exotic_images import cv_bridge_decoder
from .failures import describe, reason_of

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .policy_runner import PolicyLike

Request, Response = Calibrate.Request, Calibrate.Response
Samples = Iterator[Mapping[str, Any]]

SOURCES = ("live", "bag", "dataset")
MAX_SAMPLES = 4096
ACTIVATION_SAMPLES = 8  # live observations that calibrate an activation
PATIENCE = to_ns(10.0)  # how long ~/calibrate waits for a live observation [ns]
ENDING = 2.0  # how long an activation waits for the end of a cancelled calibration [s]


def unloaded() -> Refused:
    """Of a calibration whose policy is gone."""
    return Refused(Response.CODE_CANCELLED, UNLOADED, Reason.CALIBRATION_CANCELLED)


# Refusals that say nothing about calibrations; what was reported before stays.
NO_FAILURE = (Response.CODE_ACTIVE, Response.CODE_BUSY, Response.CODE_NOT_CONFIGURED)


@dataclass(frozen=True)
class Plan:
    """A request that makes sense. held_out: observations beyond `samples` that the error is measured on."""

    source: str
    path: str
    samples: int
    held_out: int
    percentile: float | None
    task_filter: str
    save: bool


class Calibrations:
    """At most one at a time; `pipeline.calibration` is the job under way, or the one whose failure keeps the
    node from commanding."""

    def __init__(
        self, node: Node, pipeline: Callable[[], Pipeline | None], report: Callable[[Problem | None], None]
    ) -> None:
        """report: told of a failure, and None after a success; on the executor's or the worker's thread."""
        self._node = node
        self._pipeline = pipeline
        self._report = report
        DeferredService(node, Calibrate, "~/calibrate", self._take)
        node.create_service(Trigger, "~/cancel_calibration", self._cancel)

    # Services: taken on the executor's thread, a calibration's answer sent on the worker's

    def _take(self, request: Any, reply: Reply) -> None:
        response = reply.response
        response.error_max = response.error_rms = response.error_cosine = float("nan")
        try:
            plan = checked(request)
            pipeline = self._usable(plan)
            job, before = CalibrationJob(plan.source, plan.samples + plan.held_out), pipeline.calibration
            pipeline.calibration = job
            work = pipeline.worker.call(lambda: self._run(pipeline, plan, job, response))
        except (Refused, WorkerStoppedError) as error:
            self._finish(reply, error)
            return

        def finish(done: Any) -> None:
            error = unloaded() if done.cancelled() else done.exception()
            # What kept the node from commanding before still does unless there are scales now.
            pipeline.calibration = None if calibrated(pipeline) else before
            self._finish(reply, error)
            job.ended.set()
            pipeline.wake()

        work.add_done_callback(finish)

    def _finish(self, reply: Reply, error: BaseException | None) -> None:
        """Send the answer; it must come whatever the runtime did."""
        response = reply.response
        try:
            if error is None:
                self._report(None)
            else:
                refusal = _refusal(error)
                response.code, response.reason, response.message = refusal.code, refusal.reason, str(refusal)
                if refusal.code not in NO_FAILURE:
                    self._report(Problem(refusal.reason, "", f"calibration: {refusal}"))
        finally:
            response.success = response.code == Response.CODE_OK
            reply.send()

    def _usable(self, plan: Plan) -> Pipeline:
        pipeline = self._pipeline()
        if pipeline is None or pipeline.policy is None:
            text = "no policy is loaded: configure the node first"
            raise Refused(Response.CODE_NOT_CONFIGURED, text, Reason.OK)
        running = pipeline.calibration
        if running is not None and running.failed is None:
            text = f"{running}: wait for it, or call ~/cancel_calibration"
            raise Refused(Response.CODE_BUSY, text, Reason.CALIBRATING)
        if pipeline.active and not pipeline.held:
            text = "the node drives the robot: deactivate it, or call ~/hold first"
            pipeline.measured.problems[Reason.CALIBRATION_REFUSED] += 1  # for /diagnostics
            raise Refused(Response.CODE_ACTIVE, text, Reason.CALIBRATION_REFUSED)
        if not _needs_scales(pipeline.policy):
            text = f"precision {pipeline.policy.precision} has no activation scales: calibration is for fp8"
            raise Refused(Response.CODE_NOT_SUPPORTED, text)
        if plan.source != "dataset" and not pipeline.prompt:
            text = "no prompt is in force, and the scales depend on it: call ~/set_prompt first"
            raise Refused(Response.CODE_BAD_ARGUMENT, text, Reason.PROMPT_INVALID)
        return pipeline

    def _cancel(self, _: Any, response: Any) -> Any:
        pipeline = self._pipeline()
        job = pipeline.calibration if pipeline is not None else None
        response.success = job is not None and job.failed is None
        response.message = "" if response.success else "no calibration is running"
        if response.success and job is not None:
            job.cancelled.set()
        return response

    # On the worker thread

    def _run(self, pipeline: Pipeline, plan: Plan, job: CalibrationJob, response: Any) -> None:
        """Calibrate, measure, save; the answer's figures go into `response`."""
        warnings: list[str] = []
        with contextlib.ExitStack() as opened:
            samples = _counted(self._samples(pipeline, plan, job, opened, warnings), job)
            report = _policy(pipeline).calibrate(
                samples, plan.percentile, plan.samples, source=f"{plan.source}:{plan.path}".rstrip(":"),
                should_stop=job.cancelled.is_set, held_out=plan.held_out,
            )
        response.samples_used, response.estimator = report.samples, report.estimator
        response.warnings = [*warnings, *report.warnings]
        if (error := report.held_out_error) is not None:
            response.held_out = len(error.per_sample)
            response.error_max, response.error_rms = error.max_abs, error.relative_rms
            response.error_cosine = error.cosine
        if plan.save:
            try:
                response.artifact = str(_policy(pipeline).save_calibration())
            except Exception as error:  # a full disk, no right to write: the scales are good all the same
                text = f"the new scales are in force, but could not be saved: {describe(error)}"
                raise Refused(Response.CODE_NOT_SAVED, text, Reason.CALIBRATION_FAILED) from error

    def _samples(
        self, pipeline: Pipeline, plan: Plan, job: CalibrationJob, opened: contextlib.ExitStack,
        warnings: list[str],
    ) -> Samples:
        """The observations of the plan's source; `opened` closes it."""
        if plan.source == "live":
            return self._live(pipeline, job, lambda: not job.cancelled.is_set(), PATIENCE)
        if plan.source == "dataset":
            return _dataset(plan, _policy(pipeline).spec.views)
        source = opened.enter_context(self._bag(pipeline, plan))
        opened.callback(lambda: warnings.extend(f"{item.reason.name}: {item}" for item in source.warnings))
        return source.mappings(pipeline.prompt)

    def _bag(self, pipeline: Pipeline, plan: Plan) -> BagSource:
        """The bag, with the topics that this node subscribes to; else with those of the contract itself."""
        contract, node = pipeline.contract, self._node
        own = {name: node.resolve_topic_name(stream.topic) for name, stream in contract.streams.items()}

        def opened(topics: Mapping[str, str]) -> BagSource:
            return BagSource(
                plan.path,
                contract,
                samples=plan.samples + plan.held_out,
                topics=topics,
                use_sim_time=bool(node.get_parameter("use_sim_time").value),
                decode=ros_decoder(),
                fallback_decoder=cv_bridge_decoder(),
            )

        try:
            return opened(own)
        except BagError as error:
            if error.reason is not Reason.BAG_TOPIC_MISSING:
                raise
            with contextlib.suppress(BagError):
                return opened({})
            raise

    def _live(
        self, pipeline: Pipeline, job: CalibrationJob, go_on: Callable[[], bool], patience: int | None
    ) -> Samples:
        clock = self._node.get_clock()
        source = LiveSource(
            pipeline.contract, pipeline.synchroniser, lambda: clock.now().nanoseconds, cv_bridge_decoder()
        )

        def on_problem(problem: NotReady | None) -> None:
            job.obstacle = problem and Problem(problem.reason, problem.stream, problem.message)

        for observation in source.observations(
            job.total, go_on=go_on, patience=patience, on_problem=on_problem
        ):
            yield calibration_sample(observation, pipeline.prompt)
        if not go_on():
            raise errors.CalibrationCancelledError("calibration was cancelled: the scales in force stay")

    # Activation

    def hinders(self, pipeline: Pipeline) -> Problem | None:
        """Why the node cannot be activated now; a cancelled calibration is given a moment to end."""
        job = pipeline.calibration
        if job is None or job.failed is not None or (job.cancelled.is_set() and job.ended.wait(ENDING)):
            return None
        return Problem(Reason.CALIBRATING, "", f"{job}: wait for it, or call ~/cancel_calibration")

    def before_activation(self, pipeline: Pipeline) -> None:
        """Without scales, nothing may be inferred until live observations have given them."""
        pipeline.calibration = None
        if not calibrated(pipeline):
            pipeline.calibration = CalibrationJob("live", ACTIVATION_SAMPLES, for_activation=True)

    def after_activation(self, pipeline: Pipeline) -> None:
        """Begin the calibration that this activation waits for, if it does."""
        job = pipeline.calibration
        if job is not None:
            self._node.get_logger().warning(f"not calibrated: {job} before the robot is commanded")
            pipeline.worker.call(lambda: self._activation(pipeline, job))

    def _activation(self, pipeline: Pipeline, job: CalibrationJob) -> None:
        """On the worker thread: calibrate from the live topics, then let the inference begin."""

        def go_on() -> bool:
            return pipeline.active and not job.cancelled.is_set()

        try:
            while go_on() and not pipeline.prompt:
                text = "no prompt yet: call ~/set_prompt"
                job.obstacle = Problem(Reason.PROMPT_INVALID, "", text)
                job.cancelled.wait(0.05)
            samples = _counted(self._live(pipeline, job, go_on, None), job)
            _policy(pipeline).calibrate(samples, source="live", should_stop=lambda: not go_on())
            artifact = _policy(pipeline).save_calibration()
            self._node.get_logger().info(f"calibrated from {job.total} live observations: {artifact}")
            pipeline.calibration = None
        except Exception as error:
            self._failed(pipeline, job, error)
        finally:
            job.ended.set()
            pipeline.wake()

    def _failed(self, pipeline: Pipeline, job: CalibrationJob, error: Exception) -> None:
        if not pipeline.active:  # deactivated meanwhile: the next activation begins anew
            pipeline.calibration = None
        elif calibrated(pipeline):
            # Only the file is missing: the robot need not wait for a disk.
            self._node.get_logger().error(f"the calibration could not be saved: {describe(error)}")
            pipeline.calibration = None
        else:
            reason, text = reason_of(error, Reason.CALIBRATION_FAILED), describe(error)
            if reason is not Reason.DEVICE_LOST:  # which says itself what to do
                text += ": nothing is commanded. Deactivate and activate, or call ~/calibrate"
            job.failed = Problem(reason, "", text)
            pipeline.raise_fault(job.failed)


def checked(request: Any) -> Plan:
    """The request as a plan. Raises Refused."""
    source, percentile = request.source, float(request.percentile)
    if source not in SOURCES:
        text = f"source '{source}': expected one of {', '.join(SOURCES)}"
        raise Refused(Response.CODE_BAD_SOURCE, text)
    if source != "live" and not os.path.exists(os.path.expanduser(request.path)):
        text = f"path '{request.path}' does not exist: pass the path of a {source}"
        raise Refused(Response.CODE_BAD_PATH, text, Reason.BAG_UNREADABLE)
    if source == "live" and request.path:
        raise Refused(Response.CODE_BAD_ARGUMENT, f"path '{request.path}': leave it empty for source live")
    if not 0.0 <= percentile <= 100.0:  # NaN fails too
        text = f"percentile {percentile}: expected 0 < p <= 100, or 0: the default"
        raise Refused(Response.CODE_BAD_ARGUMENT, text)
    if request.samples > MAX_SAMPLES:
        raise Refused(Response.CODE_BAD_ARGUMENT, f"samples {request.samples}: expected 1 to {MAX_SAMPLES}")
    if request.task_filter and source != "dataset":
        text = f"task_filter '{request.task_filter}': only a dataset has tasks, leave it empty for a {source}"
        raise Refused(Response.CODE_BAD_ARGUMENT, text)
    samples = int(request.samples) or DEFAULT_SAMPLES
    return Plan(
        source=source,
        path=os.path.expanduser(request.path),
        samples=samples,
        held_out=min(8, max(1, samples // 8)),
        percentile=round(percentile, 4) or None,  # a float32, whose 99.9 is 99.9000015
        task_filter=request.task_filter,
        save=request.save,
    )


def _dataset(plan: Plan, views: Sequence[str]) -> Samples:
    """Of a LeRobot dataset, or of a directory of images with JSON. Raises DatasetError, Refused."""
    from flashrt_runtime.datasets import dataset_observations

    count = plan.samples + plan.held_out
    try:
        return dataset_observations(plan.path, count, views, plan.task_filter or None)
    except errors.OptionError as error:
        raise Refused(Response.CODE_BAD_ARGUMENT, describe(error)) from error


def _refusal(error: BaseException) -> Refused:
    """The code of whatever ended a calibration."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, WorkerStoppedError) or not isinstance(error, Exception):
        return unloaded()
    reason = reason_of(error, Reason.CALIBRATION_FAILED)
    if isinstance(error, errors.CalibrationCancelledError):
        return Refused(Response.CODE_CANCELLED, describe(error), reason)
    if isinstance(error, TooFewObservationsError):
        return Refused(Response.CODE_NOT_ENOUGH_SAMPLES, describe(error), reason)
    if isinstance(error, errors.DatasetError):
        return Refused(Response.CODE_BAD_DATA, describe(error), reason)
    if isinstance(error, BagError):
        unreadable = reason is Reason.BAG_UNREADABLE
        code = Response.CODE_BAD_PATH if unreadable else Response.CODE_BAD_DATA
        return Refused(code, describe(error), reason)
    return Refused(Response.CODE_INTERNAL, describe(error), reason)


def _counted(samples: Samples, job: CalibrationJob) -> Samples:
    """Note how many have been taken."""
    from flashrt_runtime.datasets.sampling import Counted

    def taken() -> Samples:
        for sample in samples:
            yield sample
            job.done += 1

    return Counted(taken(), length_hint(samples, -1))


def _needs_scales(policy: PolicyLike | None) -> bool:
    return policy is not None and policy.precision == "fp8"


def calibrated(pipeline: Pipeline) -> bool:
    """Whether the policy has the scales it needs, or needs none."""
    policy: Any = pipeline.policy  # read once: it may be unloaded at any time
    return not _needs_scales(policy) or bool(policy.calibrated)


def _policy(pipeline: Pipeline) -> Any:
    """The loaded policy, with the calibration that only flashrt_runtime's own has. Raises Refused."""
    if pipeline.policy is None:
        raise unloaded()
    return pipeline.policy
