"""Inference on a watermark; the other modes are tested with the threads that use them."""

from flashrt_ros.core.contract_model import RatesSpec
from flashrt_ros.core.trigger import InferenceTrigger


def test_a_watermark_is_due_once_less_than_it_is_left() -> None:
    left = [0]
    trigger = InferenceTrigger(RatesSpec(20_000_000, None, 300), lambda: left[0])
    assert trigger.due(0)  # nothing plays
    for left[0], due in ((1000, False), (300, False), (299, True), (0, True), (900, False)):
        assert trigger.due(1) is due
