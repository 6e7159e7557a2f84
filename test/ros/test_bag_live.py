"""A bag played over topics and the same bag read: the policy is shown the same bytes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import rclpy
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from ros_rig import DomainLock, wait_until

from benchmarks.synthetic_bag import MS, Entry, write_bag
from flashrt_ros.core.bag_reader import open_bag
from flashrt_ros.core.bag_source import BagSource, Moment
from flashrt_ros.core.contract import RobotContract, load_contract
from flashrt_ros.core.timing import to_ns
from flashrt_ros.nodes.decoding import ros_decoder
from flashrt_ros.nodes.pipeline import Pipeline
from flashrt_ros.nodes.streams import STREAM_MESSAGES, qos_profile, subscribe


class ShownPolicy:
    """Keeps a copy of what it is shown; a real policy does not say what it saw."""

    precision = "fp32"

    def __init__(self, names: tuple[str, ...]) -> None:
        self.spec = SimpleNamespace(
            views=("base_0_rgb", "left_wrist_0_rgb"), state_dim=7, action_dim=7, state_names=names,
            action_names=names, action_rate_hz=50.0, checkpoint="stand-in",
        )
        self.shown: list[tuple[dict[str, np.ndarray], np.ndarray]] = []

    def set_prompt(self, prompt: str) -> None:
        pass

    def predict(self, images, prompt, state, *, seed=None):
        self.shown.append(({view: image.copy() for view, image in images.items()}, state.copy()))
        return np.tile(np.asarray(state, np.float32), (50, 1))

    def close(self) -> None:
        pass


def patient(contract: RobotContract) -> RobotContract:
    """With streams that may be 2 s old, so that a busy machine drops nothing on either side."""
    streams = {name: replace(stream, max_age=to_ns(2.0)) for name, stream in contract.streams.items()}
    return replace(contract, streams=MappingProxyType(streams))


def uneven(entry: Entry) -> Entry | None:
    """Late, lost and doubled stamps, so that the newest set is not simply the last messages."""
    name, index, stamp, time_, data = entry
    if name == "wrist_camera":
        return None if index % 7 == 3 else (name, index, stamp, time_ + 15 * MS, data)
    if name == "base_camera" and index % 11 == 5:
        return (name, index, stamp - 40 * MS, time_, data)
    return entry


@contextlib.contextmanager
def spinning() -> Iterator[tuple[Any, Any]]:
    """(driver, node) in a domain of their own, in one context that a thread spins."""
    domain, context = DomainLock(), Context()
    rclpy.init(context=context, domain_id=domain.number)
    driver = rclpy.create_node("driver", context=context)
    node = rclpy.create_node("listener", context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            executor.spin_once(timeout_sec=0.05)

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        yield driver, node
    finally:
        stop.set()
        thread.join()
        executor.shutdown()
        rclpy.shutdown(context=context)
        domain.release()


@pytest.mark.parametrize(
    ("keywords", "storage"),
    [
        ({"encoding": "rgb8", "padding": 12}, {"storage": "mcap"}),
        pytest.param(
            {"encoding": "bgr8"}, {"storage": "sqlite3", "compression": "message"}, marks=pytest.mark.slow
        ),
    ],
    ids=["rgb8 with padding, mcap", "bgr8, sqlite3 with compressed messages"],
)
def test_live_and_bag_show_the_policy_the_same(tmp_path, keywords, storage) -> None:
    """Every message of the bag goes over DDS, one after the other; after each camera image the node infers
    as it does on a robot. At every such moment the bag, read by seeking, gives the same bytes, decoded by ROS
    or without it."""
    contract = patient(load_contract("demo_arm"))
    path = write_bag(tmp_path / "bag", contract, 1.5, change=uneven, **keywords, **storage)
    policy = ShownPolicy(contract.action.joints)
    live = _play(path, contract, policy)
    assert len(live) == len(policy.shown) > 30
    for decode in (None, ros_decoder()):
        with BagSource(path, contract, decode=decode) as source:
            _check_same(live, list(source.observe(live)), policy)


def _check_same(live: list[int], moments: list[Moment], policy: ShownPolicy) -> None:
    for time_, moment, (images, state) in zip(live, moments, policy.shown, strict=True):
        observation = moment.observation
        assert observation is not None, f"{time_}: {moment.problem}"
        assert observation.images.keys() == images.keys()
        for view, image in images.items():
            assert image.dtype == observation.images[view].dtype == np.uint8
            np.testing.assert_array_equal(image, observation.images[view], err_msg=f"{view} at {time_}")
        assert state.dtype == observation.state.dtype
        assert state.tobytes() == observation.state.tobytes()


def _play(path: Any, contract: RobotContract, policy: ShownPolicy) -> list[int]:
    """Play the bag over topics into a pipeline; the recorder's times of the messages it inferred after."""
    now, inferred = [0], []
    problems: list[Any] = []
    with spinning() as (driver, node):
        pipeline = Pipeline(
            contract,
            SimpleNamespace(now=lambda: SimpleNamespace(nanoseconds=now[0])),
            publish_command=lambda output, stamp: None,
            publish_chunk=lambda placed: None,
            on_problem=problems.append,
        )
        try:
            pipeline.load(lambda: policy, "wave", lambda: True)
            subscribe(node, contract, pipeline.synchroniser, on_image=pipeline.wake)
            publishers = {}
            for name, stream in contract.streams.items():
                profile = qos_profile(replace(stream.qos, reliability="reliable"))
                publisher = driver.create_publisher(STREAM_MESSAGES[stream.type], stream.topic, profile)
                publishers[f"/{stream.topic}"] = (name, publisher)
            for _, publisher in publishers.values():
                wait_until(publisher.get_subscription_count, 10.0, "discovery")
            pipeline.start()
            reader = open_bag(path)
            for message in reader.read(list(publishers), reader.start, reader.end + 1):
                name, publisher = publishers[message.topic]
                before, known = len(policy.shown), pipeline.synchroniser.newest(name)
                now[0] = message.time
                publisher.publish(message.data)
                deadline = time.monotonic() + 10.0
                while pipeline.synchroniser.newest(name) is known:
                    assert time.monotonic() < deadline, f"not received: {message.topic}"
                    time.sleep(0.0005)
                if contract.streams[name].is_image:
                    pipeline.wake()  # the callback's own call may still be on its way
                    wait_until(lambda: pipeline.worker.idle, 10.0, "an idle worker")
                inferred += [message.time] * (len(policy.shown) - before)
            reader.close()
        finally:
            pipeline.close()
    return inferred
