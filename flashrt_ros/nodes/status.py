"""~/status and /diagnostics: what the policy node is doing, why, and how fast."""

from __future__ import annotations

import math
import time

from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from std_msgs.msg import Header

from flashrt_ros.core.measurements import WINDOW
from flashrt_ros.core.metrics import LatencyWindow
from flashrt_ros.core.problem import NONE, Problem
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.timeline import CommandKind
from flashrt_ros.core.timing import NS_PER_S, to_s
from flashrt_ros.msg import LatencyMetrics, LatencySummary, PolicyStatus

from .pipeline import Pipeline

VIOLATION_SHOWN = NS_PER_S  # how long a clamped command stays the reported reason [ns]

_STATES = {
    CommandKind.WAITING: PolicyStatus.STATE_WAITING,
    CommandKind.RUNNING: PolicyStatus.STATE_RUNNING,
    CommandKind.HOLDING: PolicyStatus.STATE_HOLDING,
    CommandKind.STOPPED: PolicyStatus.STATE_STOPPED,
}
STATE_NAMES = {
    getattr(PolicyStatus, name): name.removeprefix("STATE_").lower()
    for name in vars(type(PolicyStatus))
    if name.startswith("STATE_")
}


def policy_status(
    pipeline: Pipeline | None, stamp: Time, transition_problem: Problem = NONE
) -> PolicyStatus:
    """The whole report. transition_problem: why the last configure or activate failed. Latencies: NaN until
    measured."""
    message = PolicyStatus(header=Header(stamp=stamp))
    if pipeline is None:
        message.state = PolicyStatus.STATE_UNCONFIGURED
        _explain(message, transition_problem)
        return message
    now = time.monotonic_ns()
    output = pipeline.output
    message.state = PolicyStatus.STATE_INACTIVE
    _explain(message, transition_problem)
    if pipeline.active:
        message.state = _STATES[output.kind] if output is not None else PolicyStatus.STATE_WAITING
        _explain(message, current_problem(pipeline, now))
        if message.state == PolicyStatus.STATE_RUNNING and message.reason:
            message.message = f"note: {message.message}"
    if (job := pipeline.calibration) is not None:
        message.state = PolicyStatus.STATE_CALIBRATING if job.failed is None else PolicyStatus.STATE_FAULT
        message.progress = job.progress
        _explain(message, job.problem)
    if (fault := pipeline.fault) is not None:
        message.state = PolicyStatus.STATE_FAULT
        _explain(message, fault)
    message.prompt = pipeline.prompt
    message.precision = pipeline.policy.precision if pipeline.policy is not None else ""
    message.sequence = pipeline.commander.timeline.sequence
    message.generation = pipeline.commander.timeline.generation
    _fill_streams(message, pipeline, now)
    _fill_rates(message, pipeline, now)
    return message


def current_problem(pipeline: Pipeline, now: int) -> Problem:
    """What stands in the way; the cause before its consequence: a missing stream rather than "starved"."""
    output = pipeline.output
    commanding = output is not None and output.kind is CommandKind.RUNNING
    if pipeline.held:
        return Problem(Reason.HELD, "", Reason.HELD.text)
    # Read once: the worker and the control thread replace them at any time.
    problem, violation = pipeline.problem, pipeline.last_violation
    if problem is not None:
        return problem
    if output is not None and not commanding:
        return Problem(output.reason, "", output.message)
    if violation is not None and now - violation[0] < VIOLATION_SHOWN:
        return violation[1]
    return pipeline.runner.clock_rate.problem or NONE


def diagnostics(
    pipeline: Pipeline | None, status: PolicyStatus, name: str, hardware_id: str
) -> DiagnosticArray:
    """The same for /diagnostics: OK while running or inactive, WARN when held up, ERROR when stopped."""
    state = STATE_NAMES[status.state]
    entry = DiagnosticStatus(
        level=_level(status), name=name, hardware_id=hardware_id,
        message=f"{state}: {status.message}" if status.message else state,
    )
    values = {
        "state": state,
        "reason": str(status.reason),
        "code": Reason(status.reason).name,
        "prompt": status.prompt,
        "chunk_rate_hz": f"{status.chunk_rate:.2f}",
        "control_rate_hz": f"{status.control_rate:.2f}",
        "inference_p50_ms": f"{1e3 * status.inference_p50:.2f}",
        "stamp_to_publish_p99_ms": f"{1e3 * status.stamp_to_publish_p99:.2f}",
        "control_jitter_p99_ms": f"{1e3 * status.control_jitter_p99:.2f}",
    }
    for stream, rate, age in zip(status.stream_names, status.stream_rates, status.stream_ages, strict=True):
        values[f"{stream}.rate_hz"] = f"{rate:.2f}"
        values[f"{stream}.age_s"] = f"{age:.3f}" if age >= 0 else "never"
    if pipeline is not None:
        for reason, count in sorted(pipeline.measured.dropped.items()):
            values[f"chunks_dropped.{reason.name.lower()}"] = str(count)
        for reason, count in sorted(pipeline.measured.violations.items()):
            values[f"commands_limited.{reason.name.lower()}"] = str(count)
        for stream, refused in pipeline.measured.refused.counts().items():
            for reason, count in refused.items():
                values[f"{stream}.refused.{reason.name.lower()}"] = str(count)
        for reason, count in sorted(pipeline.measured.problems.items()):
            values[f"problems.{reason.name.lower()}"] = str(count)
        if pipeline.control is not None:
            values["control_ticks_missed"] = str(pipeline.control.missed)
            values["control_errors"] = str(pipeline.control.errors)
        if (rate := pipeline.runner.clock_rate.factor) is not None:
            values["real_time_factor"] = f"{rate:.3f}"
        values["clock_jumps"] = str(pipeline.synchroniser.clock_jumps)
        values["failures_in_a_row"] = str(pipeline.latch.failures)
    entry.values = [KeyValue(key=key, value=value) for key, value in values.items()]
    return DiagnosticArray(header=status.header, status=[entry])


def metrics(pipeline: Pipeline, header: Header) -> LatencyMetrics:
    """~/metrics: the percentiles of every window."""
    windows = pipeline.measured.windows()
    if pipeline.control is not None:
        windows["control_jitter"], windows["control_duration"] = (
            pipeline.control.jitter, pipeline.control.duration,
        )
    summaries = {name: _summary(window) for name, window in windows.items()}
    return LatencyMetrics(header=header, window=WINDOW, **summaries)


def _summary(window: LatencyWindow) -> LatencySummary:
    found = window.summary()
    return LatencySummary(
        count=found.count, total=window.total, p50=found.p50, p95=found.p95, p99=found.p99, max=found.max
    )


def _level(status: PolicyStatus) -> bytes:
    if status.state in (PolicyStatus.STATE_STOPPED, PolicyStatus.STATE_FAULT):
        return DiagnosticStatus.ERROR
    if status.state == PolicyStatus.STATE_UNCONFIGURED:
        return DiagnosticStatus.ERROR if status.reason else DiagnosticStatus.OK
    return DiagnosticStatus.WARN if status.reason else DiagnosticStatus.OK


def _explain(message: PolicyStatus, problem: Problem) -> None:
    message.reason = int(problem.reason)
    message.message = str(problem)


def _fill_streams(message: PolicyStatus, pipeline: Pipeline, now: int) -> None:
    rates, ages = pipeline.synchroniser.rates(now), pipeline.synchroniser.ages(now)
    message.stream_names = list(rates)
    message.stream_rates = list(rates.values())
    message.stream_ages = [-1.0 if age is None else to_s(age) for age in ages.values()]


def _fill_rates(message: PolicyStatus, pipeline: Pipeline, now: int) -> None:
    message.chunk_rate = pipeline.measured.chunk_rate.rate(now)
    message.control_rate = pipeline.measured.control_rate.rate(now)
    inference, publish = pipeline.measured.inference.summary(), pipeline.measured.stamp_to_publish.summary()
    message.inference_p50, message.inference_p95 = inference.p50, inference.p95
    message.inference_p99 = inference.p99
    message.stamp_to_publish_p50, message.stamp_to_publish_p99 = publish.p50, publish.p99
    message.control_jitter_p99 = pipeline.control.jitter.p99 if pipeline.control is not None else math.nan
