"""Who may import whom: the arrows of docs/architecture.md point one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "backbone": set(),
    "adapters_store": {"backbone"},
    "indexer": {"backbone"},
    "training": {"backbone", "adapters_store", "indexer"},
    "service": {"backbone", "adapters_store", "indexer", "training"},
    "demo": {"backbone", "adapters_store", "indexer", "training", "service"},
}
FEATURES = {"search", "videos", "adapters", "feedback", "alerts", "upkeep"}
ROOMS = {  # inside `service`: a room, and those that it may import
    "storage": set(),
    "jobs": {"storage"},
    **{feature: FEATURES | {"jobs", "storage"} for feature in sorted(FEATURES)},
    "http": FEATURES | {"jobs", "storage"},
    "cli": FEATURES | {"jobs", "storage"},
}
OPEN_TO_ALL = {"settings", "logs", "errors", "net"}  # modules beside the rooms
STARTS_THE_APPLICATION = {"service/cli/serve.py"}


def imports(path: Path) -> set[str]:
    """Dotted names of every module that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package: str) -> None:
    allowed = MAY_IMPORT[package] | {package}
    for path in (ROOT / package).rglob("*.py"):
        ours = {name.split(".")[0] for name in imports(path)} & set(MAY_IMPORT)
        if path.is_relative_to(ROOT / "service" / "cli"):  # `polyclip demo`
            ours -= {"demo"}
        assert ours <= allowed, f"{path.relative_to(ROOT)} imports {ours - allowed}"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_of_the_service_import_one_way(room: str) -> None:
    for path in (ROOT / "service" / room).rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        ours = {module for module in imports(path) if module.startswith("service.")}
        rooms = {module.split(".")[1] for module in ours}
        if name in STARTS_THE_APPLICATION:
            rooms -= {"app", "http"}
        assert rooms <= ROOMS[room] | {room} | OPEN_TO_ALL, f"{name} imports {sorted(ours)}"


@pytest.mark.parametrize(
    "module",
    [
        "indexer/index.py",
        "indexer/decode.py",
        "indexer/sandbox.py",
        "indexer/sandbox_child.py",
        "indexer/survey.py",
        "indexer/pictures.py",
    ],
)
def test_index_and_decoder_know_no_torch(module: str) -> None:
    names = imports(ROOT / module)
    assert not {name for name in names if name.split(".")[0] in ("torch", "open_clip", "backbone")}


def test_routes_and_schemas_are_the_only_users_of_pydantic_models() -> None:
    allowed = {
        "service/settings.py",
        "service/http",
        "service/videos/captions.py",
        "service/videos/accept.py",
        "service/upkeep/archive_json.py",
        "service/errors.py",
    }
    for path in (ROOT / "service").rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        if not any(name.startswith(prefix) for prefix in allowed):
            assert not {n for n in imports(path) if n.split(".")[0] == "pydantic"}, name
