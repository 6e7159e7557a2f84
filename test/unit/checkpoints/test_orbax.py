"""openpi's Orbax folders, written with tensorstore from random weights, read back as the same tensors."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

tensorstore = pytest.importorskip("tensorstore")

from damage import edit_json, edit_weights  # noqa: E402
from orbax_folder import jax_tree, write_orbax  # noqa: E402

import flashrt_runtime  # noqa: E402
from flashrt_runtime.checkpoints import open_checkpoint  # noqa: E402
from flashrt_runtime.checkpoints.orbax import convert_checkpoint  # noqa: E402
from flashrt_runtime.cli.main import app  # noqa: E402
from flashrt_runtime.errors import CheckpointError, CheckpointNotFoundError, OptionError  # noqa: E402
from flashrt_runtime.untrained import make_checkpoint  # noqa: E402

POLICIES = ("pi05", "pi0", "pi0fast")
LM_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Per policy: a tiny safetensors checkpoint and its parameters as openpi's tree."""

    def build(policy):
        path = make_checkpoint(tmp_path_factory.mktemp(policy), policy=policy)
        if policy == "pi0fast":  # openpi's has no output head of its own
            edit_weights(path, lambda tensors: tensors.pop(LM_HEAD))
        with open_checkpoint(path) as checkpoint:
            tensors = {key: checkpoint.tensor(key).numpy().copy() for key in sorted(checkpoint.keys())}
            return path, jax_tree(tensors, checkpoint.config)

    return {policy: build(policy) for policy in POLICIES}


@pytest.fixture
def orbax(source, tmp_path, monkeypatch):
    """Writes an Orbax checkpoint directory of a policy, beside openpi's assets."""
    monkeypatch.setenv("FLASHRT_CACHE_DIR", str(tmp_path / "cache"))

    def write(policy="pi05", tree=None, **layout):
        path, own = source[policy]
        target = tmp_path / f"orbax-{policy}"
        shutil.copytree(path / "assets", target / "assets")
        shutil.copy(path / "config.json", target)
        write_orbax(target / "params", own if tree is None else tree, **layout)
        return target

    return write


LAYOUTS = [{}, {"value": True}, {"ocdbt": False}, {"driver": "zarr3"}, {"ocdbt": False, "driver": "zarr3"}]


@pytest.mark.parametrize(
    ("policy", "layout"),
    [*((policy, layout) for policy in ("pi05", "pi0") for layout in LAYOUTS), ("pi0fast", {})],
    ids=str,
)
def test_the_same_tensors_come_back(source, orbax, policy, layout):
    with (
        open_checkpoint(orbax(policy, **layout), framework="jax") as checkpoint,
        open_checkpoint(source[policy][0]) as expected,
    ):
        assert checkpoint.layout == "openpi-orbax"
        assert checkpoint.config == expected.config
        assert checkpoint.rules == expected.rules
        assert checkpoint.state_dim == expected.state_dim
        for key in sorted(expected.keys()):
            torch.testing.assert_close(checkpoint.tensor(key), expected.tensor(key), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes_stay_as_stored(source, orbax, dtype):
    with (
        open_checkpoint(orbax(dtype=dtype), framework="jax") as checkpoint,
        open_checkpoint(source["pi05"][0]) as expected,
    ):
        for key in sorted(expected.keys()):
            found = checkpoint.tensor(key)
            torch.testing.assert_close(found, expected.tensor(key).to(getattr(torch, dtype)), rtol=0, atol=0)


def test_it_is_converted_once(orbax, monkeypatch):
    path = orbax()
    open_checkpoint(path, framework="jax").close()
    monkeypatch.setattr(
        "flashrt_runtime.checkpoints.orbax.convert", lambda *_: pytest.fail("converted again")
    )
    open_checkpoint(path, framework="jax").close()


def test_a_changed_checkpoint_is_converted_anew(source, orbax):
    path = orbax()
    open_checkpoint(path, framework="jax").close()
    shutil.rmtree(path / "params")
    changed = source["pi05"][1] | {"action_in_proj/bias": np.full(64, 3.0, np.float32)}
    write_orbax(path / "params", changed)
    with open_checkpoint(path, framework="jax") as checkpoint:
        assert bool((checkpoint.tensor("action_in_proj.bias") == 3).all())


def test_the_cache_can_be_put_elsewhere(orbax, tmp_path):
    with open_checkpoint(orbax(), framework="jax", cache_dir=tmp_path / "here") as checkpoint:
        assert tmp_path / "here" in checkpoint.store.files[0].parents
    assert not (tmp_path / "cache").exists()


def test_params_can_be_given_themselves(orbax):
    path = orbax()
    (path / "config.json").rename(path / "params" / "config.json")
    with open_checkpoint(path / "params", framework="jax") as checkpoint:
        assert checkpoint.norm_stats is not None


def test_the_torch_framework_names_the_other_one(orbax):
    with pytest.raises(CheckpointNotFoundError, match='openpi Orbax checkpoint; use framework="jax"'):
        open_checkpoint(orbax())


def test_horizon_is_asked_for(orbax):
    path = orbax()
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="Pass action_horizon="):
        open_checkpoint(path, framework="jax")


def test_published_shapes_need_no_config(orbax):
    """openpi's Orbax directories hold no config.json; here only the reduced vision tower makes one
    necessary."""
    path = orbax()
    edit_json(
        path / "config.json", lambda config: [config.pop(name) for name in set(config) - {"flashrt_dims"}]
    )
    with open_checkpoint(path, framework="jax", action_horizon=10) as checkpoint:
        assert checkpoint.config.horizon == 10


def test_missing_array(source, orbax):
    tree = {
        leaf: array
        for leaf, array in source["pi05"][1].items()
        if leaf != "PaliGemma/llm/layers/mlp_1/linear"
    }
    with pytest.raises(
        CheckpointError, match=r"missing key .*gemma_expert\.model\.layers\.0\.mlp\.down_proj"
    ):
        open_checkpoint(orbax(tree=tree), framework="jax")


def test_foreign_array(source, orbax):
    tree = source["pi05"][1] | {"PaliGemma/llm/layers/attn/q_einsum/lora_a": np.zeros((4, 2), np.float32)}
    with pytest.raises(CheckpointError, match=r"no part of pi0.*lora_a"):
        open_checkpoint(orbax(tree=tree), framework="jax")


def test_misshapen_array(source, orbax):
    tree = source["pi05"][1] | {"PaliGemma/llm/layers/attn/q_einsum/w": np.zeros((4,), np.float32)}
    with pytest.raises(CheckpointError, match=r"q_einsum.w' has shape \(4,\)"):
        open_checkpoint(orbax(tree=tree), framework="jax")


def test_integers(source, orbax):
    with pytest.raises(CheckpointError, match="stored as int32, expected floats"):
        open_checkpoint(orbax(dtype="int32"), framework="jax")


def test_not_finite(source, orbax):
    tree = source["pi05"][1] | {"time_mlp_in/bias": np.full(64, np.nan, np.float32)}
    with pytest.raises(CheckpointError, match=r"'time_mlp_in\.bias' holds NaN"):
        open_checkpoint(orbax(tree=tree), framework="jax")


@pytest.mark.parametrize("what", ["manifest", "data"])
def test_damaged_files(orbax, what):
    path = orbax()
    if what == "manifest":
        (path / "params/manifest.ocdbt").write_bytes(b"rubbish")
    else:
        for file in (path / "params/d").iterdir():
            file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(CheckpointError, match=f"{path}/params"):
        open_checkpoint(path, framework="jax")


def test_without_tensorstore(orbax, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(OptionError, match=r"flashrt-runtime\[jax\]"):
        open_checkpoint(orbax(), framework="jax")


@pytest.mark.parametrize("policy", ["pi05", "pi0fast"])
def test_converted_it_is_an_openpi_pytorch_checkpoint(source, orbax, tmp_path, policy):
    path, out = orbax(policy), tmp_path / "converted"
    done = CliRunner().invoke(app, ["convert", "--checkpoint", str(path), "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    files = json.loads(done.stdout)["files"]
    assert set(files) == {"model.safetensors", "config.json", "assets/libero/norm_stats.json"}
    assert files["model.safetensors"] == (out / "model.safetensors").stat().st_size
    with open_checkpoint(out) as converted, open_checkpoint(source[policy][0]) as expected:
        assert converted.layout == "openpi-pytorch"
        assert converted.config == expected.config
        assert converted.norm_stats_file == out / "assets/libero/norm_stats.json"
        for key in sorted(expected.keys()):
            torch.testing.assert_close(converted.tensor(key), expected.tensor(key), rtol=0, atol=0)


def test_what_lies_beside_the_weights_comes_along(source, orbax, tmp_path):
    path = orbax("pi0fast")
    shutil.copytree(source["pi0fast"][0] / "fast", path / "fast")
    shutil.copy(source["pi0fast"][0] / "tokenizer.model", path)
    convert_checkpoint(path, tmp_path / "converted")
    policy = flashrt_runtime.load_model(tmp_path / "converted", config="pi0fast", hardware="cpu")
    assert policy.spec.config == "pi0fast"
    assert len(policy._action_tokens.ids) > 100
    policy.close()


def test_a_conversion_that_cannot_be(source, orbax, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"no Orbax parameters .*it holds safetensors"):
        convert_checkpoint(source["pi05"][0], out)
    with pytest.raises(CheckpointNotFoundError, match="nodir: no such checkpoint directory"):
        convert_checkpoint(tmp_path / "nodir", out)
    foreign = source["pi05"][1] | {"extra/w": np.zeros((4, 2), np.float32)}
    path = orbax(tree=foreign)
    with pytest.raises(CheckpointError, match="no part of"):
        convert_checkpoint(path, out)
    assert list(out.iterdir()) == []
    (out / "mine.txt").write_text("hello")
    with pytest.raises(OptionError, match="is not empty"):
        convert_checkpoint(path, out)
