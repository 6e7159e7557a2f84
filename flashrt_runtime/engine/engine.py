"""The captured forward: what the images alone decide as one CUDA graph, and all behind it, prefix and every
denoise step, as one per prompt bucket.

A graph takes every input from static buffers and the prompt's valid length from the device. A prompt of any
length runs in the smallest bucket that holds it: nothing is captured, compiled or allocated after
`capture`. The first graph runs while the prompt is still encoded.
"""

from __future__ import annotations

import contextlib
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import ops
from ..config import PATCH_SIZE, FamilyRules
from ..guidance import RtcMode
from ..models import PrefixPolicy
from ..models.flow import Guide, guided
from ..ops import native, prefix, variants
from ..processing.guidance import GuideArrays
from ..processing.images import prepare_image
from ..quantization.calibration import Calibrator
from .repeats import Repeats
from .staging import FRAME_BYTES, Staging

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

BUCKETS = (48, 64, 96, 128)
TIMED_REPLAYS = 5
# Of a replay the waiting thread polls at least so much, without the GIL, and sleeps most of the rest: a
# processor that has slept is slow for a while, its caches are empty.
POLLED_S = 10e-3 if (os.cpu_count() or 1) > 4 else 2e-3
SLEPT_SHARE = 0.9
# what a capture makes anew: graphs, and the buffers that they read and write
CAPTURED = ("staging", "guide", "vision_graph", "image_features", "graphs", "graph_ms", "repeats")


def prompt_buckets(capacity: int) -> tuple[int, ...]:
    """Prompt lengths that get a graph each, the policy's capacity last."""
    return (*(bucket for bucket in BUCKETS if bucket < capacity), capacity)


class Engine:
    """Runs one loaded model on one GPU. Not thread-safe: the policy that owns it takes one call at a time.

    autotune: captures per bucket, of which the one that replays fastest is kept; 0 also takes the kernels
    that `ops.variants` has and measures none; anew: what they know is measured again. whole: what the model
    repeats is one graph, see `Repeats`. rtc: the graphs follow guidance, which they read from static buffers;
    without any they give what graphs that know none give, bit for bit.
    """

    def __init__(
        self,
        model: PrefixPolicy,
        rules: FamilyRules,
        device: torch.device,
        autotune: int = 3,
        whole: bool = False,
        rtc: RtcMode = "off",
        anew: bool = False,
    ) -> None:
        self.model = model
        self.anew = anew
        self.rtc = rtc
        self.device = device
        self.autotune = autotune
        self.antialias = rules.resize == "antialias_uint8"
        self.resize_rule = rules.resize
        self.on_device_resize = native.available()
        self.stream = torch.cuda.Stream(device)
        self.done = torch.cuda.Event()
        self.started, self.ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        config = model.config
        self.buckets = prompt_buckets(config.prompt_capacity)
        self.image_tokens = model.num_views * config.vision.tokens
        self.captures = 0
        self.vision_graph: torch.cuda.CUDAGraph | None = None
        self.image_features = torch.empty(0, device=device)  # image tokens: from the one graph to the others
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.graph_ms: dict[int, float] = {}
        self.before = torch.cuda.Event()
        self.begun: Sequence[NDArray[np.uint8]] | None = None
        self.actions = model.new_output(device)  # action tokens, where the model generates those
        self.whole = whole
        self.repeats: Repeats | None = None
        self._allocate(FRAME_BYTES * model.num_views)

    def _allocate(self, frame_bytes: int) -> None:
        config = self.model.config
        if not self.on_device_resize:  # the host resizes, model-ready float32 pixels are staged
            frame_bytes = self.model.num_views * 3 * config.vision.image_size**2 * 4
        self.staging = Staging(
            self.model.num_views,
            config.prompt_capacity,
            config.action_dim,
            self.model.noise_shape,
            self.actions,
            frame_bytes,
            self.device,
            extra=GuideArrays.layout(config) if self.rtc != "off" else None,
        )
        self.guide = Guide(**self.staging.extra, trained=self.rtc == "trained") if self.rtc != "off" else None
        self.unguided = GuideArrays.none(config).arrays() if self.rtc != "off" else None

    def images(self) -> Tensor:
        """The staged images as the vision tower takes them."""
        vision = self.model.config.vision
        if self.on_device_resize:
            staging, tower = self.staging, self.model.paligemma.vision
            as_levels = self.antialias and tower.levels is not None  # else pixels are no whole numbers
            return prefix.camera_patches(
                staging.frames, staging.views, vision.image_size, PATCH_SIZE, self.antialias, as_levels
            )
        pixels = self.staging.frames.view(torch.float32)
        return pixels.view(self.model.num_views, 3, vision.image_size, vision.image_size)

    def encode_images(self) -> Tensor:
        """The first work that is captured: staged images to image tokens."""
        return self.model.paligemma.embed_images(self.images())

    def generate(self, image_features: Tensor, bucket: int) -> None:
        """The rest: the staged observation to `actions`, up to what the model repeats."""
        model, staging = self.model, self.staging
        ops.assign(model.prefix_length, staging.prefix_length)
        model.prefill_padded(image_features, staging.tokens[:bucket])
        with guided(model, self.guide):
            model.generate(staging.state, staging.noise, self.actions)

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture the images' part and every bucket; some hundred milliseconds each. Scales of quantised
        activations may come later.
        """
        started = time.perf_counter()
        self._stage_example()
        pool: Any = torch.cuda.graph_pool_handle()
        with contextlib.ExitStack() as entered:
            entered.enter_context(torch.cuda.device(self.device))
            entered.enter_context(torch.cuda.stream(self.stream))
            entered.enter_context(Calibrator(self.model).assumed())
            if self.autotune:
                entered.enter_context(self._tuned())
            _, self.vision_graph, self.image_features = self._fastest(self.encode_images, pool)
            self.graphs, self.graph_ms = {}, {}
            for bucket in self.buckets:
                work = partial(self.generate, self.image_features, bucket)
                self.graph_ms[bucket], self.graphs[bucket], _ = self._fastest(work, pool)
            if self.model.repeats(self.actions):
                self.repeats = Repeats(self.model, self.staging.noise, self.actions, self.whole)
                self.repeats.capture(self.stream, pool)
        self.anew = False
        logger.info(
            "captured graphs for prompts of up to %s tokens in %.2f s",
            ", ".join(map(str, self.buckets)),
            time.perf_counter() - started,
        )

    def _tuned(self) -> contextlib.AbstractContextManager[None]:
        """Kernels chosen by measurement, or by those of an earlier load on such a GPU."""
        identity, file = variants.device_identity(self.device), variants.device_file(self.device)
        return variants.of(self.device).remembered(identity, file, self.anew)

    def _fastest(
        self, work: Callable[[], Result], pool: Any
    ) -> tuple[float, torch.cuda.CUDAGraph, Result]:
        """Milliseconds and graph of the capture that replays fastest, and what `work` returned in it."""
        # libraries choose algorithms and allocate workspaces outside the capture
        with variants.of(self.device).measuring() if self.autotune else contextlib.nullcontext():
            work()
        self.stream.synchronize()
        candidates: list[tuple[float, torch.cuda.CUDAGraph, Result]] = []
        for _ in range(max(1, self.autotune)):
            graph = torch.cuda.CUDAGraph()
            # thread_local: a calibration in another thread may allocate meanwhile
            with torch.cuda.graph(
                graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                result = work()
            self.captures += 1
            candidates.append((self._replay_time(graph), graph, result))
        return min(candidates, key=lambda candidate: candidate[0])

    def _replay_time(self, graph: torch.cuda.CUDAGraph) -> float:
        times: list[float] = []
        for _ in range(TIMED_REPLAYS):
            self.started.record(self.stream)
            graph.replay()
            self.ended.record(self.stream)
            self.ended.synchronize()
            times.append(self.started.elapsed_time(self.ended))
        return statistics.median(times)

    def _stage_example(self) -> None:
        """Something valid in the static buffers, so that captures and their timing read no garbage."""
        config = self.model.config
        size = config.vision.image_size
        grey = [np.full((size, size, 3), 127, np.uint8)] * self.model.num_views
        noise = np.random.default_rng(0).standard_normal(self.model.noise_shape, np.float32)
        state = np.zeros(config.action_dim, np.float32)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.vision_graph = None  # it is still to be captured, or reads other buffers
            self._upload(grey, np.ones(1, np.int64), state, noise)
        self.stream.synchronize()

    def _upload(
        self,
        images: Sequence[NDArray[np.uint8]],
        tokens: NDArray[np.int64],
        state: NDArray[np.float32] | None,
        noise: NDArray[np.float32],
        guide: GuideArrays | None = None,
    ) -> None:
        if self.begun is not images:
            self._start(images)
            self.begun = images
        extra = self.unguided if guide is None else guide.arrays()
        self.staging.write(self.image_tokens + len(tokens), tokens, state, noise, extra)
        self.staging.finish_images()
        self.begun = None
        self.staging.upload()

    def expect(self) -> None:
        """An observation is about to come: what has to wake up for it does."""
        self.staging.expect_images()

    def begin(self, images: Sequence[NDArray[np.uint8]]) -> None:
        """Start on the next `run`'s images, upload and first graph, while the caller prepares the rest.

        Images that do not fit are left to `run`. Until then the scales in force must stay. What the caller's
        stream does to them or to the model's buffers must be over, see `caller_settled`.
        """
        self._give_up_begun()
        if self._fits(images):
            self._start(images)
            self.begun = images

    def _give_up_begun(self) -> None:
        """Behind an observation that was begun and never run: its copies read what the next one writes."""
        if self.begun is None:
            return
        self.begun = None
        try:
            self.staging.finish_images()
        except RuntimeError as error:  # nobody waits for those images any more
            logger.warning("images of an observation that was given up: %s", error)
        self.stream.synchronize()

    @contextlib.contextmanager
    def caller_settled(self) -> Iterator[None]:
        """Nothing that the block runs on the caller's stream is under way behind it, whatever it raises: a
        calibration there writes scales and buffers that graphs use.
        """
        try:
            yield
        except BaseException:
            with contextlib.suppress(RuntimeError):  # a lost GPU: what was raised says so
                torch.cuda.current_stream(self.device).synchronize()
            raise
        torch.cuda.current_stream(self.device).synchronize()

    def _follow_caller(self) -> None:
        """The rest of `run` is behind what the caller's stream has under way."""
        self.before.record(torch.cuda.current_stream(self.device))
        self.stream.wait_event(self.before)

    def _start(self, images: Sequence[NDArray[np.uint8]]) -> None:
        if not self.on_device_resize:
            size, rule = self.model.config.vision.image_size, self.resize_rule
            pixels = [prepare_image(image, size, rule).numpy() for image in images]
            images = [np.ascontiguousarray(each).view(np.uint8).reshape(1, -1, 1) for each in pixels]
        self.staging.start_images(images, self.stream, self.vision_graph)

    def _fits(self, images: Sequence[NDArray[np.uint8]]) -> bool:
        return not self.on_device_resize or sum(image.size for image in images) <= self.staging.frame_bytes

    def replay(self, bucket: int) -> None:
        """The whole forward on what is staged, on the current stream: for measurements."""
        assert self.vision_graph is not None
        self.vision_graph.replay()
        self.graphs[bucket].replay()

    def bucket_of(self, tokens: int) -> int:
        """The smallest bucket that holds a prompt of `tokens`."""
        return next(bucket for bucket in self.buckets if bucket >= tokens)

    @torch.inference_mode()
    def run(
        self,
        images: Sequence[NDArray[np.uint8]],
        tokens: NDArray[np.int64],
        state: NDArray[np.float32] | None,
        noise: NDArray[np.float32],
        guide: GuideArrays | None = None,
    ) -> NDArray[np.generic]:
        """One observation: images (H, W, 3) uint8 of any size, one per view; tokens (L,) int64; state
        (action_dim,) float32 normalised and padded, or None; noise of the model's `noise_shape`, float32;
        guide: what to go on from, with `rtc` only.

        Returns the model's output: (horizon, action_dim) float32 in model space, or (max_tokens,) int64.
        Waits without holding the GIL.
        """
        if self.begun is not images:
            self._give_up_begun()
        if not self._fits(images):
            needed = sum(image.size for image in images)
            logger.warning(
                "images of %.1f MB: larger static buffers, graphs are captured again", needed / 1e6
            )
            saved = {name: getattr(self, name) for name in CAPTURED}
            try:
                self._allocate(needed)
                self.capture()
            except BaseException:  # the graphs in force read the buffers they were captured with
                with contextlib.suppress(RuntimeError):  # a lost GPU: what was raised says so
                    self.stream.synchronize()
                for name, value in saved.items():
                    setattr(self, name, value)
                raise
        self._follow_caller()
        with self._settled():
            bucket = self.bucket_of(len(tokens))
            with torch.cuda.stream(self.stream):
                self._upload(images, tokens, state, noise, guide)
                self.graphs[bucket].replay()
                if self.repeats is not None:
                    self.repeats.run()
                self.staging.actions.copy_(self.actions, non_blocking=True)
                self.done.record(self.stream)
            stepwise = self.repeats is not None and not self.whole  # has waited for all but the last step
            self._wait(None if stepwise else bucket)
        return self.staging.result.copy()

    @contextlib.contextmanager
    def _settled(self) -> Iterator[None]:
        """An error or an interrupt leaves nothing under way that the next caller's buffers are read by."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(RuntimeError):  # a lost GPU: what was raised says so
                self._give_up_begun()
                self.stream.synchronize()
            raise

    def _wait(self, bucket: int | None) -> None:
        """Sleep through what a bucket's replay takes beyond `POLLED_S`, then poll: waking up takes longer."""
        if bucket is not None and (beyond_s := self.graph_ms[bucket] / 1e3 - POLLED_S) > 0:
            time.sleep(beyond_s * SLEPT_SHARE)
            if self.done.query():  # slept too long: the GPU was slower when this was captured
                self.graph_ms[bucket] *= SLEPT_SHARE
        self.done.synchronize()
