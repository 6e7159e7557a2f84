"""LeRobot policy directories as LeRobot 0.6.1 saved them: test/data/lerobot, with its own results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import edit_json
from safetensors.torch import load_file, save_file

from flashrt_runtime.checkpoints import open_checkpoint
from flashrt_runtime.checkpoints.tokenizer import train_tokenizer
from flashrt_runtime.errors import CheckpointError, NotSupportedYetError, OptionError
from flashrt_runtime.processing.actions import ActionTransform
from flashrt_runtime.processing.prompt import PromptEncoder
from flashrt_runtime.processing.state import StateTransform
from flashrt_runtime.untrained import make_checkpoint

SAVED = Path(__file__).resolve().parents[2] / "data" / "lerobot"
VARIANTS = sorted(folder.name for folder in SAVED.iterdir() if folder.is_dir())
EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
LM_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """model.safetensors as LeRobot saves it: keys prefixed, head and embedding both there and different."""
    files = {}
    for policy in ("pi05", "pi0"):
        folder = make_checkpoint(tmp_path_factory.mktemp(policy), policy=policy)
        tensors = load_file(folder / "model.safetensors")
        tensors[EMBEDDING] = tensors[LM_HEAD] + 1
        files[policy] = folder / "lerobot.safetensors"
        save_file({f"model.{key}": tensor for key, tensor in tensors.items()}, files[policy])
    return files


@pytest.fixture
def saved(weights, tmp_path):
    """A saved policy with weights of its kind; dims of the reduced size are told in config.json."""

    def build(variant):
        folder = Path(shutil.copytree(SAVED / variant, tmp_path / variant))
        shutil.copy(
            weights["pi0" if variant.startswith("pi0_") or variant == "pi0" else "pi05"],
            folder / "model.safetensors",
        )
        dims = {"vision": {"num_heads": 4}}
        edit_json(folder / "config.json", lambda config: config.__setitem__("flashrt_dims", dims))
        return folder

    return build


def test_every_variant_is_there():
    assert {"pi05", "pi0", "pi05_relative", "pi05_min_max", "pi05_no_statistics", "pi05_empty_camera"} <= set(
        VARIANTS
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_states_and_actions_are_lerobots_to_the_bit(variant, saved):
    expected = np.load(SAVED / variant / "expected.npz")
    with open_checkpoint(saved(variant)) as checkpoint:
        stats, rules = checkpoint.norm_stats, checkpoint.rules
        state = StateTransform(stats.state, rules, checkpoint.state_dim)
        actions = ActionTransform(stats.actions, rules, checkpoint.action_dim, checkpoint.delta_actions)
        padded = np.zeros((len(expected["actions"]), 32), np.float32)
        padded[:, : checkpoint.action_dim] = expected["actions"]
        for raw, normalised, physical in zip(
            *(expected[key] for key in ("states", "normalised", "physical")), strict=True
        ):
            np.testing.assert_array_equal(state.normalize(raw), normalised)
            np.testing.assert_array_equal(actions.to_physical(padded, raw), physical)


@pytest.mark.parametrize("variant", VARIANTS)
def test_prompts_are_lerobots(variant, saved, tmp_path):
    """The text that reaches LeRobot's tokenizer, state bins included."""
    recorded = json.loads((SAVED / variant / "texts.json").read_text())
    states = np.load(SAVED / variant / "expected.npz")["normalised"]
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(train_tokenizer(512))
    with open_checkpoint(saved(variant)) as checkpoint:
        config = checkpoint.config
        encoder = PromptEncoder(tokenizer, config.policy, checkpoint.rules, config.prompt_capacity)
        for task, text, state in zip(recorded["tasks"], recorded["texts"], states, strict=True):
            assert encoder.text(task, state) == text


def test_facts_of_a_policy(saved):
    with open_checkpoint(saved("pi05")) as checkpoint:
        assert checkpoint.layout == "lerobot"
        assert checkpoint.rules.family == "lerobot"
        assert checkpoint.views == ("wrist", "front")  # the order of the features, not of the alphabet
        assert (checkpoint.state_dim, checkpoint.action_dim) == (7, 7)
        assert (checkpoint.config.horizon, checkpoint.config.num_steps) == (50, 10)
        assert checkpoint.config.prompt_capacity == 200
        assert checkpoint.delta_actions is None
        assert (checkpoint.rules.state_mode, checkpoint.rules.action_mode) == ("quantile", "quantile")
    with open_checkpoint(saved("pi0")) as checkpoint:
        assert checkpoint.config.prompt_capacity == 48
        assert checkpoint.rules.state_mode == "mean_std"
        assert not checkpoint.rules.clean_underscores


def test_modes_are_the_pipelines(saved):
    with open_checkpoint(saved("pi05_min_max")) as checkpoint:
        assert (checkpoint.rules.state_mode, checkpoint.rules.action_mode) == ("min_max", "quantile10")


def test_empty_cameras_are_no_views(saved):
    with open_checkpoint(saved("pi05_empty_camera")) as checkpoint:
        assert checkpoint.views == ("wrist", "front")
        assert checkpoint.empty_cameras == 1
        assert (checkpoint.config.horizon, checkpoint.config.num_steps) == (15, 5)


def test_relative_actions_exclude_joints_by_part_of_their_name(saved):
    with open_checkpoint(saved("pi05_relative")) as checkpoint:
        assert checkpoint.delta_actions == (True,) * 6 + (False,)
        assert checkpoint.action_names[-1] == "Gripper_left"
    with open_checkpoint(saved("pi0_relative_unnamed")) as checkpoint:
        assert checkpoint.delta_actions == (True,) * 7


def test_the_embedding_is_read_and_not_the_head(saved, weights):
    stored = load_file(weights["pi05"])
    with open_checkpoint(saved("pi05")) as checkpoint:
        assert torch.equal(checkpoint.tensor(EMBEDDING), stored[f"model.{EMBEDDING}"])


def test_base_checkpoints_without_prefix_and_embedding(saved, weights):
    """LeRobot's hub bases hold openpi's keys; there the head is the embedding."""
    folder = saved("pi05")
    stored = load_file(weights["pi05"])
    plain = {key.removeprefix("model."): tensor for key, tensor in stored.items()}
    head = plain[LM_HEAD]
    save_file(
        {key: tensor for key, tensor in plain.items() if key != EMBEDDING}, folder / "model.safetensors"
    )
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.layout == "lerobot"
        assert torch.equal(checkpoint.tensor(EMBEDDING), head)


def test_without_pipelines_only_model_space_is_left(saved):
    """What the parity oracles write."""
    folder = saved("pi05")
    for file in folder.glob("policy_*"):
        file.unlink()
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.norm_stats is None
        assert checkpoint.rules.state_mode == "quantile"
        assert (checkpoint.state_dim, checkpoint.action_dim) == (7, 7)


def refused(folder, *parts, kind=CheckpointError):
    with pytest.raises(kind) as caught:
        open_checkpoint(folder)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_type_and_tensors_must_agree(saved):
    folder = saved("pi05")
    edit_json(folder / "config.json", lambda config: config.__setitem__("type", "pi0"))
    refused(folder, "config.json", "type is 'pi0', but the tensors are those of pi05")
    edit_json(folder / "config.json", lambda config: config.__setitem__("type", "act"))
    refused(folder, "a policy of type 'act'; expected one of pi05, pi0")
    edit_json(folder / "config.json", lambda config: config.__setitem__("type", "pi0_fast"))
    refused(folder, "config.json", "type is 'pi0_fast', but the tensors are those of pi05")


@pytest.mark.parametrize("name", ["policy_preprocessor.json", "policy_postprocessor.json"])
def test_half_of_the_pipelines(saved, name):
    folder = saved("pi05")
    (folder / name).unlink()
    refused(folder, f"{name} is missing")


def test_statistics_file_that_is_missing_or_truncated(saved):
    folder = saved("pi05")
    file = folder / "policy_preprocessor_step_3_normalizer_processor.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-8])
    refused(folder, file.name, "truncated")
    file.unlink()
    refused(folder, "policy_preprocessor.json: steps[3] 'normalizer_processor' needs", file.name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stats: stats.pop("observation.state.q99"), "needs q01 and q99, but q99 are missing"),
        (
            lambda stats: stats["observation.state.q01"].__setitem__(2, float("nan")),
            "observation.state.q01[2] is nan",
        ),
        (lambda stats: stats.update({"observation.state.q01": torch.zeros(3)}), "different widths"),
        (lambda stats: stats.clear(), None),
    ],
)
def test_statistics_that_cannot_be(saved, change, message):
    folder = saved("pi05")
    file = folder / "policy_preprocessor_step_3_normalizer_processor.safetensors"
    stats = load_file(file)
    change(stats)
    save_file(stats, file)
    if message is None:  # none at all is LeRobot's way to say identity
        open_checkpoint(folder).close()
    else:
        refused(folder, message)


def test_there_are_no_assets_to_choose_from(saved):
    with pytest.raises(OptionError, match=r"asset_id is 'lab', but .* one set of statistics: leave it out"):
        open_checkpoint(saved("pi05"), asset_id="lab")


def test_statistics_of_another_width(saved):
    folder = saved("pi05")
    edit_json(
        folder / "config.json",
        lambda config: config["input_features"]["observation.state"].__setitem__("shape", [6]),
    )
    refused(folder, "statistics of 7 state dimensions, but config.json declares 6")


def edit_step(folder, index, change):
    edit_json(folder / "policy_preprocessor.json", lambda content: change(content["steps"][index]))


def test_steps_of_unknown_effect(saved):
    folder = saved("pi05")
    edit_step(folder, 0, lambda step: step.__setitem__("registry_name", "image_crop_resize_processor"))
    refused(
        folder,
        "policy_preprocessor.json",
        "steps[0] is 'image_crop_resize_processor', whose effect is unknown",
    )


def test_modes_of_unknown_name(saved):
    folder = saved("pi05")
    edit_step(folder, 3, lambda step: step["config"]["norm_map"].__setitem__("STATE", "LOG"))
    refused(folder, "normalisation 'LOG' of STATE: expected one of QUANTILES")


def test_normalised_images(saved):
    folder = saved("pi05")
    edit_step(folder, 3, lambda step: step["config"]["norm_map"].__setitem__("VISUAL", "MEAN_STD"))
    refused(folder, "images normalised by mean_std", kind=NotSupportedYetError)


def test_relative_without_absolute(saved):
    folder = saved("pi05")
    edit_step(folder, 2, lambda step: step["config"].__setitem__("enabled", True))
    refused(folder, "relative actions are on", "absolute actions off")


def test_the_epsilon_is_the_pipelines(saved):
    folder = saved("pi05")
    edit_step(folder, 3, lambda step: step["config"].__setitem__("eps", 1e-3))
    refused(folder, "eps 0.001")
    edit_json(
        folder / "policy_postprocessor.json",
        lambda content: content["steps"][0]["config"].__setitem__("eps", 1e-3),
    )
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.rules.zero_range_eps == 1e-3


def test_observation_keys_that_are_left_out(saved):
    folder = saved("pi05")
    edit_step(folder, 3, lambda step: step["config"].__setitem__("normalize_observation_keys", ["other"]))
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.rules.state_mode == "identity"
        assert checkpoint.rules.action_mode == "quantile"


@pytest.mark.parametrize("shape", [None, [], [0], [7, 1], "7"])
def test_feature_shapes_that_cannot_be(saved, shape):
    folder = saved("pi05")
    edit_json(
        folder / "config.json", lambda config: config["output_features"]["action"].__setitem__("shape", shape)
    )
    refused(folder, "config.json", "feature 'action'")


def test_chunk_size_is_needed(saved):
    folder = saved("pi05")
    edit_json(folder / "config.json", lambda config: config.pop("chunk_size"))
    refused(folder, "config.json: no chunk_size")


@pytest.mark.parametrize(
    ("variant", "name", "value", "message"),
    [
        ("pi05", "image_resolution", [448, 448], "image_resolution is 448, but the tensors have 224"),
        ("pi05", "image_resolution", [224, 320], "expected a square"),
        ("pi05", "max_action_dim", 24, "max_action_dim is 24, but the tensors have 32"),
        ("pi0", "max_state_dim", 24, "max_state_dim is 24, but the tensors have 32"),
    ],
)
def test_sizes_that_contradict_the_tensors(saved, variant, name, value, message):
    folder = saved(variant)
    edit_json(folder / "config.json", lambda config: config.__setitem__(name, value))
    refused(folder, "config.json", message)
