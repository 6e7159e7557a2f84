"""Recorded observations for calibration: LeRobot datasets and directories of images."""

from __future__ import annotations

from .calibration_obs import dataset_observations, load_calibration_obs
from .folder import load_folder_obs
from .sampling import Episode, Pick, pick_frames, stratified_sample

__all__ = [
    "Episode",
    "Pick",
    "dataset_observations",
    "load_calibration_obs",
    "load_folder_obs",
    "pick_frames",
    "stratified_sample",
]
