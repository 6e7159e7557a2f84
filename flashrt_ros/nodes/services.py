"""What ~/set_prompt answers: request -> code and message."""

from __future__ import annotations

from flashrt_ros.core.reasons import Reason
from flashrt_ros.srv import SetPrompt
from flashrt_runtime.errors import PromptTooLongError

from .failures import describe
from .pipeline import Pipeline


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
