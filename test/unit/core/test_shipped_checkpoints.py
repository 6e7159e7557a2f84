"""Every shipped robot with a real random checkpoint of Pi0.5 and Pi0: made, loaded, checked, asked once."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest

import flashrt_runtime
from flashrt_ros.core.contract import check_policy, load_contract
from flashrt_ros.core.errors import PolicyMismatchError
from flashrt_runtime.checkpoints.presets import preset_named
from flashrt_runtime.untrained.random import make_checkpoint

SAME_NAME = ("demo_arm", "aloha", "so101", "ur5e")
PRESETS = {"libero_franka": "libero", **{name: name for name in SAME_NAME}}


@pytest.mark.parametrize("policy", ["pi05", "pi0"])
@pytest.mark.parametrize("robot", PRESETS)
def test_a_random_checkpoint_of_its_preset_drives_it(
    robot: str, policy: Literal["pi05", "pi0"], tmp_path: Path
) -> None:
    contract, preset = load_contract(robot), preset_named(PRESETS[robot])
    path = make_checkpoint(tmp_path / "made", preset=preset.name, policy=policy)
    loaded = flashrt_runtime.load_model(
        path, config=policy, hardware="cpu", num_steps=2, num_views=len(contract.views)
    )
    try:
        check_policy(contract, loaded.spec)
        assert loaded.spec.action_representation == contract.action.representation
        image = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
        images = dict.fromkeys(contract.views, image)
        actions = loaded.predict(images, "do it", np.array(preset.state_stats["mean"]), seed=1)
        commands = contract.actions_to_robot(actions)
        assert commands.shape == (preset.horizon, contract.dof)
        assert np.isfinite(commands).all()
        other = load_contract("so101" if robot != "so101" else "ur5e")
        with pytest.raises(PolicyMismatchError, match=r"config/robots/.*\.yaml:\d+: .*checkpoint .*made"):
            check_policy(other, loaded.spec)
    finally:
        loaded.close()
