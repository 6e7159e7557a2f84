"""What decodes camera JPEGs fastest, alone and several cameras at a time; and what each makes of damage.

    . scripts/env.sh && python -P benchmarks/bench_decode.py [--image FILE] [--repeats N] [--json out.json]

Candidates: OpenCV (imdecode, then red and blue swapped) and simplejpeg (libjpeg-turbo, straight to RGB), one
image after the other. "pool" is `Ingest`, as the node calls it, with that many compressed cameras.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import simplejpeg

from flashrt_ros.core.compressed import jpeg_header
from flashrt_ros.core.contract import RobotContract, StreamType, load_contract
from flashrt_ros.core.errors import IngestError
from flashrt_ros.core.images import image_from_message
from flashrt_ros.core.ingest import Ingest
from flashrt_ros.core.sync import Snapshot, Stamped

SIZES = ((640, 480), (1280, 720))
QUALITY = 90
PAUSE = 0.003  # as between observations: a pool's threads have gone to sleep [s]
CONTRACT = """contract_version: 1
robot: bench
streams:
{streams}  joints: {{topic: j, type: sensor_msgs/msg/JointState}}
joints: [{{name: a, unit: rad, limits: {{position: [-1, 1], velocity: 1}}}}]
state: {{stream: joints, joints: [a]}}
action: {{representation: absolute, period: 0.02, joints: [a]}}
outputs: [{{topic: c, type: std_msgs/msg/Float64MultiArray}}]
limits: {{on_violation: clamp}}
sync: {{max_skew: 0.05, max_age: 0.25}}
rates: {{control: 50.0, inference: back_to_back}}
timeline: {{open_loop_cap: 0.5, hold_deadline: 1.0}}
"""


@dataclass(frozen=True)
class Row:
    """Milliseconds for one set of images of one size."""

    decoder: str
    width: int
    height: int
    cameras: int
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Damage:
    """Share of damaged images that a decoder refused."""

    kind: str
    bytes: int
    opencv: float
    ours: float


def opencv(data: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def turbo(data: np.ndarray) -> np.ndarray:
    return simplejpeg.decode_jpeg(data, "RGB", strict=True)


def timed(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    times = []
    for index in range(repeats + 10):
        time.sleep(PAUSE)
        begin = time.perf_counter()
        work()
        if index >= 10:
            times.append((time.perf_counter() - begin) * 1e3)
    return float(np.percentile(times, 50)), float(np.percentile(times, 99))


def contract_of(cameras: int) -> RobotContract:
    kind = StreamType.COMPRESSED_IMAGE
    streams = "".join(f"  c{i}: {{topic: c{i}, type: {kind}, view: v{i}}}\n" for i in range(cameras))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.yaml"
        path.write_text(CONTRACT.format(streams=streams))
        return load_contract(path)


def snapshot_of(contract: RobotContract, data: np.ndarray) -> Snapshot:
    payloads = {stream.name: SimpleNamespace(format="jpeg", data=data) for stream in contract.image_streams}
    payloads["joints"] = SimpleNamespace(name=["a"], position=[0.0], velocity=[])
    return Snapshot({name: Stamped(0, 0, payload) for name, payload in payloads.items()}, 0)


def one_after_the_other(decode: Callable[[np.ndarray], object], data: np.ndarray, count: int) -> None:
    for _ in range(count):
        decode(data)


def speeds(photo: np.ndarray, repeats: int) -> list[Row]:
    rows = []
    for size in SIZES:
        image = cv2.resize(photo, size)
        data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].reshape(-1)
        for name, decode in (("OpenCV", opencv), ("simplejpeg", turbo)):
            for cameras in (1, 2, 3):
                work = partial(one_after_the_other, decode, data, cameras)
                rows.append(Row(name, *size, cameras, *timed(work, repeats)))
        for cameras in (1, 2, 3):
            contract = contract_of(cameras)
            work = partial(Ingest(contract).observe, snapshot_of(contract, data))
            rows.append(Row("pool", *size, cameras, *timed(work, repeats)))
    return rows


def damage(photo: np.ndarray, trials: int) -> list[Damage]:
    """Pieces lost, zeroed or overwritten between an intact start and end."""
    data = cv2.imencode(".jpg", cv2.resize(photo, SIZES[0]), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()
    header = jpeg_header(np.frombuffer(data, np.uint8))
    assert header is not None
    rng, found = np.random.default_rng(0), []
    for size in (1, 64, 256, 512, 1472, 4096):
        for kind in ("lost", "zeros", "noise"):
            refused = {"opencv": 0, "ours": 0}
            for at in rng.integers(header.scan, len(data) - size - 2, trials):
                middle = {"lost": b"", "zeros": bytes(size), "noise": rng.bytes(size)}[kind]
                broken = data[:at] + middle + data[at + size :]
                refused["opencv"] += cv2.imdecode(np.frombuffer(broken, np.uint8), cv2.IMREAD_COLOR) is None
                try:
                    image_from_message(SimpleNamespace(format="jpeg", data=broken))
                except IngestError:
                    refused["ours"] += 1
            found.append(Damage(kind, size, *(count / trials for count in refused.values())))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="speed and strictness of JPEG decoders")
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("--image", type=Path, default=root / "docs" / "images" / "demo_cameras.png")
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    photo = cv2.imread(str(options.image))
    if photo is None:
        print(f"{options.image} is no image that can be read", file=sys.stderr)
        return 2
    cv2.setNumThreads(1)
    rows, damaged = speeds(photo, options.repeats), damage(photo, options.repeats)
    print("| decoder | image | cameras | p50 ms | p99 ms |\n|---|---|---|---|---|")
    for row in rows:
        size = f"{row.width} x {row.height}"
        print(f"| {row.decoder} | {size} | {row.cameras} | {row.p50_ms:.2f} | {row.p99_ms:.2f} |")
    print("\n| damage | bytes | OpenCV refuses | the node refuses |\n|---|---|---|---|")
    for item in damaged:
        print(f"| {item.kind} | {item.bytes} | {item.opencv:.0%} | {item.ours:.0%} |")
    if options.json:
        options.json.write_text(json.dumps([asdict(item) for item in [*rows, *damaged]], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
