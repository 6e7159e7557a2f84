"""What `flashrt replay` does."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from flashrt_ros.core.bag_reader import Decoder, rosbags_decoder
from flashrt_ros.core.bag_source import BagSource
from flashrt_ros.core.contract import RobotContract, check_policy, load_contract
from flashrt_ros.core.errors import CoreError
from flashrt_ros.core.replay import Replay, replay
from flashrt_runtime.cli.console import OUTPUT, print_json, progress
from flashrt_runtime.errors import OptionError

if TYPE_CHECKING:
    from flashrt_runtime.policy import Policy

CHUNK_TYPE = "flashrt_ros/msg/ActionChunk"


@dataclass(frozen=True)
class Options:
    """Of the command line; `model` goes to load_model."""

    bag: Path
    checkpoint: str | Path
    robot: str
    out: Path
    prompt: str
    samples: int
    namespace: str
    sim_time: bool
    seed: int
    model: dict[str, Any]


def run(options: Options, as_json: bool) -> None:
    """Load, evaluate, write the report and print it. Raises FlashRTError, for a bad bag or contract too."""
    from flashrt_runtime.loading import load_model

    try:
        contract = load_contract(options.robot)
        with BagSource(
            options.bag,
            contract,
            namespace=options.namespace,
            use_sim_time=options.sim_time,
            decode=decoder(),
        ) as source:
            prompt = options.prompt or recorded_prompt(source)
            with progress("loading", None):
                policy = load_model(options.checkpoint, num_views=len(contract.views), **options.model)
            try:
                check_policy(contract, policy.spec)
                result = _evaluate(source, contract, policy, prompt, options)
            finally:
                policy.close()
    except CoreError as error:  # of the contract, the bag or its messages: the message says it all
        raise OptionError(str(error)) from error
    summary = summarise(result, options, prompt)
    write_report(options.out, result, summary)
    if as_json:
        print_json(summary)
    else:
        _print(result, options.out)


def decoder() -> Decoder:
    """Of the rosbags package, or ROS's own where that is not installed."""
    if importlib.util.find_spec("rosbags"):
        return rosbags_decoder()
    from flashrt_ros.nodes.decoding import ros_decoder

    return ros_decoder()


def recorded_prompt(source: BagSource) -> str:
    """The prompt of the first chunk in the bag. Raises OptionError when there is none to be had."""
    topics = [topic for topic, types in source.reader.types.items() if types == {CHUNK_TYPE}]
    reader = source.reader
    first = next(iter(reader.read(topics, reader.start, reader.end + 1)), None) if topics else None
    if first is not None and importlib.util.find_spec("flashrt_ros.msg"):
        from flashrt_ros.nodes.decoding import ros_decoder

        if text := str(ros_decoder()(first.type, first.data).prompt).strip():
            return text
    raise OptionError(f"{reader.path}: no recorded chunk that tells the task: pass --prompt")


def _evaluate(
    source: BagSource, contract: RobotContract, policy: Policy, prompt: str, options: Options
) -> Replay:
    with progress("predicting", options.samples) as advance:

        def predict(observation: Any) -> Any:
            actions = policy.predict(observation.policy_images, prompt, observation.state, seed=options.seed)
            advance()
            return actions

        return replay(source, contract, predict, policy.spec.horizon, options.samples)


def summarise(result: Replay, options: Options, prompt: str) -> dict[str, Any]:
    """What replay.json holds."""
    skipped, problem = result.skipped
    return {
        "bag": str(options.bag),
        "checkpoint": str(options.checkpoint),
        "robot": result.contract.robot,
        "prompt": prompt,
        "seed": options.seed,
        "commands": list(result.topics),
        "moments": len(result.times),
        "skipped": skipped,
        "skipped_because": "" if problem is None else f"{problem.reason.name}: {problem.message}",
        "actions_compared": result.compared,
        "joints": [_plain(asdict(error)) for error in result.joint_errors()],
    }


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN."""
    unknown = {key for key, value in row.items() if isinstance(value, float) and math.isnan(value)}
    return {key: None if key in unknown else value for key, value in row.items()}


def write_report(directory: Path, result: Replay, summary: dict[str, Any]) -> None:
    """replay.json and replay.png. Raises OptionError without matplotlib, OSError."""
    from .replay_plot import draw

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "replay.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    draw(directory / "replay.png", result)


def _print(result: Replay, out: Path) -> None:
    table = Table(title=f"error against {', '.join(result.topics)}")
    table.add_column("joint", no_wrap=True)
    for name in ("mean", "rms", "largest", "first", "still", "unit"):
        table.add_column(name, justify="right", no_wrap=True)
    for error in result.joint_errors():
        figures = (error.mean, error.rms, error.largest, error.first, error.still)
        cells = ["-" if math.isnan(figure) else f"{figure:.4f}" for figure in figures]
        table.add_row(Text(error.joint), *cells, error.unit)
    OUTPUT.print(table)
    skipped, problem = result.skipped
    text = f"{len(result.times)} moments, {result.compared} actions compared"
    if problem is not None:
        text += f"; {skipped} moments without an observation ({problem.stream}: {problem.message})"
    legend = "first: action 0 of each chunk; still: a policy that would stay at the moment's command"
    for line in (legend, text, f"replay.json and replay.png in {out}"):
        OUTPUT.print(line, highlight=False, markup=False, soft_wrap=True)
