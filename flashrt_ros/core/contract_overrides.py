"""A robot contract with some of its values replaced by parameters, validated as the file itself is."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from .contract import load_contract
from .contract_model import RobotContract
from .contract_yaml import dotted
from .errors import ContractError
from .parameters import ParameterError, PolicyParameters


def contract_of(values: PolicyParameters) -> RobotContract:
    """The contract that `values.robot` names, with the parameters' overrides in place.

    Raises ContractError for the file itself, and ParameterError when the file is good but the overrides are
    not, alone or together with the rest of it.
    """
    contract = load_contract(values.robot)
    if overrides := values.contract_overrides:
        try:
            contract = load_contract(values.robot, overrides=overrides)
        except ContractError as error:
            given = ", ".join(f"{dotted(path)}={value}" for path, value in overrides.items())
            raise ParameterError(f"parameters {given} do not go with the robot contract: {error}") from error
    return _scaled(contract, values.velocity_scale)


def recontracted(current: RobotContract, values: PolicyParameters) -> RobotContract:
    """`contract_of(values)` for a robot that is running on `current`.

    Raises ParameterError also when anything but limits, timeline and inference rate would change, because
    the file did meanwhile.
    """
    new = contract_of(values)
    same = replace(
        new, on_violation=current.on_violation, joints=current.joints, outputs=current.outputs,
        timeline=current.timeline, rates=current.rates,
    )
    names = [output.topic for output in new.outputs]
    rtc_changed = new.timeline.rtc.mode is not current.timeline.rtc.mode  # graphs are captured for it
    if rtc_changed or same != current or names != [output.topic for output in current.outputs] or (
        new.rates.control_period != current.rates.control_period
    ):
        raise ParameterError(
            f"the robot contract {current.source.file} has changed since configure: deactivate, clean up and "
            "configure again"
        )
    return new


def _scaled(contract: RobotContract, scale: float) -> RobotContract:
    if scale == 1.0:
        return contract
    joints = {
        name: joint if joint.limits is None else replace(
            joint, limits=replace(joint.limits, velocity=joint.limits.velocity * scale)
        )
        for name, joint in contract.joints.items()
    }
    return replace(contract, joints=MappingProxyType(joints))
