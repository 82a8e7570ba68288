"""The import rules of the house: who may import whom, and what is imported where."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
APP, LIBRARY = ROOT / "app", ROOT / "oialr"

# What each part of the library imports of the others: the whole graph, and not a bit more.
GRAPH = {
    "around_steps": set(),
    "averages": {"transport"},
    "allocation": {"schedule"},
    "compatibility": set(),
    "compression": {
        "compatibility",
        "convert",
        "errors",
        "input_moments",
        "layer_survey",
        "layers",
        "linalg",
        "options",
        "sharding",
        "target",
        "wrappers",
    },
    "convert": {"layers", "linalg", "replaced"},
    "copies": set(),
    "errors": set(),
    "events": {
        "errors",
        "input_moments",
        "layer_survey",
        "linalg",
        "memory",
        "placement",
        "target",
        "transitions",
    },
    "export": {
        "compatibility",
        "convert",
        "copies",
        "errors",
        "files",
        "inference",
        "linalg",
        "sharding",
        "skeleton",
    },
    "factor_steps": {
        "around_steps",
        "linalg",
        "naming",
        "optimizers",
        "options",
        "parameter_groups",
    },
    "files": {"forms", "layers", "linalg", "naming", "preparation", "sharding"},
    "followers": {"convert", "forms", "layers", "preparation", "transport", "wrappers"},
    "forms": {"convert", "layers", "obstacles"},
    "gradients": set(),
    "inference": {"convert", "copies", "errors", "layers", "linalg", "naming", "sharding"},
    "input_moments": {"convert", "layer_survey", "linalg", "naming", "placement"},
    "integrations": {"errors", "export", "method", "preparation", "stability", "wrappers"},
    "layer_survey": {
        "allocation",
        "layers",
        "naming",
        "obstacles",
        "options",
        "outputs",
        "schedule",
    },
    "layers": {"linalg", "naming", "options"},
    "linalg": set(),
    "memory": set(),
    "method": {
        "around_steps",
        "events",
        "factor_steps",
        "forms",
        "gradients",
        "input_moments",
        "layer_survey",
        "optimizer_state",
        "options",
        "parameter_groups",
        "placement",
        "preparation",
        "schedule",
        "sharding",
        "share",
        "start",
        "stored_state",
        "timetable",
        "transitions",
        "turns",
        "wrappers",
    },
    "momentary_groups": {"around_steps"},
    "naming": set(),
    "obstacles": {"layers", "naming"},
    "optimizer_state": {
        "averages",
        "naming",
        "optimizers",
        "options",
        "parameter_groups",
        "transport",
    },
    "optimizers": {"naming", "transport"},
    "options": set(),
    "outputs": {"layers"},
    "parameter_groups": {"momentary_groups", "twin_options"},
    "placement": {"compatibility", "errors", "linalg"},
    "preparation": {"forms", "sharding", "wrappers"},
    "present": {"averages", "convert", "layer_survey", "layers", "linalg", "obstacles"},
    "rank_choice": {"allocation", "layer_survey", "options", "present", "schedule", "target"},
    "reference": set(),
    "replaced": {"layers"},
    "schedule": {"options"},
    "sharding": {"averages", "naming", "wrappers"},
    "share": {"layer_survey"},
    "skeleton": {"convert", "copies", "layers"},
    "stability": {
        "convert",
        "errors",
        "layer_survey",
        "layers",
        "linalg",
        "options",
        "placement",
        "sharding",
        "skeleton",
    },
    "start": {
        "convert",
        "factor_steps",
        "forms",
        "layer_survey",
        "layers",
        "momentary_groups",
        "optimizer_state",
        "options",
        "parameter_groups",
        "target",
        "transitions",
    },
    "stored_state": {"forms", "layer_survey"},
    "target": {"allocation", "layer_survey", "options"},
    "timetable": {"options", "schedule"},
    "transitions": {
        "averages",
        "convert",
        "followers",
        "forms",
        "gradients",
        "layer_survey",
        "layers",
        "linalg",
        "memory",
        "optimizer_state",
        "options",
        "parameter_groups",
        "present",
        "rank_choice",
        "transport",
    },
    "transport": {"layers", "linalg"},
    "turns": {"layer_survey", "options", "placement", "present", "schedule", "stability"},
    "twin_options": {"momentary_groups"},
    "weight_average": {"averages", "wrappers"},
    "wrappers": {"naming"},
}
COMMUNICATE = {"placement", "stability"}
"""Parts of the library that may know of other processes; and sharding asks for types of torch's."""
FRAMEWORKS = {"lightning": {"lightning"}, "huggingface": {"transformers"}}
"""What a module of oialr.integrations imports."""

FRONT_DOORS = {"train", "report", "analyze", "export", "evaluate", "calibrate"}
COMMON = {"errors", "config", "compatibility", "import_path"}
# What the modules of a package may import of app, beside their own package and COMMON.
ALLOWED = {
    "runtime": set(),
    "models": set(),
    "data": set(),
    "recording": {"runtime"},
    "reporting": {"recording"},
    "analysis": {"training", "recording", "runtime"},
    "training": {"recording", "data", "models", "runtime"},
    "command": {"runtime"},
    "errors": set(),
    "config": {"data"},  # of it the table of data sets alone
    "compatibility": set(),
    "import_path": set(),
}
ONLY_IN = {
    "h5py": {
        "app/recording/store.py",
        "app/recording/columns.py",
        "app/recording/copying.py",
        "app/recording/swmr.py",
        "app/search/store.py",
    },
    "jinja2": {"app/reporting/page.py"},
    "heat": {"oialr/compatibility.py"},
    "yaml": {"app/config/yaml_text.py"},
    "mpi4py": {
        "app/runtime/processes.py",
        "app/runtime/workers.py",
        "oialr/placement/heat_svd.py",
    },
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


def name_of(path):
    return str(path.relative_to(ROOT))


def part_of(path):
    """Return the part of its package that a file belongs to: a folder, or a module at the top."""
    return path.relative_to(ROOT).parts[1].removesuffix(".py")


APPLICATION = sorted(APP.rglob("*.py"))
LIBRARY_FILES = sorted(LIBRARY.rglob("*.py"))
FILES = [*APPLICATION, *LIBRARY_FILES]


def test_the_graph_of_the_library_is_the_one_that_is_drawn():
    graph = {part_of(path): set() for path in LIBRARY_FILES}
    for path in LIBRARY_FILES:
        for name in imports(path):
            package, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if package == "oialr" and other in graph:
                graph[part_of(path)].add(other)
    graph = {part: others - {part} for part, others in graph.items()}
    del graph["__init__"]
    assert graph == GRAPH


@pytest.mark.slow
def test_the_library_needs_torch_and_the_standard_library_alone():
    allowed = {"oialr", "torch", *sys.stdlib_module_names}
    asked_for = {
        "heat",
        "mpi4py",
        "onnxruntime",
        "pandas",
        "safetensors",
        "scipy",
        "torchvision",
    }  # where somebody wants them
    for path in LIBRARY_FILES:
        framework = FRAMEWORKS.get(path.stem, set()) if part_of(path) == "integrations" else set()
        assert {name.split(".")[0] for name in imports(path)} <= allowed | asked_for | framework, (
            path
        )
    program = (
        "import sys; import oialr; assert 'torch' not in sys.modules; oialr.OIALR; "
        "oialr.StabilityTracker; assert not {'heat', 'mpi4py', 'scipy', 'torchvision', 'app', "
        "'lightning', 'transformers', 'accelerate', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_no_module_but_the_registry_knows_a_kind_of_layers():
    infrastructure = {"adapter", "base", "cost", "formed", "reading", "registry", "twin"}
    kinds = {path.stem for path in (LIBRARY / "layers").glob("[a-z]*.py")} - infrastructure
    assert {"linear", "conv_transpose", "embedding"} <= kinds
    for path in FILES:
        if path.parent != LIBRARY / "layers":
            for name in imports(path):
                assert not any(name.startswith(f"oialr.layers.{kind}") for kind in kinds), path


@pytest.mark.parametrize("path", LIBRARY_FILES, ids=name_of)
def test_mathematics_and_layers_do_not_communicate(path):
    if part_of(path) not in COMMUNICATE | {"method", "events", "sharding", "compatibility"}:
        for name in imports(path):
            assert not name.startswith(("torch.distributed", "mpi4py")), name


@pytest.mark.parametrize("path", APPLICATION, ids=name_of)
def test_imports_point_one_way(path):
    part = part_of(path)
    if part in FRONT_DOORS | {"search", "__init__"}:
        return
    for name in imports(path):
        package, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if package == "app" and ((APP / other).is_dir() or (APP / f"{other}.py").exists()):
            assert not other or other in ALLOWED[part] | COMMON | {part}, name
        if part == "config" and other == "data":
            assert name.startswith(("app.data.sets", "app.data.data_set")), name


def test_a_configuration_is_read_without_torch():
    program = (
        "import sys; from app import config; config.load(None, []); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_packages_are_imported_in_their_one_place(path):
    for name in imports(path):
        package = name.split(".")[0]
        if package in ONLY_IN:
            assert name_of(path) in ONLY_IN[package], name
        if package == "propulate":
            assert name_of(path).startswith("app/search/"), name
        if package in {"matplotlib", "rich"}:
            assert name_of(path).startswith("app/reporting/"), name
        if part_of(path) == "models":
            assert not name.startswith(("torch.distributed", "mpi4py")), name


def test_every_part_has_its_rule():
    parts = {part_of(path) for path in APPLICATION}
    assert parts <= set(ALLOWED) | FRONT_DOORS | {"search", "__init__"}


def test_every_public_name_is_there():
    import oialr

    for name in oialr.__all__:
        assert getattr(oialr, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = oialr.nothing


def test_modules_are_of_a_size_to_be_read():
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 400, path
