"""The import rules of the house: who may import whom, and what is imported where."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
APP = ROOT / "app"
FRONT_DOORS = {"train", "report", "analyze", "export", "calibrate"}
COMMON = {
    "errors",
    "settings",
    "section",
    "search_section",
    "data_section",
    "config",
    "yaml_text",
    "compatibility",
}

# What the modules of a package may import of app, beside their own package and COMMON.
ALLOWED = {
    "linalg": set(),
    "lowrank": {"linalg"},
    "distributed": {"linalg"},
    "models": set(),
    "tasks": set(),
    "events": {"lowrank", "distributed", "linalg"},
    "oialr": {"events", "lowrank", "distributed", "linalg"},
    "metrics": {"oialr", "lowrank", "distributed", "linalg"},
    "reporting": {"metrics"},
    "analysis": {"training", "metrics", "lowrank", "distributed", "linalg"},
    "training": {"oialr", "metrics", "tasks", "models", "lowrank", "distributed", "linalg"},
    "command": {"distributed"},
    "errors": set(),
    "config": set(),
    "yaml_text": set(),
    "settings": set(),
    "section": set(),
    "search_section": set(),
    "data_section": set(),
    "compatibility": set(),
}
ONLY_IN = {
    "h5py": {
        "metrics/store.py",
        "metrics/columns.py",
        "metrics/copying.py",
        "metrics/swmr.py",
        "search/store.py",
    },
    "jinja2": {"reporting/page.py"},
    "heat": {"distributed/heat_svd.py", "compatibility.py"},
    "yaml": {"yaml_text.py"},
    "mpi4py": {"distributed/runtime.py", "distributed/workers.py"},
}


def imports(path):
    """Return the dotted names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


FILES = sorted(APP.rglob("*.py"))


def part_of(path):
    """Return the package or top module of app that a file belongs to."""
    return path.relative_to(APP).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(APP)))
def test_imports_point_one_way(path):
    part = part_of(path)
    if part in FRONT_DOORS | {"search", "__init__"}:
        return
    for name in imports(path):
        package, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if package == "app" and ((APP / other).is_dir() or (APP / f"{other}.py").exists()):
            assert not other or other in ALLOWED[part] | COMMON | {part}, name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(APP)))
def test_packages_are_imported_in_their_one_place(path):
    relative = str(path.relative_to(APP))
    for name in imports(path):
        package = name.split(".")[0]
        if package in ONLY_IN:
            assert relative in ONLY_IN[package], name
        if package == "propulate":
            assert relative.startswith("search/"), name
        if package in {"matplotlib", "rich"}:
            assert relative.startswith("reporting/"), name
        if part_of(path) in {"linalg", "lowrank", "models"}:
            assert not name.startswith(("torch.distributed", "mpi4py")), name


def test_every_part_has_its_rule():
    parts = {part_of(path) for path in FILES}
    assert parts <= set(ALLOWED) | FRONT_DOORS | {"search", "__init__"}


def test_modules_are_of_a_size_to_be_read():
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 400, path
