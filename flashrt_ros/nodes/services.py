"""What ~/set_prompt and ~/calibrate answer: request -> code and message."""

from __future__ import annotations

import os

from flashrt_ros.core.reasons import Reason
from flashrt_ros.srv import Calibrate, SetPrompt
from flashrt_runtime.errors import PromptTooLongError

from .failures import describe
from .pipeline import Pipeline

CALIBRATION_SOURCES = ("live", "bag", "dataset")


def set_prompt(
    pipeline: Pipeline | None, request: SetPrompt.Request, response: SetPrompt.Response
) -> SetPrompt.Response:
    """Change the prompt, or say which of SetPrompt's codes stands against it. Never waits for the model."""
    code, message = SetPrompt.Response.CODE_OK, ""
    prompt = request.prompt.strip()
    if not prompt:
        code = SetPrompt.Response.CODE_EMPTY_PROMPT
        message = "the prompt is empty: send the task in words; the prompt in force stays"
    elif pipeline is None or pipeline.policy is None:
        code = SetPrompt.Response.CODE_NOT_CONFIGURED
        message = "no policy is loaded: configure the node first"
    else:
        try:
            pipeline.set_prompt(prompt, request.reset)
        except PromptTooLongError as error:
            code, message = SetPrompt.Response.CODE_PROMPT_TOO_LONG, describe(error)
        except Exception as error:  # the answer must come whatever the runtime does
            code, message = SetPrompt.Response.CODE_INTERNAL, describe(error)
    if code != SetPrompt.Response.CODE_OK and pipeline is not None:
        pipeline.measured.problems[Reason.PROMPT_INVALID] += 1  # for /diagnostics: nothing is held up
    response.success, response.code, response.message = code == SetPrompt.Response.CODE_OK, code, message
    return response


def calibrate(
    pipeline: Pipeline | None, request: Calibrate.Request, response: Calibrate.Response
) -> Calibrate.Response:
    """Check the request; the calibration itself is not offered yet."""
    code, message = _calibrate_problem(pipeline, request)
    response.success, response.code, response.message = code == Calibrate.Response.CODE_OK, code, message
    return response


def _calibrate_problem(pipeline: Pipeline | None, request: Calibrate.Request) -> tuple[int, str]:
    codes, source, percentile = Calibrate.Response, request.source, request.percentile
    if source not in CALIBRATION_SOURCES:
        return codes.CODE_BAD_SOURCE, f"source '{source}': expected one of {', '.join(CALIBRATION_SOURCES)}"
    if source != "live" and not os.path.exists(request.path):
        return codes.CODE_BAD_PATH, f"path '{request.path}' does not exist: pass the path of a {source}"
    if not 0.0 <= percentile <= 100.0:  # NaN fails too
        return codes.CODE_BAD_ARGUMENT, f"percentile {percentile}: expected 0 < p <= 100, or 0: the default"
    if pipeline is None or pipeline.policy is None:
        return codes.CODE_NOT_CONFIGURED, "no policy is loaded: configure the node first"
    if pipeline.active:
        return codes.CODE_ACTIVE, "the node is active: deactivate it first"
    return codes.CODE_NOT_SUPPORTED, "calibration is not offered by this service yet"
