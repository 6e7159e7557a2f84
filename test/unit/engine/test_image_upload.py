"""Images on their way to the device, by the threads of our kernels' module and without them."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from flashrt_runtime.engine.staging import Staging
from flashrt_runtime.ops import native

pytestmark = pytest.mark.gpu

FRAME_BYTES = 2 * 640 * 480 * 3


def staging(threads: int = -1) -> Staging:
    """threads: that copy images, 0 for none but the caller's; -1: as many as there are by themselves."""
    device = torch.device("cuda", torch.cuda.current_device())
    block = Staging(2, 8, 32, (10, 32), torch.zeros(10, 32), FRAME_BYTES, device)
    assert block.uploader is not None
    if threads >= 0:
        images = block.host[block.images_offset :], block.device[block.images_offset :]
        block.uploader = native.image_upload(*images, threads) if threads else None
    return block


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
@pytest.mark.parametrize("threads", [0, 1, 2, 5])
def test_every_layout_arrives(kind: str, threads: int) -> None:
    block, stream = staging(threads), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for seed in range(5):
            block.frames.fill_(255)
            images = frames(seed)[kind]
            block.start_images(images, stream)
            block.finish_images()
            check(block, images)


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_a_graph_sees_all_images_and_where_they_lie(threads: int) -> None:
    block, stream = staging(threads), torch.cuda.Stream()
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
    block, stream = staging(), torch.cuda.Stream()
    for seed in range(20):
        block.start_images([image.copy() for image in frames(seed)["padded"]], stream)
        images = frames(seed + 100)["whole"]
        block.start_images(images, stream)
        block.finish_images()
        check(block, images)
    block.start_images([image.copy() for image in frames(7)["padded"]], stream)
    del block  # with a copy on its way


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_that_expect_images_take_them_or_go_back_to_sleep(threads: int) -> None:
    block, stream = staging(threads), torch.cuda.current_stream()
    for seed in range(20):
        images = frames(seed)["padded" if seed % 3 else "whole"]
        for _ in range(seed % 3):  # none, one, or one that nothing came of
            block.expect_images()
        if seed % 5 == 4:
            time.sleep(2e-3)  # longer than they look out for
        block.start_images(images, stream)
        block.expect_images()  # while they are at work
        block.finish_images()
        check(block, images)
    block.expect_images()
    used = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - used < 0.1  # nobody looks out for ever
    block.expect_images()
    del block  # while they do


def test_refused_copy_is_told_once() -> None:
    beyond = torch.cuda.get_device_properties(0).total_memory
    image = frames(0)["one row"][0][:, :5]  # 15 bytes
    host = torch.zeros(16, dtype=torch.uint8, pin_memory=True)
    upload = native.load().ImageUpload(host, host, host.data_ptr(), beyond, 0, 2)
    upload.begin([image], [0], None, 0, torch.cuda.current_stream().cuda_stream)
    with pytest.raises(RuntimeError, match="image upload"):
        upload.finish()
    upload.finish()
