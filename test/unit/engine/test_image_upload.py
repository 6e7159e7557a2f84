"""Images on their way to the device, by the thread of our kernels' module and without it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flashrt_runtime.engine.staging import Staging
from flashrt_runtime.ops import native

pytestmark = pytest.mark.gpu

FRAME_BYTES = 2 * 640 * 480 * 3


def staging() -> Staging:
    device = torch.device("cuda", torch.cuda.current_device())
    return Staging(2, 8, 32, (10, 32), torch.zeros(10, 32), FRAME_BYTES, device)


def frames(seed: int) -> dict[str, list[np.ndarray]]:
    """Pairs of images as drivers and crops hand them over."""
    message = np.random.default_rng(seed).integers(0, 256, (480, 2000), dtype=np.uint8)
    padded = message[:, :1920].reshape(480, 640, 3)
    whole = np.ascontiguousarray(padded)
    return {
        "whole": [whole, whole[:224]],
        "padded": [padded, padded[40:440, 100:500]],
        "one row": [whole[:1], padded[3:4, 5:8]],
        "upside down": [whole[::-1], whole],
        "bgr": [whole[..., ::-1], padded[..., ::-1]],
    }


def check(block: Staging, images: list[np.ndarray]) -> None:
    block.upload()
    torch.cuda.synchronize()
    for (offset, height, width), image in zip(block.views.tolist(), images, strict=True):
        frame = block.frames[offset : offset + height * width * 3].view(height, width, 3)
        assert np.array_equal(frame.cpu().numpy(), image)


@pytest.mark.parametrize("kind", list(frames(0)))
@pytest.mark.parametrize("thread", [True, False])
def test_every_layout_arrives(kind: str, thread: bool) -> None:
    block, stream = staging(), torch.cuda.Stream()
    assert native.available()
    assert block.uploader is not None
    if not thread:
        block.uploader = None
    with torch.cuda.stream(stream):
        for seed in range(5):
            block.frames.fill_(255)
            images = frames(seed)[kind]
            block.start_images(images, stream)
            block.finish_images()
            check(block, images)


@pytest.mark.parametrize("thread", [True, False])
def test_a_graph_sees_all_images_and_where_they_lie(thread: bool) -> None:
    block, stream = staging(), torch.cuda.Stream()
    if not thread:
        block.uploader = None
    seen = torch.empty_like(block.frames), torch.empty_like(block.views)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for copy, original in zip(seen, (block.frames, block.views), strict=True):
            copy.copy_(original)
    for seed in range(5):
        images = frames(seed)["whole" if seed % 2 else "padded"]
        block.start_images(images, stream, graph)
        block.finish_images()
        stream.synchronize()
        flat = np.concatenate([image.reshape(-1) for image in images])
        assert np.array_equal(seen[0][: flat.size].cpu().numpy(), flat)
        places = [(0, *images[0].shape[:2]), (images[0].size, *images[1].shape[:2])]
        assert seen[1].tolist() == [list(place) for place in places]


def test_images_of_an_abandoned_observation_are_replaced() -> None:
    """Begun, never waited for, their arrays let go: the next ones arrive whole."""
    block, stream = staging(), torch.cuda.current_stream()
    for seed in range(20):
        block.start_images([image.copy() for image in frames(seed)["padded"]], stream)
        images = frames(seed + 100)["whole"]
        block.start_images(images, stream)
        block.finish_images()
        check(block, images)
    block.start_images([image.copy() for image in frames(7)["padded"]], stream)
    del block  # with a copy on its way


def test_refused_copy_is_told_once() -> None:
    block = staging()
    assert block.uploader is not None
    beyond = torch.cuda.get_device_properties(0).total_memory
    image = frames(0)["one row"][0]
    address = image.__array_interface__["data"][0]
    host = torch.zeros(16, dtype=torch.uint8, pin_memory=True)
    upload = native.load().ImageUpload(host, host, host.data_ptr(), beyond, 0)
    upload.begin([image], [(address, 1, 16, 16, 0)], None, 0, torch.cuda.current_stream().cuda_stream)
    with pytest.raises(RuntimeError, match="image upload"):
        upload.finish()
    upload.finish()
