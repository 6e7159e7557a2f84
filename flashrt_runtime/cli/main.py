"""Entry point: commands, logging, and errors as one line with exit code 2."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from typing import Annotated

import typer
from rich.logging import RichHandler

from .. import device_loss
from ..errors import DeviceLostError, FlashRTError
from .bench import bench_command
from .calibrate import calibrate_command
from .console import ERRORS
from .convert import convert_command
from .doctor import doctor_command
from .download_tokenizer import download_tokenizer_command
from .info import info_command
from .make_checkpoint import make_checkpoint_command
from .parity import parity_command
from .plugins import add_plugins
from .predict import predict_command
from .serve import serve_command

app = typer.Typer(
    name="flashrt",
    help="Vision-language-action policies on the robot's own computer.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("info")(info_command)
app.command("predict")(predict_command)
app.command("calibrate")(calibrate_command)
app.command("make-checkpoint")(make_checkpoint_command)
app.command("convert")(convert_command)
app.command("download-tokenizer")(download_tokenizer_command)
app.command("parity")(parity_command)
app.command("serve")(serve_command)
app.command("bench")(bench_command)
app.command("doctor")(doctor_command)
add_plugins(app)


@app.callback()
def _common(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is done, to stderr.")] = False,
) -> None:
    level = logging.INFO if verbose else logging.WARNING
    handler = RichHandler(console=ERRORS, show_time=False, show_path=False)
    logging.basicConfig(level=level, format="%(message)s", handlers=[handler])


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 a check of the command did not hold, 2 a mistake in options, files or the
    environment, 3 a fault of this program, with its traceback, 75 the GPU was lost: started again it may run.
    """
    try:
        app()
    except DeviceLostError as error:
        ERRORS.print(f"flashrt: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.stdout.flush()
        os._exit(device_loss.EXIT_STATUS)  # destructors of what was on the GPU may hang or abort
    except (FlashRTError, OSError) as error:
        ERRORS.print(f"flashrt: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except Exception:
        traceback.print_exc()
        ERRORS.print("flashrt: this is a fault of flashrt: please report it", highlight=False)
        sys.exit(3)
