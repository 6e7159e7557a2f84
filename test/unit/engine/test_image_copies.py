"""The host's half of the image upload: without a GPU copies to it are refused, behind the images' way
into the block.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

from flashrt_runtime.engine.staging import Staging
from flashrt_runtime.ops import native

STREAM: Any = types.SimpleNamespace(cuda_stream=0)


def staging(threads: int) -> Staging:
    """In plain memory on both sides."""
    block = Staging(2, 8, 32, (10, 32), torch.zeros(10, 32), 2 << 20, torch.device("cpu"))
    host, device = block.host[block.images_offset :], block.device[block.images_offset :]
    block.uploader = native.image_upload(host, device, threads)
    return block


def finish(block: Staging) -> None:
    with contextlib.suppress(RuntimeError):  # no GPU to copy to
        block.finish_images()


def check(block: Staging, images: list[np.ndarray]) -> None:
    for (offset, height, width), image in zip(block.host_parts["views"].tolist(), images, strict=True):
        frame = block.host_parts["frames"][offset : offset + height * width * 3]
        assert np.array_equal(frame.reshape(height, width, 3), image)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_images_of_one_shape_and_any_layout_follow_each_other(threads: int) -> None:
    """Where images lie is written down once for those that are alike: in shape and in layout."""
    block, rng = staging(threads), np.random.default_rng(0)
    for turn in range(40):
        plain = rng.integers(0, 256, (200, 300, 3), dtype=np.uint8)
        wide = rng.integers(0, 256, (200, 400, 3), dtype=np.uint8)
        layouts = (
            plain,
            plain[..., ::-1],
            wide[:, 50:350],
            plain[::-1],
            plain[:, ::-1],
            np.asfortranarray(plain),
            np.broadcast_to(plain[:1], plain.shape),
        )
        picked = [layouts[index] for index in rng.integers(0, len(layouts), 2)]
        if turn % 3 == 1:
            block.expect_images()
        block.start_images(picked, STREAM) if _fast(block, picked) else block.write_images(picked)
        finish(block)
        check(block, picked)
        with contextlib.suppress(AttributeError):  # one that is none harms nothing
            block.start_images([picked[0], object()], STREAM)  # type: ignore[list-item]


def _fast(block: Staging, images: list[np.ndarray]) -> bool:
    """Without a GPU there is no stream for the other way."""
    block._arrange(images)
    return block._whole_rows


def test_a_forked_process_is_told() -> None:
    """CUDA does not go along, nor do the threads: it must neither hang nor end badly."""
    script = """
import os, sys
import numpy as np, torch
from flashrt_runtime.ops import native
block = torch.zeros(4096, dtype=torch.uint8)
upload = native.image_upload(block, block, 3)
upload.expect()
child = os.fork()
if not child:
    image = np.zeros((4, 4, 3), np.uint8)
    for call in (upload.expect, upload.finish, lambda: upload.begin([image], [0], None, 0, 0)):
        try:
            call()
        except RuntimeError as error:
            assert "forked" in str(error)
        else:
            os._exit(1)
    del call, upload
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=60, check=False)
    assert done.returncode == 0


def test_fewer_threads_than_asked_for_copy_as_well() -> None:
    """Where the system gives no more: room for the stacks of two of 40."""
    script = """
import contextlib, resource
import numpy as np, torch
from flashrt_runtime.ops import native
native.load()
block = torch.zeros(1 << 20, dtype=torch.uint8)
image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
stack = 8 << 20 if stack == resource.RLIM_INFINITY else stack
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 5 * stack // 2, resource.RLIM_INFINITY))
upload = native.image_upload(block, block, 40)
upload.begin([image], [64], None, 0, 0)
with contextlib.suppress(RuntimeError):  # no GPU to copy to
    upload.finish()
assert np.array_equal(block[64 : 64 + image.size].numpy(), image.ravel())
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=60, check=False)
    assert done.returncode == 0
