"""Every kind of damage is one error that names file and key, before a device is touched."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from damage import edit_json, edit_weights, shard

from flashrt_runtime.checkpoints import open_checkpoint
from flashrt_runtime.checkpoints.safetensors_store import open_store, read_header
from flashrt_runtime.errors import CheckpointError, NotSupportedYetError

UP = "paligemma_with_expert.gemma_expert.model.layers.1.mlp.up_proj.weight"
PATCH = "paligemma_with_expert.paligemma.model.vision_tower.vision_model.embeddings.patch_embedding.weight"
STATS = "assets/libero/norm_stats.json"


def refused(directory, *parts, **options):
    """The one error that opening raises; it must contain every part."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(directory, **options)
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    assert "\n" not in message


def test_missing_key(copy):
    edit_weights(copy, lambda tensors: tensors.pop(UP))
    refused(copy, "model.safetensors", f"missing key '{UP}'")


@pytest.mark.parametrize("key", ["time_mlp_in.weight", "action_in_proj.weight", PATCH])
def test_missing_key_of_each_part(copy, key):
    edit_weights(copy, lambda tensors: tensors.pop(key))
    with pytest.raises((CheckpointError, NotSupportedYetError)):
        open_checkpoint(copy)


def test_wrong_shape(copy):
    edit_weights(copy, lambda tensors: tensors.__setitem__(UP, tensors[UP].T))
    refused(copy, "model.safetensors", f"'{UP}' has shape (64, 128), expected (128, 64)")


def test_wrong_rank(copy):
    edit_weights(copy, lambda tensors: tensors.__setitem__("action_in_proj.weight", torch.zeros(64)))
    refused(copy, "'action_in_proj.weight' has shape (64,), expected 2 dimensions")


def test_tensors_of_an_adapter(copy):
    key = UP.replace("weight", "lora_A.weight")
    edit_weights(copy, lambda tensors: tensors.__setitem__(key, torch.zeros(4, 64)))
    refused(copy, "no part of pi05", key, "merge adapters")


def test_another_architecture(copy):
    edit_weights(copy, lambda tensors: (tensors.clear(), tensors.update({"backbone.weight": torch.zeros(2)})))
    refused(copy, "model.safetensors", "another architecture", "backbone.weight", "pi05", "pi0")


def test_a_policy_without_its_expert_is_no_pi05(copy):
    def drop_expert(tensors):
        for key in [key for key in tensors if "paligemma.model" not in key and "lm_head" not in key]:
            del tensors[key]

    edit_weights(copy, drop_expert)
    with pytest.raises(CheckpointError, match=r"those of pi0fast.*config='pi05'"):
        open_checkpoint(copy, config="pi05")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite(copy, value, dtype):
    def spoil(tensors):
        tensors[UP] = tensors[UP].to(dtype)
        tensors[UP][3, 5] = value

    edit_weights(copy, spoil)
    refused(copy, "model.safetensors", f"'{UP}' holds NaN or infinity")
    open_checkpoint(copy, verify_weights=False).close()


def test_large_finite_float16_weights_are_fine(copy):
    """Their sum overflows; they do not."""
    edit_weights(
        copy, lambda tensors: tensors.__setitem__(UP, torch.full((128, 64), 6e4, dtype=torch.float16))
    )
    open_checkpoint(copy).close()


def test_integers_are_no_weights(copy):
    edit_weights(copy, lambda tensors: tensors.__setitem__(UP, torch.zeros(128, 64, dtype=torch.int8)))
    refused(copy, f"'{UP}' is stored as I8", "F32")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_truncated_weights(copy, keep):
    file = copy / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    refused(copy, "model.safetensors", "truncated", "bytes" if keep in (0, 4, 100) else "ends at byte")


def test_truncation_names_the_first_tensor_beyond_the_end(copy):
    file = copy / "model.safetensors"
    entries = read_header(file)
    content = file.read_bytes()
    file.write_bytes(content[: entries[UP].end - 1])
    refused(copy, f"'{UP}'")


def test_damaged_header(copy):
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:12] = b"!!!!"
    file.write_bytes(content)
    refused(copy, "model.safetensors", "header is damaged")


def test_header_whose_bytes_are_not_its_shapes(copy):
    file = copy / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(
        content.replace(b'"shape":[128,64],"data_offsets":[', b'"shape":[128,65],"data_offsets":[', 1)
    )
    refused(copy, "model.safetensors", "bytes, not those of F32 (128, 65)")


def test_shard_that_is_missing(copy):
    shard(copy, 2)
    (copy / "model-00002-of-00002.safetensors").unlink()
    refused(copy, "model.safetensors.index.json", "model-00002-of-00002.safetensors")


def test_shard_that_lacks_a_tensor(copy):
    shard(copy, 2)
    index = copy / "model.safetensors.index.json"
    other = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}

    def move(content):
        content["weight_map"][UP] = (other - {content["weight_map"][UP]}).pop()

    edit_json(index, move)
    refused(copy, f"missing key '{UP}'", "index")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../b"}}'])
def test_damaged_index(copy, content):
    shard(copy, 2)
    (copy / "model.safetensors.index.json").write_text(content)
    refused(copy, "model.safetensors.index.json")


@pytest.mark.parametrize("file", ["config.json", STATS])
@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe\x00", b'"text"'])
def test_json_garbage(copy, file, content):
    (copy / file).write_bytes(content)
    refused(copy, file)


def test_json_errors_name_the_line(copy):
    (copy / "config.json").write_text('{\n  "action_dim": 32,\n  oops\n}')
    refused(copy, "config.json", "line 3 column 3")


def change_stats(group, name, index, value):
    def change(content):
        content["norm_stats"][group][name][index] = value

    return change


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite(copy, value):
    edit_json(copy / STATS, change_stats("state", "q99", 3, value))
    refused(copy, "norm_stats.json", "norm_stats.state.q99[3]", "must be finite")


def test_statistics_that_are_no_numbers(copy):
    edit_json(copy / STATS, change_stats("actions", "mean", 0, "high"))
    refused(copy, "norm_stats.actions.mean", "list of numbers")


def test_statistics_upside_down(copy):
    edit_json(copy / STATS, change_stats("actions", "q01", 2, 5.0))
    refused(copy, "norm_stats.actions", "q01[2] = 5.0 > q99")


def test_negative_deviation(copy):
    edit_json(copy / STATS, change_stats("actions", "std", 2, -0.1))
    refused(copy, "norm_stats.actions.std", "negative")


def test_statistics_of_uneven_width(copy):
    edit_json(copy / STATS, lambda content: content["norm_stats"]["state"]["q01"].pop())
    refused(copy, "norm_stats.state", "different widths", "'q01': 7")


def test_statistics_the_policy_needs(copy, tiny_pi0, tmp_path):
    edit_json(copy / STATS, lambda content: content["norm_stats"]["actions"].pop("q01"))
    refused(copy, "norm_stats.json", "quantile normalisation needs q01 and q99, but q01 are missing")


@pytest.mark.parametrize(
    "content", [{}, {"norm_stats": []}, {"norm_stats": {"joints": {}}}, {"norm_stats": {"state": 3}}]
)
def test_statistics_of_another_format(copy, content):
    (copy / STATS).write_text(json.dumps(content))
    refused(copy, "norm_stats.json")


def test_statistics_wider_than_the_model(copy):
    def widen(content):
        content["norm_stats"]["state"] = {name: np.linspace(1, 2, 40).tolist() for name in ("q01", "q99")}

    edit_json(copy / STATS, widen)
    refused(copy, "state has 40 dimensions, the model only 32")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("action_dim", 24),
        ("action_horizon", "ten"),
        ("action_horizon", 0),
        ("action_horizon", True),
        ("flashrt_dims", 3),
    ],
)
def test_config_entries_of_another_type(copy, name, value):
    edit_json(copy / "config.json", lambda config: config.__setitem__(name, value))
    refused(copy, "config.json", name)


@pytest.mark.parametrize("value", ["base", [], [1], ["a", "a"]])
def test_views_must_be_names(copy, value):
    edit_json(copy / "config.json", lambda config: config["flashrt"].__setitem__("views", value))
    refused(copy, "config.json", "flashrt.views")


def test_the_same_tensor_with_and_without_prefix(copy):
    edit_weights(copy, lambda tensors: tensors.__setitem__(f"model.{UP}", tensors[UP].clone()))
    refused(copy, UP, "twice")


def test_tensors_are_views_of_the_file(tiny):
    """No second copy, and a tensor stays what it is while others are read and after closing."""
    store = open_store(tiny)
    tensor = store.tensor(UP)
    kept = tensor.clone()
    assert tensor.data_ptr() == store.tensor(UP).data_ptr()
    for key in store.entries:
        store.tensor(key).sum()
    store.close()
    assert torch.equal(tensor, kept)
