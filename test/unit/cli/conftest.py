"""The command line, run in this process."""

import sys

import pytest

from flashrt_runtime.cli import main


@pytest.fixture
def flashrt(monkeypatch, capsys):
    """Runs a command line; gives exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["flashrt", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run
