"""One observation in one block of pinned memory and its twin on the device.

Its images, and the table of where each lies, go there in copies of their own, which may start early, all else
in another; the result comes back in one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ops import native

ALIGNMENT = 256
FRAME_BYTES = 1920 * 1080 * 3


class Staging:
    """Static inputs of a captured graph: device tensors that are views of one buffer, refilled by `upload`.

    views: (count, 3) int64 rows (byte offset in frames, height, width); prefix_length: int32 scalar;
    tokens: (capacity,) int64; state: (action_dim,) and noise: `noise_shape` float32; frames: the images'
    bytes. actions: where a result like `output` is copied back to.
    """

    def __init__(
        self,
        num_views: int,
        capacity: int,
        action_dim: int,
        noise_shape: tuple[int, int],
        output: Tensor,
        frame_bytes: int,
        device: torch.device,
        extra: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] | None = None,
    ) -> None:
        """extra: dtype and shape of further inputs, kept in `extra` and written by `write`."""
        extra = extra or {}
        layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "prefix_length": (torch.int32, ()),
            "tokens": (torch.int64, (capacity,)),
            "state": (torch.float32, (action_dim,)),
            "noise": (torch.float32, noise_shape),
            **extra,
            "views": (torch.int64, (num_views, 3)),
            "frames": (torch.uint8, (frame_bytes,)),
        }
        offsets, size = {}, 0
        for name, (dtype, shape) in layout.items():
            offsets[name] = size
            size += -(-prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self.images_offset, self.frames_offset = offsets["views"], offsets["frames"]
        self.host = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.device = torch.zeros(size, dtype=torch.uint8, device=device)
        self._rest_host, self._rest_device = (
            each[: self.images_offset] for each in (self.host, self.device)
        )

        def part(buffer: Tensor, name: str) -> Tensor:
            dtype, shape = layout[name]
            end = offsets[name] + prod(shape) * dtype.itemsize
            return buffer[offsets[name] : end].view(dtype).view(shape)

        self.prefix_length, self.tokens, self.state, self.noise, self.views, self.frames = (
            part(self.device, name) for name in layout if name not in extra
        )
        self.extra: dict[str, Tensor] = {name: part(self.device, name) for name in extra}
        self.host_parts: dict[str, NDArray[np.generic]] = {
            name: part(self.host, name).numpy() for name in layout
        }
        self.actions = torch.zeros(output.shape, dtype=output.dtype, pin_memory=device.type == "cuda")
        self.result: NDArray[np.generic] = self.actions.numpy()  # the same memory
        self._geometry: list[tuple[tuple[int, ...], tuple[int, ...]]] | None = None  # of the last images
        self._offsets: list[int] = []  # of them, behind `images_offset`
        self._whole_rows = False
        self.uploader = (
            native.image_upload(self.host[self.images_offset :], self.device[self.images_offset :])
            if device.type == "cuda" and native.available()
            else None
        )

    @property
    def frame_bytes(self) -> int:
        """Room for the images of one observation."""
        return self.frames.numel()

    def start_images(
        self,
        images: Sequence[NDArray[np.uint8]],
        stream: torch.cuda.Stream,
        graph: torch.cuda.CUDAGraph | None = None,
    ) -> None:
        """Start the copy of the images (H, W, 3) uint8 to the device, and a graph behind it, on a stream.

        With our kernels' module threads without the interpreter do it, and must be waited for by
        `finish_images`; images and graph must not change until then.
        """
        self._arrange(images)
        launchable = graph is None or hasattr(graph, "raw_cuda_graph_exec")  # not in older torch
        if self.uploader is not None and launchable and self._whole_rows:
            raw_graph = 0 if graph is None else graph.raw_cuda_graph_exec()
            self.uploader.begin(images, self._offsets, graph, raw_graph, stream.cuda_stream)
            return
        self.finish_images()
        count = self.write_images(images)
        with torch.inference_mode(), torch.cuda.stream(stream):
            self.upload_images(count)
            if graph is not None:
                graph.replay()

    def finish_images(self) -> None:
        """Wait until what `start_images` started is queued. Raises RuntimeError when a part failed."""
        if self.uploader is not None:
            self.uploader.finish()

    def expect_images(self) -> None:
        """Images are about to come: wakes the threads that copy them."""
        if self.uploader is not None:
            self.uploader.expect()

    def _arrange(self, images: Sequence[NDArray[np.uint8]]) -> None:
        """Note where each image will lie: behind one another, as the last ones if they were alike."""
        geometry = [(image.shape, image.strides) for image in images]
        if geometry == self._geometry:
            return
        self._geometry = None  # until all is written
        before = self.frames_offset - self.images_offset
        ends = np.cumsum([0, *(image.size for image in images)])
        for index, image in enumerate(images):
            self.host_parts["views"][index] = (ends[index], *image.shape[:2])
        self._offsets = [before + int(start) for start in ends[:-1]]
        self._whole_rows = all(map(_whole_rows, images))
        self._geometry = geometry

    def write_images(self, images: Sequence[NDArray[np.uint8]]) -> int:
        """Write the images (H, W, 3) uint8 into the pinned block. Returns how many bytes they take."""
        count = 0
        self._arrange(images)
        for image in images:
            offset, count = count, count + image.size
            # Into the image's own shape: flattening rows with padding, or a crop, would copy them once more.
            self.host_parts["frames"][offset:count].reshape(image.shape)[...] = image
        return count

    def write(
        self,
        prefix_length: int,
        tokens: NDArray[np.int64],
        state: NDArray[np.float32] | None,
        noise: NDArray[np.float32],
        extra: Mapping[str, NDArray[np.generic]] | None = None,
    ) -> None:
        """Write all else of one observation into the pinned block."""
        parts = self.host_parts
        parts["prefix_length"][...] = prefix_length
        parts["tokens"][: len(tokens)] = tokens
        parts["tokens"][len(tokens) :] = 0
        if state is not None:
            parts["state"][:] = state
        parts["noise"][:] = noise
        for name, values in (extra or {}).items():
            parts[name][...] = values

    def upload_images(self, count: int) -> None:
        """Start the copy of `count` bytes of images, and of where each lies, on the current stream."""
        start, end = self.images_offset, self.frames_offset + count
        self.device[start:end].copy_(self.host[start:end], non_blocking=True)

    def upload(self) -> None:
        """Start the copy of all else on the current stream."""
        self._rest_device.copy_(self._rest_host, non_blocking=True)


def _whole_rows(image: NDArray[np.uint8]) -> bool:
    """Whether each row's bytes lie together, rows in their order."""
    return image.strides[1:] == (image.shape[2], 1) and image.strides[0] >= image.shape[1] * image.shape[2]
