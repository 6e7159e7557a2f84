"""The commands around the server and this machine: serve, bench, doctor, completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashrt_runtime.cli import checkup
from flashrt_runtime.cli.main import app
from flashrt_runtime.cli.serve import TOKEN_VARIABLE, parse_cameras, read_token
from flashrt_runtime.errors import OptionError
from flashrt_runtime.untrained import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("cli"), preset="demo_arm")


def test_doctor_has_a_line_for_every_item(flashrt):
    code, out, _ = flashrt("doctor")
    lines = out.splitlines()
    assert len(lines) == len(checkup.CHECKS)
    for line, name in zip(lines, checkup.CHECKS, strict=True):
        assert line.split("  ")[0].strip() in ("ok", "note", "MISSING")
        assert name in line
    assert code == (1 if "MISSING" in out else 0)


def test_doctor_as_json(flashrt):
    code, out, _ = flashrt("doctor", "--json")
    content = json.loads(out)
    assert content["ok"] is (code == 0)
    items = {item["item"]: item for item in content["items"]}
    assert {"Python", "ROS", "GPU", "driver", "CUDA", "nvcc", "torch", "kernels", "tokenizer"} < set(items)
    assert {"middleware (RMW)", "clock"} < set(items)
    assert items["Python"]["found"].startswith(f"{sys.version_info[0]}.{sys.version_info[1]}.")
    for item in items.values():
        assert (item["fix"] is None) or item["status"] != "ok", item


def test_doctor_fails_when_something_is_missing(flashrt, monkeypatch, tmp_path):
    monkeypatch.setenv("FLASH_RT_PALIGEMMA_TOKENIZER", str(tmp_path / "none.model"))
    code, out, _ = flashrt("doctor")
    assert code == 1
    (line,) = [line for line in out.splitlines() if line.startswith("MISSING")]
    assert "tokenizer" in line
    assert "no such file: correct or unset FLASH_RT_PALIGEMMA_TOKENIZER" in line


PROGRAMS = {
    "nvidia-smi": "echo '580.95.05'",
    "chronyc": "echo '50505050,ntp.example,3,1.0,-0.00042,0,0,0,0,0,0,0,0,Normal'",
    "nvcc": "echo 'Cuda compilation tools, release 13.0, V13.0.88'",
}


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Stand-ins for programs of other machines: what is tested is how their output is read."""

    def put(name: str, script: str) -> None:
        file = tmp_path / name
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)

    for name, script in PROGRAMS.items():
        put(name, script)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return put


def test_doctor_reads_other_programs(programs):
    assert checkup.check_driver() == checkup.Finding("ok", "580.95.05")
    assert checkup.check_clock() == checkup.Finding("ok", "chrony, 0.42 ms off ntp.example")
    assert checkup.check_nvcc().found.startswith("13.0 at ")
    programs("chronyc", "echo '0,ntp.example,3,1.0,0.25,0'")
    assert checkup.check_clock().status == "note"
    assert "250.00 ms" in checkup.check_clock().found
    programs("nvidia-smi", "exit 9")
    assert checkup.check_driver().status == "note"


def test_bench(flashrt, checkpoint):
    arguments = ("bench", "--checkpoint", checkpoint, "--calls", 4, "--warm-up", 1, "--hardware", "cpu")
    code, out, err = flashrt(*arguments, "--json")
    assert code == 0, err
    content = json.loads(out)
    assert content["calls"] == 4
    assert 0 < content["p50_ms"] <= content["p95_ms"] <= content["p99_ms"] <= content["max_ms"]
    assert content["policy"] == "pi05"
    assert content["device"].startswith("CPU")
    code, out, _ = flashrt(*arguments)
    assert "p50_ms" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layout", "franka"), "unknown layout 'franka'"),
        (("--layout", "libero"), "layout libero has a state of 8 values, the policy one of 7"),
        (("--camera", "image"), "expected VIEW=KEY"),
        (("--camera", "top=observation/image"), "--camera top: the policy's views are base_0_rgb"),
        (("--host", "203.0.113.7"), "203.0.113.7:0 cannot be listened on"),
        (("--token-file", "nowhere.txt"), "nowhere.txt"),
        (("--checkpoint", "nowhere"), "nowhere: no such checkpoint directory"),
    ],
)
def test_mistakes_of_serve_are_one_line(flashrt, checkpoint, arguments, message):
    pytest.importorskip("fastapi")
    given = ("--checkpoint", checkpoint, "--port", 0, "--hardware", "cpu")
    code, out, err = flashrt("serve", *given, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("flashrt: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [((), "no PaliGemma tokenizer"), (("--prompt", "pick " * 300), "tokens")],
    ids=["no tokenizer", "long prompt"],
)
def test_what_every_request_would_fail_at_is_told_at_the_start(
    flashrt, tmp_path, monkeypatch, options, message
):
    pytest.importorskip("fastapi")
    path = make_checkpoint(tmp_path / "policy", preset="demo_arm")
    if not options:
        (path / "tokenizer.model").unlink()
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("FLASH_RT_PALIGEMMA_TOKENIZER", raising=False)
    code, out, err = flashrt("serve", "--checkpoint", path, "--port", 0, "--hardware", "cpu", *options)
    assert (code, out) == (2, "")
    assert message in err


def test_serve_without_its_packages_names_the_extra(flashrt, checkpoint, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("flashrt_runtime.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    code, _, err = flashrt("serve", "--checkpoint", checkpoint)
    assert code == 2
    assert "pip install 'flashrt-runtime[server]'" in err


def test_the_token_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert read_token(None) is None
    monkeypatch.setenv(TOKEN_VARIABLE, "of the environment")
    assert read_token(None) == "of the environment"
    (tmp_path / "token").write_text("  of the file\n")
    assert read_token(tmp_path / "token") == "of the file"
    (tmp_path / "token").write_text("\n")
    with pytest.raises(OptionError, match="no token in it"):
        read_token(tmp_path / "token")


def test_cameras():
    assert parse_cameras(["a=observation/image", "b=x=y"]) == {"a": "observation/image", "b": "x=y"}


@pytest.mark.parametrize(
    "shell",
    ["bash", pytest.param("zsh", marks=pytest.mark.slow), pytest.param("fish", marks=pytest.mark.slow)],
)
def test_shell_completion(shell):
    environment = os.environ | {"_FLASHRT_COMPLETE": f"source_{shell}"}
    code = "import sys; sys.argv[0] = 'flashrt'; from flashrt_runtime.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "_FLASHRT_COMPLETE=complete_" in done.stdout
    assert done.stderr == ""


def test_every_command_speaks_json():
    import inspect

    for command in app.registered_commands:
        if command.context_settings and "allow_extra_args" in command.context_settings:
            continue  # stands for a command whose package is not installed
        assert "as_json" in inspect.signature(command.callback).parameters, command.name
