"""Real-time chunking as the contract has it: what each inference is told of the chunk being played."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flashrt_ros.core.contract import RobotContract, RtcMode
from flashrt_ros.core.contract_model import FloatArray
from flashrt_ros.core.delay import DelayEstimate
from flashrt_ros.core.problem import Problem
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.timeline import Accepted, ObservationMark
from flashrt_ros.core.timing import period_ratio
from flashrt_runtime.guidance import Guidance


class ChunkGuide:
    """Belongs to the worker thread, but for `adopt`."""

    def __init__(
        self, contract: RobotContract, plan: Callable[[ObservationMark, int], FloatArray],
        report: Callable[[Problem], None],
    ) -> None:
        """`plan`: see Commander.plan. `report` is told when more actions are consumed than the checkpoint was
        trained for."""
        self._plan = plan
        self._report = report
        self._delay = DelayEstimate(period_ratio(contract.action.period, contract.rates.control_period))
        self.adopt(contract)

    def adopt(self, contract: RobotContract) -> None:
        """Take schedule, horizon and weight of `contract`; the mode must be as before. Any thread."""
        self._contract = contract

    @property
    def delay(self) -> int:
        """Actions that are consumed during an inference, as far as known."""
        return self._delay.actions

    def forget(self) -> None:
        """As before the first chunk (activate, new episode)."""
        self._delay.clear()

    def guidance(self, mark: ObservationMark, spec: Any) -> Guidance | None:
        """For the inference that begins at `mark`, by a policy of `spec`; None when there is nothing to go on
        from."""
        rtc = self._contract.timeline.rtc
        if rtc.mode is RtcMode.OFF:
            return None
        plan = self._plan(mark, max(rtc.horizon, self.delay))
        if not len(plan):
            return None
        delay = min(self.delay, len(plan), spec.horizon)
        if rtc.mode is RtcMode.TRAINED and delay > (trained := spec.rtc_training_max_delay):
            text = f"{delay} actions are consumed by an inference, the checkpoint was trained for {trained}"
            self._report(Problem(Reason.RTC_DELAY, "", f"{text}: the seam is blended"))
            delay = trained
        return Guidance(
            self._contract.actions_to_policy(plan),
            delay=delay,
            horizon=rtc.horizon,
            schedule=rtc.schedule,  # type: ignore[arg-type]
            max_weight=rtc.max_guidance,
        )

    def placed(self, mark: ObservationMark, accepted: Accepted) -> None:
        """The chunk of `mark` was spliced in."""
        self._delay.add(mark, accepted)
