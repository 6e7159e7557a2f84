#!/usr/bin/env python
"""LeRobot's preprocessors with Gemma's real vocabulary: token ids of tasks and states.

    .venv-parity/bin/python lerobot_prompts.py tokenizer.json cases.json out.json

cases.json: [{"task": str, "state": [float, …] in [-1.2, 1.2]}, …]; out.json: {policy: [[id, …], …]} without
padding.
States pass unnormalised (no statistics), so that the bins are those of the numbers given.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import lerobot.processor.tokenizer_processor as tokenizer_processor
import torch
import transformers
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi0.processor_pi0 import make_pi0_pre_post_processors
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
from lerobot.policies.pi0_fast.processor_pi0_fast import make_pi0_fast_pre_post_processors
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pi05.processor_pi05 import make_pi05_pre_post_processors
from tokenizers import AddedToken, Tokenizer


def paligemma(file: str) -> transformers.PreTrainedTokenizerFast:
    """Gemma's tokenizer with PaliGemma's appended pieces."""
    tokenizer = Tokenizer.from_file(file)
    names = [f"<loc{index:04d}>" for index in range(1024)] + [f"<seg{index:03d}>" for index in range(128)]
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="right", **special)


def main() -> None:
    """Tokenise every case as each policy; and what pi0_fast looks for in its output."""
    tokenizer = paligemma(sys.argv[1])
    assert len(tokenizer) == 257152
    tokenizer_processor.AutoTokenizer = SimpleNamespace(from_pretrained=lambda *_, **__: tokenizer)
    # the step that encodes actions, of which there are none here
    tokenizer_processor.AutoProcessor = SimpleNamespace(from_pretrained=lambda *_, **__: None)
    cases = json.loads(Path(sys.argv[2]).read_text())
    found = {}
    for name, kind, make in (
        ("pi05", PI05Config, make_pi05_pre_post_processors),
        ("pi0", PI0Config, make_pi0_pre_post_processors),
        ("pi0fast", PI0FastConfig, make_pi0_fast_pre_post_processors),
    ):
        found[name] = [tokens(kind, make, case) for case in cases]
    found["lead"] = tokenizer.encode("Action: ", add_special_tokens=False)
    found["bar"] = tokenizer.convert_tokens_to_ids("|")
    Path(sys.argv[3]).write_text(json.dumps(found))


def tokens(kind, make, case: dict) -> list[int]:
    """One case through a policy's own preprocessor; long prompts are cut by it, so capacity is raised."""
    config = kind(
        input_features={"observation.state": PolicyFeature(FeatureType.STATE, (len(case["state"]),))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
        device="cpu",
        tokenizer_max_length=1000,
    )
    before, _ = make(config, None)
    batch = before({"observation.state": torch.tensor(case["state"]), "task": case["task"]})
    ids, mask = (batch[f"observation.language.{key}"][0] for key in ("tokens", "attention_mask"))
    return ids[mask.bool()].tolist()


if __name__ == "__main__":
    main()
