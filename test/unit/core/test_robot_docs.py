"""docs/robots.md: its reference is the schema's, and its table of shipped robots is complete."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from flashrt_ros.core.contract import known_contracts

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def renderer() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "render_contract_reference", ROOT / "scripts" / "render_contract_reference.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_current(renderer: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert renderer.main(["--check"]) == 0, capsys.readouterr().err


def test_a_change_of_the_schema_is_noticed(renderer: ModuleType) -> None:
    schema = json.loads(renderer.SCHEMA.read_text())
    before = renderer.render(schema)
    schema["$defs"]["stream"]["properties"]["optional"]["default"] = True
    assert renderer.render(schema) != before


def test_every_key_of_the_schema_is_in_the_reference(renderer: ModuleType) -> None:
    schema = json.loads(renderer.SCHEMA.read_text())
    mappings = [schema, *schema["properties"].values(), *schema["$defs"].values()]
    keys = {key for mapping in mappings for key in mapping.get("properties", {})}
    reference = renderer.render(schema)
    assert not {key for key in keys if f"| `{key}` |" not in reference}


def test_every_shipped_robot_is_in_the_table() -> None:
    page = (ROOT / "docs" / "robots.md").read_text()
    assert not [name for name in known_contracts() if f"| `{name}` |" not in page]
