"""Malformed messages through the node's own callbacks: no crash, no observation, no command, each counted."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from malformed import BASE, JOINTS, WRIST, good_messages, malformed

from flashrt_ros.core.contract import load_contract
from flashrt_ros.core.errors import IngestError
from flashrt_ros.core.ingest import Ingest, MeasuredPositions
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.refusals import MessageInspector, RefusedMessages
from flashrt_ros.core.sync import NotReady, Synchroniser
from flashrt_ros.nodes.streams import stream_callback

COUNT = 5_000


def test_five_thousand_malformed_messages_give_no_observation_and_are_counted_once_each() -> None:
    """Each comes between good messages of the other streams, as the newest of its own."""
    contract = load_contract("demo_arm")
    rng, refused, now = np.random.default_rng(11), RefusedMessages(), [10**18]
    synchroniser, inspector = Synchroniser(contract), MessageInspector(contract, refused)
    ingest = Ingest(contract, on_refused=refused.count)
    measured = MeasuredPositions(contract, synchroniser)
    callbacks = {
        stream.name: stream_callback(stream, synchroniser, lambda: None, inspector, lambda: now[0])
        for stream in contract.streams.values()
    }
    expected: Counter[str] = Counter()
    source = malformed(contract, rng, lambda: now[0])
    for index in range(COUNT):
        now[0] += 10**9  # whatever came before is too old
        bad = next(source)
        synchroniser.clear()
        for name, message in good_messages(contract, now[0]).items():
            callbacks[name](bad.message if name == bad.stream else message)
        selected = synchroniser.select(now[0], time.monotonic_ns())
        if not isinstance(selected, NotReady):
            with pytest.raises(IngestError) as caught:
                ingest.observe(selected)
            assert caught.value.stream == bad.stream
            assert caught.value.reason in bad.reasons, str(caught.value)
            with pytest.raises(IngestError):  # looked at again, it is not counted again
                ingest.observe(selected)
        if bad.stream == JOINTS and not bad.reasons & {Reason.CLOCK, Reason.STALE_STAMP}:
            with pytest.raises(IngestError):
                measured(time.monotonic_ns())
        expected[bad.stream] += 1
        counted = {name: sum(reasons.values()) for name, reasons in refused.counts().items()}
        assert counted == dict(expected), f"message {index}: {bad}"
    counts = refused.counts()
    assert set(counts) == {BASE, WRIST, JOINTS}
    assert {reason.name for reasons in counts.values() for reason in reasons} == {
        "IMAGE_SIZE", "IMAGE_ENCODING", "IMAGE_DECODE", "JOINT_MISSING", "JOINT_DUPLICATE", "JOINT_FIELD",
        "JOINT_NOT_FINITE", "CLOCK", "STALE_STAMP",
    }


def test_good_messages_are_not_counted() -> None:
    contract, refused = load_contract("demo_arm"), RefusedMessages()
    inspector = MessageInspector(contract, refused)
    for name, message in good_messages(contract, 10**18).items():
        assert not inspector.inspect(name, 10**18, 10**18, message)
    assert refused.counts() == {}
