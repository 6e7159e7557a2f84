"""Random checkpoints: the same bytes everywhere, openpi's names, shapes and storage, no memory to speak
of."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from flashrt_runtime.checkpoints import open_checkpoint
from flashrt_runtime.checkpoints.architecture import parameter_shapes, unused_shapes
from flashrt_runtime.checkpoints.presets import DEMO_ARM, LIBERO, PRESETS
from flashrt_runtime.errors import OptionError
from flashrt_runtime.models.weights import sources
from flashrt_runtime.untrained import make_checkpoint
from flashrt_runtime.untrained.random import (
    SIZES,
    draw_weight,
    random_config,
    storage_dtype,
    weight_chunks,
)

EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
LM_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
EXPERT_NORM = "paligemma_with_expert.gemma_expert.model.layers.0.input_layernorm.dense.weight"


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        make_checkpoint(tmp_path / name, preset="demo_arm", seed=3)
    files = sorted(file.relative_to(tmp_path / "a") for file in (tmp_path / "a").rglob("*") if file.is_file())
    assert len(files) == 4
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_another_seed_gives_other_weights(tmp_path, tiny):
    other = make_checkpoint(tmp_path, preset="demo_arm", seed=1)
    ours, theirs = load_file(tiny / "model.safetensors"), load_file(other / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(not torch.equal(ours[key], theirs[key]) for key in ours if ours[key].any())


def test_a_weight_is_the_documented_function_of_key_shape_and_seed():
    key, shape = "action_out_proj.weight", (32, 64)
    generator = np.random.Generator(np.random.PCG64([7, zlib.crc32(b"model.action_out_proj.weight")]))
    expected = generator.standard_normal(size=shape, dtype=np.float32) * np.float32(1 / 8)
    np.testing.assert_array_equal(draw_weight(key, shape, seed=7), expected)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_a_weight_does_not_depend_on_how_it_is_cut(chunk):
    key, shape = "action_in_proj.weight", (37, 11)
    whole = draw_weight(key, shape, seed=1)
    pieces = list(weight_chunks(key, shape, 1, chunk=chunk))
    assert all(piece.size <= chunk for piece in pieces)
    np.testing.assert_array_equal(np.concatenate(pieces).reshape(shape), whole)


def test_adaptive_norms_are_drawn(tiny):
    """Left at zero, as initialisers do, a model without them would pass every comparison."""
    with open_checkpoint(tiny) as checkpoint:
        assert float(checkpoint.tensor(EXPERT_NORM).std()) == pytest.approx(0.3 / 8, rel=0.05)


@pytest.mark.parametrize(
    ("policy", "keys", "parameters"), [("pi05", 812, 4_143_404_816), ("pi0", 777, 4_028_019_472)]
)
def test_full_size_has_openpis_tensors(policy, keys, parameters):
    """Counts of openpi's own state dicts, where the embedding appears under both of its names."""
    config = random_config("full", LIBERO, policy)
    shapes = parameter_shapes(config) | unused_shapes(config)
    assert len(shapes) == keys
    assert sum(map(prod, shapes.values())) + prod(shapes[EMBEDDING]) == parameters


@pytest.mark.parametrize("policy", ["pi05", "pi0"])
def test_the_models_read_exactly_these_tensors(policy):
    """All but the norm after the prefix: the expert sees the prefix's keys and values only."""
    config = random_config("tiny", LIBERO, policy)
    read = {key for source in sources(config) for key in source.keys}
    assert set(parameter_shapes(config)) - read == {
        f"{EMBEDDING.removesuffix('embed_tokens.weight')}norm.weight"
    }
    assert not read - set(parameter_shapes(config))


def test_the_file_is_openpis(tiny):
    with safe_open(tiny / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert LM_HEAD in keys
    assert EMBEDDING not in keys
    assert "paligemma_with_expert.gemma_expert.lm_head.weight" in keys


def test_bfloat16_storage_is_mixed_as_openpis(tmp_path):
    make_checkpoint(tmp_path, dtype="bfloat16")
    tensors = load_file(tmp_path / "model.safetensors")
    vision = "paligemma_with_expert.paligemma.model.vision_tower.vision_model."
    language = "paligemma_with_expert.paligemma.model.language_model."
    in_float32 = (
        "action_in_proj.weight",
        "time_mlp_out.bias",
        EXPERT_NORM,
        f"{language}layers.0.input_layernorm.weight",
        f"{language}norm.weight",
        "paligemma_with_expert.gemma_expert.model.norm.dense.bias",
        f"{vision}embeddings.patch_embedding.bias",
        f"{vision}embeddings.position_embedding.weight",
    )
    in_bfloat16 = (
        LM_HEAD,
        f"{language}layers.0.mlp.up_proj.weight",
        f"{vision}encoder.layers.0.layer_norm1.weight",
        f"{vision}post_layernorm.bias",
        "paligemma_with_expert.paligemma.model.multi_modal_projector.linear.bias",
    )
    assert {tensors[key].dtype for key in in_float32} == {torch.float32}
    assert {tensors[key].dtype for key in in_bfloat16} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_uniform(dtype):
    assert {storage_dtype(key, dtype) for key in (EMBEDDING, EXPERT_NORM, "time_mlp_in.bias")} == {dtype}


MEASURE = """
import sys
from pathlib import Path
from flashrt_runtime.untrained import make_checkpoint

def peak():  # ru_maxrss would begin at that of the test runner
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

make_checkpoint(sys.argv[1])
before = peak()
path = make_checkpoint(sys.argv[2], size="small")
grown = peak() - before
print(grown * 1024, (path / "model.safetensors").stat().st_size)
"""


def test_writing_needs_a_fraction_of_the_files_size_in_memory(tmp_path):
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "tiny"), str(tmp_path / "small")]
    grown, size = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert 100e6 < size < 200e6
    assert grown < 0.5 * size


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_what_the_reader_reports(name, tmp_path):
    preset = PRESETS[name]
    with open_checkpoint(make_checkpoint(tmp_path, preset=name)) as checkpoint:
        assert checkpoint.layout == "openpi-pytorch"
        assert checkpoint.views == preset.views
        assert checkpoint.state_names == preset.state_names
        assert checkpoint.action_names == preset.action_names
        assert checkpoint.action_rate_hz == preset.action_rate_hz
        assert (checkpoint.state_dim, checkpoint.action_dim) == (
            len(preset.state_names),
            len(preset.action_names),
        )
        assert checkpoint.config.horizon == preset.horizon
        assert checkpoint.rules.state_in_prompt == preset.state_in_prompt
        assert checkpoint.tokenizer == tmp_path / "tokenizer.model"


def test_every_size_has_dimensions_that_fit_together():
    for name, size in SIZES.items():
        config = random_config(name, DEMO_ARM, "pi05")
        assert config.prefix.head_dim == config.expert.head_dim
        assert config.vision.width % config.vision.num_heads == 0
        assert size.tokenizer_vocab <= size.vocab_size


def test_a_trained_checkpoint_is_never_overwritten(copy):
    config = copy / "config.json"
    content = json.loads(config.read_text())
    del content["flashrt"]["untrained"]
    config.write_text(json.dumps(content))
    before = (copy / "model.safetensors").read_bytes()
    with pytest.raises(OptionError, match="not a random one"):
        make_checkpoint(copy, seed=9)
    assert (copy / "model.safetensors").read_bytes() == before


def test_its_own_checkpoint_is_overwritten(copy, tiny):
    make_checkpoint(copy, preset="demo_arm", seed=9)
    assert (copy / "model.safetensors").read_bytes() != (tiny / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "wrong",
    [{"size": "huge"}, {"preset": "robot"}, {"policy": "groot"}, {"dtype": "int8"}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_unknown_names_are_refused_with_the_known_ones(wrong, tmp_path):
    with pytest.raises(OptionError, match="expected one of"):
        make_checkpoint(tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()


def test_nothing_is_left_of_a_file_that_could_not_be_written(tmp_path: Path, monkeypatch):
    def fail(*_: object) -> int:
        raise OSError("no space left on device")

    monkeypatch.setattr("flashrt_runtime.checkpoints.safetensors_store.SafetensorsWriter.write", fail)
    with pytest.raises(OSError, match="no space"):
        make_checkpoint(tmp_path)
    assert not list(tmp_path.glob("*safetensors*"))
    assert not list(tmp_path.glob(".*part"))
