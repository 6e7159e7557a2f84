"""The worker thread's part of the pipeline: from the streams to a prediction."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from rclpy.clock import Clock

from flashrt_ros.core.clock_rate import ClockRate
from flashrt_ros.core.commander import Commander
from flashrt_ros.core.contract import RatesSpec, RobotContract, check_policy
from flashrt_ros.core.freshness import next_frame_is_better
from flashrt_ros.core.images import FallbackDecoder
from flashrt_ros.core.ingest import Ingest
from flashrt_ros.core.measurements import Measurements
from flashrt_ros.core.observation import Observation
from flashrt_ros.core.problem import Problem
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.sync import NotReady, Snapshot, Synchroniser
from flashrt_ros.core.timeline import ObservationMark
from flashrt_ros.core.timing import NS_PER_S, to_ns, to_s
from flashrt_ros.core.trigger import InferenceTrigger

from .chunk_guide import ChunkGuide

FloatArray = NDArray[np.float64]
ANY_PROMPT = "task"


class PolicyLike(Protocol):
    """What the node needs of flashrt_runtime.Policy; see there for shapes, units and errors."""

    @property
    def spec(self) -> Any: ...
    @property
    def precision(self) -> str: ...
    def set_prompt(self, prompt: str) -> None: ...
    def predict(
        self, images: Any, prompt: str, state: Any, *, seed: int | None, rtc: Any = None
    ) -> NDArray[np.float32]: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Prediction:
    """A chunk and what it was computed from. actions: (horizon, dof) in robot units, of which the first
    `frozen` are those of the plan at the mark."""

    actions: FloatArray
    mark: ObservationMark
    observation: Observation
    prompt: str
    inference_time: float  # [s]
    frozen: int = 0


class PolicyRunner:
    """Owns the policy. Everything but `set_prompt` and the attributes belongs to the worker thread."""

    def __init__(
        self,
        contract: RobotContract,
        clock: Clock,
        synchroniser: Synchroniser,
        commander: Commander,
        measurements: Measurements,
        report: Callable[[Problem], None],
        observed: Callable[[], None],
        fallback_decoder: FallbackDecoder | None,
        seed: int | None,
    ) -> None:
        """`report` is told why there is no prediction, `observed` that an observation is complete."""
        self.policy: PolicyLike | None = None
        self.prompt = ""  # read at each inference
        self._commander = commander
        self.adopt_rates(contract.rates)
        self.ingest = Ingest(contract, fallback_decoder, measurements.refused.count)
        self._contract = contract
        self._clock = clock
        self._synchroniser = synchroniser
        self._measurements = measurements
        self._report = report
        self._observed = observed
        self._seed = seed
        self.guide = ChunkGuide(contract, commander.plan, report)
        self._used: dict[str, int] = {}  # camera stamps of the last observation
        self.wait_for_frame = True  # see core.freshness
        self._last_inference = 0  # [ns]
        self._jumps = 0  # clock jumps of the streams that have been dealt with
        self.clock_rate = ClockRate()  # of a simulated clock
        self._told_rate = False

    def adopt(self, policy: PolicyLike, prompt: str) -> None:
        """Check a policy just loaded against the contract, set its prompt ("" for none) and keep it.

        Raises PolicyMismatchError and what the prompt raises; the policy is then closed.
        """
        try:
            check_policy(self._contract, policy.spec)
            # Without a prompt any text will do: a missing tokenizer is to show now, not in mid-operation.
            policy.set_prompt(prompt or ANY_PROMPT)
        except Exception:
            policy.close()
            raise
        self.policy, self.prompt = policy, prompt

    def set_prompt(self, prompt: str) -> None:
        """Use `prompt` from the next inference on; raises what the policy says about it. Any thread."""
        if self.policy is None:
            raise RuntimeError("no policy is loaded")
        self.policy.set_prompt(prompt)
        self.prompt = prompt

    def adopt_rates(self, rates: RatesSpec) -> None:
        """Infer at this rate from now on. Any thread."""
        self.trigger = InferenceTrigger(rates, lambda: self._commander.timeline.remaining)

    def forget(self) -> None:
        """As before the first observation (activate, new episode)."""
        self.ingest.reset()
        self.trigger.reset()
        self.guide.forget()
        self._used = {}
        self._jumps = self._synchroniser.clock_jumps
        self.clock_rate.reset()

    def infer(self, wanted: Callable[[], bool]) -> Prediction | None:
        """One chunk from the newest observation; None when there is nothing new or nothing usable, or when
        `wanted` says no."""
        self.fence_clock_jumps()
        self._watch_clock_rate()
        # The mark first: if a stop comes after the question, its fence is newer than the mark.
        mark = self._commander.mark_observation()
        policy = self.policy
        if not wanted() or policy is None:
            return None
        now = time.monotonic_ns()
        selected = self._synchroniser.select(self._clock.now().nanoseconds, now)
        if isinstance(selected, NotReady):
            self._report(Problem(selected.reason, selected.stream, selected.message))
            return None
        # Read after the mark: an inference whose mark passes the fence of a prompt reset has the new prompt.
        prompt = self.prompt
        if not prompt:
            self._report(Problem(Reason.PROMPT_INVALID, "", "no prompt yet: call ~/set_prompt"))
            return None
        if not self._is_new(selected) or self._awaits_frame(selected, now) or not self.trigger.due(now):
            return None
        observation = self._observe(selected)
        self._observed()
        guidance = self.guide.guidance(mark, policy.spec)
        more = {} if guidance is None else {"rtc": guidance}
        images, state = observation.policy_images, observation.state
        begin = time.perf_counter()
        actions = policy.predict(images, prompt, state, seed=self._seed, **more)
        elapsed = time.perf_counter() - begin
        self._last_inference = to_ns(elapsed)
        frozen = 0 if guidance is None else guidance.delay
        robot = self._contract.actions_to_robot(actions)
        return Prediction(robot, mark, observation, prompt, elapsed, frozen)

    def fence_clock_jumps(self) -> None:
        """Streams whose stamps jumped back (a bag that loops): what was computed or used before is void."""
        jumps = self._synchroniser.clock_jumps
        if jumps == self._jumps:
            return
        self._jumps, self._used = jumps, {}
        self._commander.timeline.bump_generation()
        text = "header stamps jumped back: the actions of the time before were dropped"
        self._report(Problem(Reason.CLOCK, "", text))

    def _watch_clock_rate(self) -> None:
        """Report a simulated clock that does not keep real time, once until it does again."""
        if not getattr(self._clock, "ros_time_is_active", False):
            return
        self.clock_rate.add(self._clock.now().nanoseconds, time.monotonic_ns())
        problem = self.clock_rate.problem
        if problem is not None and not self._told_rate:
            self._report(problem)
        self._told_rate = problem is not None

    def _observe(self, selected: Snapshot) -> Observation:
        """Decode, and note how long everything before the model took."""
        measured = self._measurements
        begin = time.monotonic_ns()
        observation = self.ingest.observe(selected)
        self._used = self._camera_stamps(selected)
        end = time.monotonic_ns()
        newest = max(item.receipt for item in selected.messages.values())
        measured.sync_wait.add(to_s(begin - newest))
        measured.decode.add(to_s(end - begin))
        if observation.newest_image_stamp:  # every camera may be optional
            age = self._clock.now().nanoseconds - observation.newest_image_stamp
            measured.observation_age.add(to_s(age))
        return observation

    def _camera_stamps(self, snapshot: Snapshot) -> dict[str, int]:
        streams = self._contract.streams
        return {name: item.stamp for name, item in snapshot.messages.items() if streams[name].is_image}

    def _is_new(self, snapshot: Snapshot) -> bool:
        """Whether every camera has a frame newer than the last observation's, or one is newer by more than
        the allowed skew: waiting for the slowest for ever would waste the others."""
        stamps = self._camera_stamps(snapshot)
        if stamps.keys() != self._used.keys():
            return True
        if all(stamp > self._used[name] for name, stamp in stamps.items()):
            return True
        return max(stamps.values()) > max(self._used.values()) + self._contract.sync.max_skew

    def _awaits_frame(self, snapshot: Snapshot, now: int) -> bool:
        """Whether the next frame is worth waiting for."""
        cameras = self._camera_stamps(snapshot)
        if not self.wait_for_frame or not cameras:
            return False
        rates = self._synchroniser.rates(now)
        slowest = min(rates[name] for name in cameras)
        newest = max(snapshot.messages[name].receipt for name in cameras)
        period = int(NS_PER_S / slowest) if slowest else NS_PER_S
        remaining = self._commander.timeline.remaining
        return next_frame_is_better(now - newest, period, remaining, self._last_inference)
