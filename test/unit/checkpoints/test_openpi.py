"""openpi PyTorch directories: what is read, and what the caller may insist on."""

from __future__ import annotations

import logging
import shutil

import numpy as np
import pytest
import torch
from damage import edit_json, edit_weights, shard
from safetensors.torch import load_file

from flashrt_runtime.checkpoints import open_checkpoint
from flashrt_runtime.checkpoints.architecture import parameter_shapes
from flashrt_runtime.errors import CheckpointError, CheckpointNotFoundError, NotSupportedYetError, OptionError
from flashrt_runtime.untrained import make_checkpoint
from flashrt_runtime.untrained.random import random_config

EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
LM_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
LIBERO_STATS = "assets/libero/norm_stats.json"


def test_what_a_checkpoint_says(tiny, caplog):
    caplog.set_level(logging.INFO)
    with open_checkpoint(tiny) as checkpoint:
        assert checkpoint.layout == "openpi-pytorch"
        assert "layout openpi-pytorch" in caplog.text
        assert checkpoint.config == random_config("tiny", _libero(), "pi05")
        assert set(checkpoint.keys()) == set(parameter_shapes(checkpoint.config))
        assert checkpoint.norm_stats_file == tiny / LIBERO_STATS
        assert (checkpoint.state_dim, checkpoint.action_dim) == (8, 7)
        assert checkpoint.delta_actions is None
        assert checkpoint.size_bytes == (tiny / "model.safetensors").stat().st_size


def _libero():
    from flashrt_runtime.checkpoints.presets import LIBERO

    return LIBERO


def test_tensors_are_the_files(tiny):
    stored = load_file(tiny / "model.safetensors")
    with open_checkpoint(tiny) as checkpoint:
        for key in sorted(checkpoint.keys()):
            name = LM_HEAD if key == EMBEDDING else key
            assert checkpoint.shape(key) == tuple(stored[name].shape)
            assert checkpoint.dtype(key) == stored[name].dtype
            torch.testing.assert_close(checkpoint.tensor(key), stored[name], rtol=0, atol=0)


@pytest.mark.parametrize("policy", ["pi05", "pi0"])
def test_the_policy_is_read_from_the_tensors(policy, tmp_path):
    with open_checkpoint(make_checkpoint(tmp_path, policy=policy)) as checkpoint:
        assert checkpoint.config.policy == policy
        assert checkpoint.config.prompt_capacity == {"pi05": 200, "pi0": 48}[policy]


def test_another_policy_than_asked_for_is_an_error(tiny, tiny_pi0):
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*those of pi05.*config='pi0'"):
        open_checkpoint(tiny, config="pi0")
    with pytest.raises(CheckpointError, match="those of pi0"):
        open_checkpoint(tiny_pi0, config="pi05")


def test_configs_of_later_versions_and_unknown_ones(tiny):
    with pytest.raises(NotSupportedYetError, match="groot"):
        open_checkpoint(tiny, config="groot")
    with pytest.raises(OptionError, match="expected one of auto"):
        open_checkpoint(tiny, config="pi07")


def test_embedding_under_its_own_name_wins_over_the_output_head(copy):
    edit_weights(copy, lambda tensors: tensors.__setitem__(EMBEDDING, torch.full_like(tensors[LM_HEAD], 2.0)))
    with open_checkpoint(copy) as checkpoint:
        assert bool((checkpoint.tensor(EMBEDDING) == 2).all())
    edit_weights(copy, lambda tensors: tensors.pop(LM_HEAD))
    with open_checkpoint(copy) as checkpoint:
        assert bool((checkpoint.tensor(EMBEDDING) == 2).all())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_storage_dtypes(dtype, tmp_path):
    with open_checkpoint(make_checkpoint(tmp_path, dtype=dtype)) as checkpoint:
        key = "paligemma_with_expert.gemma_expert.model.layers.1.mlp.up_proj.weight"
        assert checkpoint.tensor(key).dtype == getattr(torch, dtype)


def test_shards_are_one_checkpoint(copy, tiny):
    shard(copy, 3)
    with open_checkpoint(copy) as checkpoint, open_checkpoint(tiny) as whole:
        assert len(checkpoint.store.files) == 3
        assert checkpoint.config == whole.config
        for key in sorted(whole.keys()):
            torch.testing.assert_close(checkpoint.tensor(key), whole.tensor(key), rtol=0, atol=0)


def test_dimensions_come_from_shapes(copy):
    """Depth, width and horizon are not hard-wired; only head counts need to be told."""
    edit_json(copy / "config.json", lambda config: config["flashrt_dims"].update(vocab_size=None))
    for part in ("prefix", "expert"):
        edit_json(
            copy / "config.json",
            lambda config, part=part: [
                config["flashrt_dims"][part].pop(name) for name in ("width", "depth", "mlp_dim")
            ],
        )
    with open_checkpoint(copy) as checkpoint:
        assert checkpoint.config == random_config("tiny", _libero(), "pi05")


def test_published_variants_need_no_dims(copy):
    """Width 64 is openpi's `dummy` variant; its vision tower is not published, so those heads are told."""
    edit_json(copy / "config.json", lambda config: config["flashrt_dims"].pop("prefix"))
    edit_json(copy / "config.json", lambda config: config["flashrt_dims"].pop("expert"))
    with open_checkpoint(copy) as checkpoint:
        assert checkpoint.config.prefix.num_heads == 8
    edit_json(copy / "config.json", lambda config: config.pop("flashrt_dims"))
    with pytest.raises(CheckpointError, match=r"vision tower has width 64.*flashrt_dims"):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("expert", "num_heads", 4, "query and"),
        ("prefix", "depth", 5, r"flashrt_dims\.prefix\.depth is 5, but the tensors have 4"),
        ("vision", "image_size", 56, r"flashrt_dims\.vision\.image_size is 56"),
        ("vision", "num_heads", 5, "not divisible"),
        ("vision", "mlp_dim", "big", "expected a positive integer"),
    ],
)
def test_dims_that_contradict_the_tensors(copy, part, name, value, message):
    edit_json(copy / "config.json", lambda config: config["flashrt_dims"][part].__setitem__(name, value))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(copy)


def test_horizon_must_be_known(copy):
    edit_json(copy / "config.json", lambda config: config.pop("action_horizon"))
    with pytest.raises(CheckpointError, match=r"config\.json: no action_horizon.*Pass action_horizon="):
        open_checkpoint(copy)
    with open_checkpoint(copy, action_horizon=15) as checkpoint:
        assert checkpoint.config.horizon == 15


def test_without_statistics_and_tokenizer_it_still_opens(copy):
    shutil.rmtree(copy / "assets")
    (copy / "tokenizer.model").unlink()
    with open_checkpoint(copy) as checkpoint:
        assert checkpoint.norm_stats is None
        assert checkpoint.tokenizer is None
        assert checkpoint.state_dim is None
        assert checkpoint.action_dim is None


def test_statistics_of_several_robots_must_be_chosen(copy):
    shutil.copytree(copy / "assets/libero", copy / "assets/lab/franka")
    edit_json(copy / "assets/lab/franka/norm_stats.json", _narrow)
    edit_json(copy / "config.json", lambda config: config["flashrt"].pop("state_names"))
    with pytest.raises(CheckpointError, match=r"lab/franka.*libero.*choose one by asset_id=.*--asset-id"):
        open_checkpoint(copy)
    with open_checkpoint(copy, asset_id="lab/franka") as checkpoint:
        assert checkpoint.state_dim == 5
    with pytest.raises(CheckpointError, match="no droid/norm_stats"):
        open_checkpoint(copy, asset_id="droid")
    edit_json(copy / "config.json", lambda config: config["flashrt"].update(asset_id="lab/franka"))
    with open_checkpoint(copy) as checkpoint:
        assert checkpoint.state_dim == 5
    with open_checkpoint(copy, asset_id="libero") as checkpoint:
        assert checkpoint.state_dim == 8


def _narrow(content):
    stats = content["norm_stats"]["state"]
    stats.update({name: values[:5] for name, values in stats.items()})


def test_padding_of_older_statistics_is_not_the_robots(copy):
    def pad(content):
        for stats in content["norm_stats"].values():
            stats.update({name: values + [0.0] * (32 - len(values)) for name, values in stats.items()})

    edit_json(copy / LIBERO_STATS, pad)
    with open_checkpoint(copy) as checkpoint:
        assert (checkpoint.state_dim, checkpoint.action_dim) == (8, 7)
        assert checkpoint.norm_stats.state.width == 32


def test_facts_the_caller_insists_on(tiny):
    delta = [True] * 6 + [False]
    with open_checkpoint(tiny, state_dim=8, delta_actions=delta) as checkpoint:
        assert checkpoint.state_dim == 8
        assert checkpoint.delta_actions == tuple(delta)
    with pytest.raises(CheckpointError, match="statistics of 7 actions dimensions, but the robot has 9"):
        open_checkpoint(tiny, action_dim=9)
    with pytest.raises(CheckpointError, match="33 dimensions, the model only 32"):
        open_checkpoint(tiny, state_dim=33)
    with pytest.raises(CheckpointError, match="delta_actions names 2 dimensions, the robot has 7"):
        open_checkpoint(tiny, delta_actions=[True, False])


@pytest.mark.parametrize("name", ["state_names", "action_names"])
def test_names_must_match_the_statistics(copy, name):
    edit_json(copy / "config.json", lambda config: config["flashrt"][name].append("extra"))
    with pytest.raises(CheckpointError, match=f"{name} has"):
        open_checkpoint(copy)


def test_state_in_the_prompt_is_openpis_default_for_pi05(copy, tiny_pi0):
    edit_json(copy / "config.json", lambda config: config.pop("discrete_state_input"))
    with open_checkpoint(copy) as checkpoint:
        assert checkpoint.rules.state_in_prompt
    with open_checkpoint(tiny_pi0) as checkpoint:
        assert not checkpoint.rules.state_in_prompt


def test_published_libero_statistics_keep_the_state_out_of_the_prompt(copy, caplog):
    edit_json(copy / "config.json", lambda config: config.pop("discrete_state_input"))
    (copy / "assets/physical-intelligence").mkdir()
    (copy / "assets/libero").rename(copy / "assets/physical-intelligence/libero")
    with open_checkpoint(copy) as checkpoint:
        assert not checkpoint.rules.state_in_prompt
    assert "stays out of the prompt" in caplog.text
    with open_checkpoint(copy, rules={"state_in_prompt": True}) as checkpoint:
        assert checkpoint.rules.state_in_prompt


def test_numbers_are_read_as_written(tiny):
    with open_checkpoint(tiny) as checkpoint:
        q01 = checkpoint.norm_stats.actions.q01
        assert q01.dtype == np.float64
        np.testing.assert_array_equal(q01, [-0.72, -0.80, -0.94, -0.11, -0.15, -0.27, -1.0])


def test_nothing_at_the_path(tmp_path):
    with pytest.raises(
        CheckpointNotFoundError, match=r"no such checkpoint directory.*model\.safetensors.*make-check"
    ):
        open_checkpoint(tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint here.*found notes\.txt"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="found a file"):
        open_checkpoint(tmp_path / "notes.txt")


def test_frameworks(tiny):
    with pytest.raises(OptionError, match='expected "torch" or "jax"'):
        open_checkpoint(tiny, framework="tensorflow")
    with pytest.raises(CheckpointNotFoundError, match='holds safetensors, use framework="torch"'):
        open_checkpoint(tiny, framework="jax")


def test_a_closed_checkpoint_gives_no_tensors(tiny):
    checkpoint = open_checkpoint(tiny)
    kept = checkpoint.tensor("action_in_proj.bias")
    checkpoint.close()
    checkpoint.close()
    assert bool(torch.isfinite(kept).all())
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.tensor("action_in_proj.bias")
