"""A policy evaluated offline on a bag: its chunks against the commands that were recorded.

At moments spread over the bag the policy gets the observation that the node would have had then; action k of
its chunk is compared with the command in force k action periods later. Commands are taken by the recorder's
time, so that clocks do not matter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bag_index import Span, at_fractions, merged, read_windows
from .bag_reader import Decoder, RawMessage
from .bag_source import BagSource, absolute_topic
from .contract_model import FloatArray, OutputSpec, OutputType, Representation, RobotContract
from .errors import BagError
from .observation import Observation
from .reasons import Reason
from .sync import NotReady
from .timing import NS_PER_S, stamp_to_ns, to_s

# Actions (horizon, dof) in the policy's units for an observation.
Predict = Callable[[Observation], NDArray[np.float32]]

SAME_CLOCK = NS_PER_S  # a command's stamp this close to the recorder's time is of the same clock [ns]
LONGEST_PAUSE = NS_PER_S // 4  # between two commands that are interpolated [ns]
BEFORE = NS_PER_S  # how far before a moment commands are read [ns]


@dataclass(frozen=True)
class Commands:
    """What the robot was told: times (n,) int64 [ns, recorder's], rising; values (n, dof) float64 in robot
    units and action order. positions: whether the values are joint positions."""

    topic: str
    times: NDArray[np.int64]
    values: FloatArray
    positions: bool

    def at(self, times: NDArray[np.int64]) -> FloatArray:
        """Commands (len(times), dof) in force then, interpolated; NaN where none was within a quarter
        second."""
        if len(self.times) < 2:
            return np.full((len(times), self.values.shape[1]), np.nan)
        right = np.clip(np.searchsorted(self.times, times), 1, len(self.times) - 1)
        before, after = self.times[right - 1], self.times[right]
        part = ((times - before) / np.maximum(after - before, 1))[:, None]
        values = (1 - part) * self.values[right - 1] + part * self.values[right]
        known = (before <= times) & (times <= after) & (after - before <= LONGEST_PAUSE)
        values[~known] = np.nan
        return np.asarray(values)


@dataclass(frozen=True)
class JointError:
    """Error of one joint over all compared actions [rad, m, or their rates]: mean, root of mean square,
    largest; of action 0 alone; and `still`, the mean error of a policy that would stay at the command of the
    moment."""

    joint: str
    unit: str
    mean: float
    rms: float
    largest: float
    first: float
    still: float


@dataclass(frozen=True)
class Replay:
    """times: (n,) moments [ns, recorder's]. predicted, recorded: (n, horizon, dof) in robot units, NaN where
    nothing was recorded. skipped: moments without an observation, and why the first of them."""

    contract: RobotContract
    topic: str
    times: NDArray[np.int64]
    predicted: FloatArray
    recorded: FloatArray
    skipped: tuple[int, NotReady | None]

    @property
    def offsets(self) -> FloatArray:
        """When each action of a chunk is due after its moment [s], (horizon,)."""
        return np.arange(self.predicted.shape[1], dtype=np.float64) * to_s(self.contract.action.period)

    @property
    def compared(self) -> int:
        """Actions that have a recorded counterpart."""
        return int(np.isfinite(self.recorded[..., 0]).sum())

    def joint_errors(self) -> list[JointError]:
        """One entry for each joint, in action order."""
        error = np.abs(self.predicted - self.recorded)
        still = np.abs(self.recorded[:, :1] - self.recorded)
        rate = self.contract.action.representation is Representation.VELOCITY
        return [
            JointError(
                joint=joint.name,
                unit=f"{joint.unit}/s" if rate else joint.unit,
                mean=_mean(error[..., index]),
                rms=float(np.sqrt(_mean(error[..., index] ** 2))),
                largest=float(np.nanmax(error[..., index])),
                first=_mean(error[:, 0, index]),
                still=_mean(still[..., index]),
            )
            for index, joint in enumerate(self.contract.action_joints)
        ]

    def error_by_offset(self) -> FloatArray:
        """Mean error (horizon, dof) of each action of the chunk; NaN where nothing was recorded."""
        error = np.abs(self.predicted - self.recorded)
        known = np.isfinite(error)
        total = np.where(known, error, 0.0).sum(0)
        counts = known.sum(0)
        return np.asarray(np.where(counts > 0, total / np.maximum(counts, 1), np.nan))


def _mean(values: FloatArray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def replay(source: BagSource, contract: RobotContract, predict: Predict, horizon: int, count: int) -> Replay:
    """Evaluate `predict` at `count` moments spread evenly over the bag of `source`.

    Raises BagError: no commands recorded (BAG_TOPIC_MISSING, BAG_TOPIC_TYPE), no usable observation, nothing
    to compare; IngestError of a message without the contract's joints; and what `predict` raises.
    """
    output = command_output(source, contract)
    times = at_fractions(source.recorded, (np.arange(count) + 0.5) / count)
    reach = horizon * contract.action.period
    commands = read_commands(source, contract, output, [(time - BEFORE, time + reach) for time in times])
    steps = np.arange(horizon) * contract.action.period
    kept, predicted, recorded = [], [], []
    skipped, problem = 0, None
    for moment in source.observe(times):
        if moment.observation is None:
            skipped, problem = skipped + 1, problem or moment.problem
            continue
        actions = contract.actions_to_robot(predict(moment.observation))
        known = commands.at(moment.time + steps)
        kept.append(moment.time)
        recorded.append(known)
        increments = contract.action.representation is Representation.DELTA and commands.positions
        predicted.append(known[0] + np.cumsum(actions, axis=0) if increments else actions)
    if not kept:
        assert problem is not None
        text = f"{source.reader.path}: no observation at any of {count} moments ({problem.stream}: "
        raise BagError(problem.reason, f"{text}{problem.message})")
    result = Replay(
        contract, commands.topic, np.array(kept), np.array(predicted), np.array(recorded), (skipped, problem)
    )
    if not result.compared:
        text = f"{source.reader.path}: no command on {commands.topic} within the reach of any chunk"
        raise BagError(Reason.BAG_FEW_SAMPLES, text)
    return result


def command_output(source: BagSource, contract: RobotContract) -> tuple[OutputSpec, str]:
    """The first of the contract's outputs that was recorded, and its topic in the bag. Raises BagError."""
    types, wanted = source.reader.types, []
    for output in contract.outputs:
        topic = absolute_topic(output.topic, source.namespace)
        wanted.append(topic)
        if topic not in types:
            continue
        if types[topic] != {output.type.value}:
            text = f"topic {topic} holds {', '.join(sorted(types[topic]))}, the contract of {contract.robot} "
            raise BagError(Reason.BAG_TOPIC_TYPE, f"{source.reader.path}: {text}expects {output.type.value}")
        return output, topic
    text = f"{source.reader.path}: no recorded commands to compare with: expected {' or '.join(wanted)}"
    raise BagError(Reason.BAG_TOPIC_MISSING, f"{text}; the bag has {', '.join(sorted(types))}")


def read_commands(
    source: BagSource, contract: RobotContract, output: tuple[OutputSpec, str], windows: Sequence[Span]
) -> Commands:
    """The commands received within these windows. Raises BagError for joints that are not the contract's."""
    spec, topic = output
    messages = (message for _, message in read_windows(source.reader, [topic], merged(windows)))
    trajectory = spec.type is OutputType.JOINT_TRAJECTORY
    pieces = _trajectories if trajectory else _arrays
    found = list(pieces(messages, contract, source.decode))
    times = np.array([time for time, _ in found], dtype=np.int64)
    values = np.array([row for _, row in found], dtype=np.float64).reshape(len(found), contract.dof)
    absolute = contract.action.representation is Representation.ABSOLUTE
    return Commands(topic, times, values, trajectory or absolute)


def _arrays(
    messages: Iterable[RawMessage], contract: RobotContract, decode: Decoder
) -> Iterator[tuple[int, FloatArray]]:
    for message in messages:
        data = np.asarray(decode(message.type, message.data).data, dtype=np.float64)
        if data.shape != (contract.dof,):
            text = f"a command on {message.topic} has {data.size} values, expected {contract.dof}"
            raise BagError(Reason.BAG_TOPIC_TYPE, f"{text}: {', '.join(contract.action.joints)}")
        yield message.time, data


def _trajectories(
    messages: Iterable[RawMessage], contract: RobotContract, decode: Decoder
) -> Iterator[tuple[int, FloatArray]]:
    """Points of every trajectory until the next one begins: that is what a controller follows."""
    decoded = ((message, decode(message.type, message.data)) for message in messages)
    plans = (_plan(message, content, contract) for message, content in decoded)
    last = None
    for (plan, following) in itertools.pairwise(itertools.chain(plans, [None])):
        assert plan is not None
        for time, row in plan:
            if following and time >= following[0][0]:
                break
            if last is None or time > last:
                last = time
                yield time, row


def _plan(message: RawMessage, content: Any, contract: RobotContract) -> list[tuple[int, FloatArray]]:
    """(recorder's time, positions) of each point, in the contract's joint order."""
    names = list(content.joint_names)
    if missing := [name for name in contract.action.joints if name not in names]:
        text = f"a command on {message.topic} lacks joint {', '.join(missing)}; it has {', '.join(names)}"
        raise BagError(Reason.BAG_TOPIC_TYPE, text)
    order = [names.index(name) for name in contract.action.joints]
    ahead = stamp_to_ns(content.header.stamp) - message.time
    begin = message.time + (ahead if abs(ahead) < SAME_CLOCK else 0)  # stamp 0: from now on
    return [
        (begin + stamp_to_ns(point.time_from_start), np.asarray(point.positions, dtype=np.float64)[order])
        for point in content.points
    ]
