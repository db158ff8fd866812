"""The documentation says what is true: settings, commands, files."""

import json
import pkgutil
import re
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from indexer.formats import as_markdown
from service import errors
from service.cli.main import app
from service.settings import Settings
from training.recipe import Recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_every_setting_is_documented_with_its_default() -> None:
    table = (ROOT / "docs" / "configuration.md").read_text()
    documented = re.findall(r"^\| `POLYCLIP_(\w+)` \| (.*?) \| (.*?) \|$", table, re.MULTILINE)
    expected = [
        (name.upper(), "" if field.default is None else f"`{field.default}`", field.description)
        for name, field in Settings.model_fields.items()
    ]
    assert documented == expected


def test_every_container_is_documented_as_the_command_prints_it() -> None:
    printed = CliRunner().invoke(app, ["formats"]).output
    assert printed == as_markdown() + "\n" and printed in (ROOT / "docs" / "formats.md").read_text()


def test_every_error_is_documented_with_its_code_and_status() -> None:
    assert (ROOT / "docs" / "errors.md").read_text().endswith("\n\n" + errors.as_markdown())


@pytest.mark.parametrize("name", errors.OTHERS)
def test_the_table_of_errors_names_classes_that_exist(name: str) -> None:
    assert issubclass(pkgutil.resolve_name(name), Exception)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_in_the_documentation_exists(page: Path) -> None:
    commands = set(get_command(app).commands)  # type: ignore[attr-defined]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    blocks = "\n".join(a or b for a, b in re.findall(r"```sh\n(.*?)```|`([^`\n]+)`", page.read_text(), re.DOTALL))
    for command in re.findall(r"(?:^|\s)polyclip ([a-z]+)", blocks):
        assert command in commands, f"{page.name}: polyclip {command}"
    for target in re.findall(r"(?:^|\n)make ([a-z-]+)", blocks):
        assert target in targets, f"{page.name}: make {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_file_that_is_named_exists(page: Path) -> None:
    ours = r"\]\(((?!https?://)[^)#]+)\)|`((?:tests|docs|bench|training|service|backbone|indexer)/[\w./]+\w)"
    for name in re.findall(ours, page.read_text()):
        path = next(part for part in name if part)
        base = page.parent if name[0] else ROOT
        assert (base / path).exists(), f"{page.name} names {path}"


def test_nothing_over_a_megabyte_but_the_built_in_weights() -> None:
    import subprocess

    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    large = {name for name in files if name and (ROOT / name).exists() and (ROOT / name).stat().st_size > 1_000_000}
    assert large <= {"backbone/weights/builtin.safetensors"}
    assert (ROOT / "backbone/weights/builtin.safetensors").stat().st_size <= 25_000_000


def test_every_recipe_field_is_documented_with_its_default_and_range() -> None:
    schema = Recipe.json_schema()["properties"]
    assert set(schema) == {*Recipe.model_fields, "preset"}
    table = (ROOT / "docs" / "training.md").read_text()
    documented = {row[0]: row[1:] for row in re.findall(r"^\| `(\w+)` \| `(.*?)` \| (.*?) ?\| (.*?) \|$", table, re.MULTILINE)}
    for name, value in Recipe().to_json().items():
        default, limits, about = documented[name]
        assert default == (json.dumps(value).strip('"') if not isinstance(value, float) else f"{value:g}"), name
        assert about == schema[name]["description"] and schema[name]["default"] == value
        bounds = {**schema[name], **schema[name].get("anyOf", [{}])[0]}
        known = f"{bounds['minimum']:g} to {bounds['maximum']:.10g}" if "minimum" in bounds else ""
        assert limits == known, name
