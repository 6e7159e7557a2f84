"""~/get_action_chunk: one observation in the request, one chunk in the answer.

The model runs on the worker thread, and the executor answers everything else meanwhile.
"""

from __future__ import annotations

import array
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rclpy.node import Node
from trajectory_msgs.msg import JointTrajectory

from flashrt_ros.core.contract import Representation, RobotContract, RtcMode
from flashrt_ros.core.errors import CoreError, IngestError, WorkerStoppedError
from flashrt_ros.core.images import image_from_message
from flashrt_ros.core.ingest import JointReader, NamedValues
from flashrt_ros.core.problem import Problem
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.single_chunk import SingleChunk, single_chunk
from flashrt_ros.core.timing import to_s
from flashrt_ros.srv import GetActionChunk
from flashrt_runtime.errors import DeviceLostError, OptionError, PromptError
from flashrt_runtime.guidance import Guidance

from .calibration import calibrated
from .deferred import UNLOADED, DeferredService, Refused, Reply
from .exotic_images import cv_bridge_decoder
from .failures import describe
from .outputs import trajectory_message
from .pipeline import Pipeline
from .policy_runner import PolicyLike

Response = GetActionChunk.Response
_CODES = {
    Reason.CHUNK_NOT_FINITE: Response.CODE_INFERENCE,
    Reason.CHUNK_SHAPE: Response.CODE_INFERENCE,
    Reason.LIMIT_POSITION: Response.CODE_LIMIT,
    Reason.LIMIT_VELOCITY: Response.CODE_LIMIT,
    Reason.LIMIT_ACCELERATION: Response.CODE_LIMIT,
}


@dataclass(frozen=True)
class _Answer:
    """inference_time [s]; actions (n, dof) as the policy gave them, where they may be sent back."""

    chunk: SingleChunk
    inference_time: float
    actions: NDArray[np.float32] | None


class ChunkService:
    """Answers one request at a time; a second one is told so rather than queued before the robot's own."""

    def __init__(self, node: Node, pipeline: Callable[[], Pipeline | None]) -> None:
        self._pipeline = pipeline
        self._busy = threading.Lock()  # taken on the executor's thread, released on the worker's
        self._decoder = cv_bridge_decoder()
        DeferredService(node, GetActionChunk, "~/get_action_chunk", self._take)

    def _take(self, request: Any, reply: Reply) -> None:
        try:
            pipeline = self._usable()
            if not self._busy.acquire(blocking=False):
                text = "another request is being answered: send one at a time"
                raise Refused(Response.CODE_BUSY, text)
        except Refused as refusal:
            self._finish(reply, refusal)
            return
        try:
            work = pipeline.worker.call(lambda: self._fill(reply.response, pipeline, request))
        except WorkerStoppedError:
            self._busy.release()
            self._finish(reply, Refused(Response.CODE_NOT_CONFIGURED, UNLOADED))
            return
        work.add_done_callback(lambda done: self._done(reply, done))

    def _done(self, reply: Reply, done: Any) -> None:
        self._busy.release()
        unloaded = Refused(Response.CODE_NOT_CONFIGURED, UNLOADED)
        self._finish(reply, unloaded if done.cancelled() else done.exception())

    @staticmethod
    def _finish(reply: Reply, error: BaseException | None) -> None:
        """Send the answer; it must come whatever the runtime did."""
        if isinstance(error, Refused):
            reply.response.status, reply.response.message = error.code, str(error)
        elif error is not None:
            reply.response.status, reply.response.message = Response.CODE_INTERNAL, describe(error)
        reply.send()

    def _usable(self) -> Pipeline:
        pipeline = self._pipeline()
        if pipeline is None or pipeline.policy is None:
            raise Refused(Response.CODE_NOT_CONFIGURED, "no policy is loaded: configure the node first")
        if pipeline.playing:
            text = "the node is driving the robot, its inferences come first: deactivate it, or call ~/hold"
            raise Refused(Response.CODE_ACTIVE, text)
        if (job := pipeline.calibration) is not None:
            raise Refused(Response.CODE_BUSY, f"{job}: wait for it, or call ~/cancel_calibration")
        if not calibrated(pipeline):  # the first observation would set them, and the robot be driven by them
            raise Refused(
                Response.CODE_NOT_CALIBRATED,
                "the fp8 policy has no activation scales yet: call ~/calibrate, or activate the node, which "
                "calibrates on live observations first",
            )
        return pipeline

    # On the worker thread

    def _fill(self, response: Any, pipeline: Pipeline, request: Any) -> None:
        answer = self._infer(pipeline, request)
        response.chunk = _trajectory(answer.chunk, pipeline.contract)
        response.message = answer.chunk.note
        response.native_control_period = to_s(pipeline.contract.action.period)
        response.inference_time = answer.inference_time
        if answer.actions is not None:
            response.policy_action_chunk = array.array("f", answer.actions.astype(np.float32).tobytes())
            response.policy_action_dim = answer.actions.shape[1]

    def _infer(self, pipeline: Pipeline, request: Any) -> _Answer:
        policy, contract = pipeline.policy, pipeline.contract
        if policy is None:
            raise Refused(Response.CODE_NOT_CONFIGURED, UNLOADED)
        guidance = _guidance(request, contract)
        images = _images(request, contract, policy, self._decoder)
        state, measured = _state(request, contract)
        prompt = request.prompt.strip() or pipeline.prompt
        if not prompt:
            raise Refused(Response.CODE_BAD_PROMPT, "no prompt in the request, and none in force")
        begin = time.perf_counter()
        try:
            more = {} if guidance is None else {"rtc": guidance}
            actions = policy.predict(images, prompt, state, seed=None, **more)
        except PromptError as error:
            raise Refused(Response.CODE_BAD_PROMPT, describe(error)) from error
        except OptionError as error:  # of the guidance: all else is the node's own
            raise Refused(Response.CODE_BAD_REQUEST, describe(error)) from error
        except Exception as error:
            if isinstance(error, DeviceLostError):
                pipeline.raise_fault(Problem(Reason.DEVICE_LOST, "", describe(error)))
            raise Refused(Response.CODE_INFERENCE, describe(error)) from error
        elapsed = time.perf_counter() - begin
        chunk = _limited(contract.actions_to_robot(actions), measured, contract)
        sent_back = None if contract.timeline.rtc.mode is RtcMode.OFF else actions
        return _Answer(chunk, elapsed, sent_back)


def _guidance(request: Any, contract: RobotContract) -> Guidance | None:
    """What the previous chunk of the request says about the next: consistent, and supported."""
    previous, rtc = np.asarray(request.previous_action_chunk, np.float64), contract.timeline.rtc
    if not len(previous):
        if request.frozen_prefix_steps or request.guidance_horizon:
            text = "frozen_prefix_steps and guidance_horizon are about a previous_action_chunk, and none came"
            raise Refused(Response.CODE_BAD_REQUEST, text)
        return None
    if request.new_episode:
        raise Refused(Response.CODE_BAD_REQUEST, "a new episode has no previous_action_chunk: leave it empty")
    if rtc.mode is RtcMode.OFF:
        text = "this node does not condition on a previous chunk: set rtc.mode, or leave the chunk empty"
        raise Refused(Response.CODE_NOT_SUPPORTED, text)
    if len(previous) % contract.dof or not np.isfinite(previous).all():
        text = f"previous_action_chunk: {len(previous)} numbers, expected finite rows of {contract.dof}"
        raise Refused(Response.CODE_BAD_REQUEST, text)
    return Guidance(
        previous.reshape(-1, contract.dof),
        delay=request.frozen_prefix_steps,
        horizon=request.guidance_horizon or rtc.horizon,
        schedule=rtc.schedule,  # type: ignore[arg-type]
        max_weight=rtc.max_guidance,
    )


def _images(request: Any, contract: RobotContract, policy: PolicyLike, decoder: Any) -> dict[str, Any]:
    """Images by view, decoded and cropped as those of the topics are."""
    code, names = Response.CODE_BAD_IMAGES, list(request.image_names)
    if len(names) != len(request.images):
        raise Refused(code, f"{len(request.images)} images, but {len(names)} image_names")
    by_name = {stream.name: stream for stream in contract.image_streams}
    by_name |= {stream.view: stream for stream in contract.image_streams if stream.view is not None}
    found: dict[str, Any] = {}
    for name, message in zip(names, request.images, strict=True):
        stream = by_name.get(name)
        if stream is None or stream.view is None:
            raise Refused(code, f"image '{name}': expected views or streams of {', '.join(by_name)}")
        if stream.view in found:
            raise Refused(code, f"two images for view {stream.view}")
        try:
            found[stream.view] = image_from_message(
                message, stream=name, crop=stream.crop, fallback_decoder=decoder,
                colour_order=stream.colour_order,
            )
        except IngestError as error:
            raise Refused(code, str(error)) from error
    if missing := [view for view in policy.spec.views if view not in found]:
        raise Refused(code, f"no image for view {', '.join(missing)}; got {', '.join(names) or 'none'}")
    return found


def _state(request: Any, contract: RobotContract) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """State vector for the policy, and positions of the commanded joints in robot units."""
    message = request.robot_state
    sources = {source.stream: message for source in contract.state.sources}
    try:
        # One message cannot hold two arms that name their joints alike: there the contract's names are meant.
        ours = contract.shares_message_names
        joints = contract.action.joints
        names = joints if ours else contract.message_names(joints)
        measured = NamedValues(names, "position", "robot_state").read(message)
        return JointReader(contract, contract_names=ours).state(sources), measured
    except IngestError as error:
        raise Refused(Response.CODE_BAD_STATE, str(error)) from error


def _limited(
    actions: NDArray[np.float64], measured: NDArray[np.float64], contract: RobotContract
) -> SingleChunk:
    try:
        return single_chunk(actions, measured, contract)
    except CoreError as error:
        raise Refused(_CODES.get(error.reason, Response.CODE_BAD_STATE), str(error)) from error


def _trajectory(chunk: SingleChunk, contract: RobotContract) -> JointTrajectory:
    """Header stamp 0: starts when it is received."""
    names = contract.message_names(contract.action.joints)
    if contract.action.representation is not Representation.VELOCITY:
        return trajectory_message(chunk.points, names, 0)
    message = trajectory_message(replace(chunk.points, velocities=chunk.values), names, 0)
    for point in message.points:  # a velocity policy says nothing of positions
        point.positions = array.array("d")
    return message
