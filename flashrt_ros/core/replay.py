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
class CommandTopic:
    """A recorded output of the contract; columns: the action's joints that it is compared for."""

    spec: OutputSpec
    topic: str
    columns: tuple[int, ...]


@dataclass(frozen=True)
class Commands:
    """What a topic told the robot: times (n,) int64 [ns, recorder's], rising; values (n, columns) float64 in
    robot units. positions: whether the values are joint positions."""

    times: NDArray[np.int64]
    values: FloatArray
    positions: bool

    def at(self, times: NDArray[np.int64]) -> FloatArray:
        """Commands (len(times), columns) in force then, interpolated; NaN where none was within a quarter
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
    moment. NaN for a joint whose commands were not recorded."""

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
    topics: tuple[str, ...]
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
        """Actions that have a recorded counterpart, for one joint at least."""
        return int(np.isfinite(self.recorded).any(axis=-1).sum())

    def joint_errors(self) -> list[JointError]:
        """One entry for each joint, in action order."""
        error = np.abs(self.predicted - self.recorded)
        still = np.abs(self.recorded[:, :1] - self.recorded)
        known = np.isfinite(error)
        rate = self.contract.action.representation is Representation.VELOCITY
        return [
            JointError(
                joint=joint.name,
                unit=f"{joint.unit}/s" if rate else joint.unit,
                mean=_mean(error[..., index]),
                rms=float(np.sqrt(_mean(error[..., index] ** 2))),
                largest=float(np.max(error[..., index], where=known[..., index], initial=0.0))
                if known[..., index].any()
                else float("nan"),
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
    outputs = command_topics(source, contract)
    times = at_fractions(source.recorded, (np.arange(count) + 0.5) / count)
    reach = horizon * contract.action.period
    windows = merged([(time - BEFORE, time + reach) for time in times])
    commands = [read_commands(source, contract, output, windows) for output in outputs]
    steps = np.arange(horizon) * contract.action.period
    kept, predicted, recorded = [], [], []
    skipped, problem = 0, None
    for moment in source.observe(times):
        if moment.observation is None:
            skipped, problem = skipped + 1, problem or moment.problem
            continue
        actions = contract.actions_to_robot(predict(moment.observation))
        truth = np.full(actions.shape, np.nan)
        for output, told in zip(outputs, commands, strict=True):
            columns = list(output.columns)
            truth[:, columns] = told.at(moment.time + steps)
            if told.positions and contract.action.representation is Representation.DELTA:
                actions[:, columns] = truth[0, columns] + np.cumsum(actions[:, columns], axis=0)
        kept.append(moment.time)
        predicted.append(actions)
        recorded.append(truth)
    if not kept:
        assert problem is not None
        text = f"{source.reader.path}: no observation at any of {count} moments ({problem.stream}: "
        raise BagError(problem.reason, f"{text}{problem.message})")
    topics = tuple(output.topic for output in outputs)
    result = Replay(
        contract, topics, np.array(kept), np.array(predicted), np.array(recorded), (skipped, problem)
    )
    if not result.compared:
        text = f"{source.reader.path}: no command on {', '.join(topics)} within the reach of any chunk"
        raise BagError(Reason.BAG_FEW_SAMPLES, text)
    return result


def command_topics(source: BagSource, contract: RobotContract) -> list[CommandTopic]:
    """The contract's outputs that were recorded, each for the joints that none before it has.

    Raises BagError: none was recorded (BAG_TOPIC_MISSING), or as another type (BAG_TOPIC_TYPE).
    """
    types, path = source.reader.types, source.reader.path
    open_columns, wanted, found = set(range(contract.dof)), [], []
    for output in contract.outputs:
        topic = absolute_topic(output.topic, source.namespace)
        wanted.append(topic)
        if topic not in types:
            continue
        if types[topic] != {output.type.value}:
            text = f"topic {topic} holds {', '.join(sorted(types[topic]))}, the contract of {contract.robot} "
            raise BagError(Reason.BAG_TOPIC_TYPE, f"{path}: {text}expects {output.type.value}")
        names = output.joints or contract.action.joints
        columns = tuple(sorted(open_columns & {contract.action.joints.index(name) for name in names}))
        if columns:
            open_columns -= set(columns)
            found.append(CommandTopic(output, topic, columns))
    if not found:
        text = f"{path}: no recorded commands to compare with: expected {' or '.join(wanted)}"
        raise BagError(Reason.BAG_TOPIC_MISSING, f"{text}; the bag has {', '.join(sorted(types))}")
    return found


def read_commands(
    source: BagSource, contract: RobotContract, output: CommandTopic, windows: Sequence[Span]
) -> Commands:
    """The commands received within these windows. Raises BagError for joints that are not the contract's."""
    messages = (message for _, message in read_windows(source.reader, [output.topic], windows))
    trajectory = output.spec.type is OutputType.JOINT_TRAJECTORY
    pieces = _trajectories if trajectory else _arrays
    found = list(pieces(messages, contract, output, source.decode))
    times = np.array([time for time, _ in found], dtype=np.int64)
    values = np.array([row for _, row in found], dtype=np.float64).reshape(len(found), len(output.columns))
    absolute = contract.action.representation is Representation.ABSOLUTE
    return Commands(times, values, trajectory or absolute)


def _arrays(
    messages: Iterable[RawMessage], contract: RobotContract, output: CommandTopic, decode: Decoder
) -> Iterator[tuple[int, FloatArray]]:
    joints = output.spec.joints or contract.action.joints
    order = [joints.index(contract.action.joints[column]) for column in output.columns]
    for message in messages:
        data = np.asarray(decode(message.type, message.data).data, dtype=np.float64)
        if data.shape != (len(joints),):
            text = f"a command on {message.topic} has {data.size} values, expected {len(joints)}"
            raise BagError(Reason.BAG_TOPIC_TYPE, f"{text}: {', '.join(joints)}")
        yield message.time, data[order]


def _trajectories(
    messages: Iterable[RawMessage], contract: RobotContract, output: CommandTopic, decode: Decoder
) -> Iterator[tuple[int, FloatArray]]:
    """Points of every trajectory until the next one begins: that is what a controller follows."""
    names = contract.message_names([contract.action.joints[column] for column in output.columns])
    plans = (_plan(message, decode(message.type, message.data), names) for message in messages)
    last = None
    for plan, following in itertools.pairwise(itertools.chain(plans, [None])):
        assert plan is not None
        for time, row in plan:
            if following and time >= following[0][0]:
                break
            if last is None or time > last:
                last = time
                yield time, row


def _plan(message: RawMessage, content: Any, joints: Sequence[str]) -> list[tuple[int, FloatArray]]:
    """(recorder's time, positions) of each point, for the joints of these names in this order."""
    names = list(content.joint_names)
    if missing := [name for name in joints if name not in names]:
        text = f"a command on {message.topic} lacks joint {', '.join(missing)}; it has {', '.join(names)}"
        raise BagError(Reason.BAG_TOPIC_TYPE, text)
    order = [names.index(name) for name in joints]
    ahead = stamp_to_ns(content.header.stamp) - message.time
    begin = message.time + (ahead if abs(ahead) < SAME_CLOCK else 0)  # stamp 0: from now on
    return [
        (begin + stamp_to_ns(point.time_from_start), np.asarray(point.positions, dtype=np.float64)[order])
        for point in content.points
    ]
