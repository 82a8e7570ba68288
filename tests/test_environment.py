"""The requirement files, environment.yml, the imports of both packages and the Makefile agree."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rattler import MatchSpec
from rattler.exceptions import InvalidMatchSpecError
from support.machine import need

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTIONS = {
    "PIL": "pillow",
    "pydantic_core": "pydantic",  # which pins it
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
"""Import names that differ from the name of the package on the Python Package Index."""
OURS = {"app", "oialr"}
CONDA_NAMES = {"matplotlib-base": "matplotlib", "pytorch": "torch"}
"""Names of conda-forge that differ from those of the Python Package Index."""
REQUIREMENT_FILES = ("requirements.txt", "requirements-nodeps.txt", "requirements-dev.txt")


def read_requirements(name: str) -> dict[str, tuple[str, str]]:
    """Version and comment of every package of a requirements file."""
    packages = {}
    for line in (ROOT / name).read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"([a-z0-9-]+)==([0-9.]+)(?:\s+#\s*(\S.*))?", line)
        assert match, f"{name}: not an exact version: {line}"
        assert match[1] not in packages, f"{name}: {match[1]} is there twice"
        packages[match[1]] = (match[2], match[3] or "")
    return packages


def read_environment() -> dict[str, str]:
    """Version of every package of environment.yml, by its name on the Python Package Index.

    Read as conda and mamba do; no version: empty.
    """
    packages = {}
    for entry in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]:
        spec = MatchSpec(entry)
        name = spec.name.as_package_name().source
        version = str(spec.version or "").removeprefix("==").removesuffix(".*")
        assert name not in packages, f"{name} is there twice"
        packages[CONDA_NAMES.get(name, name)] = version
    return packages


def imported_packages() -> dict[str, str]:
    """Third-party packages imported in our packages, each with one file that does it."""
    packages = {}
    for path in sorted(path for name in OURS for path in (ROOT / name).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [str(node.module)]
            else:
                continue
            for module in (name.partition(".")[0] for name in modules):
                if module not in OURS and module not in sys.stdlib_module_names:
                    packages[DISTRIBUTIONS.get(module, module)] = str(path.relative_to(ROOT))
    return packages


def test_every_requirement_is_pinned_in_one_file() -> None:
    names = [name for file in REQUIREMENT_FILES for name in read_requirements(file)]
    assert len(names) == len(set(names))
    assert set(read_requirements("requirements-nodeps.txt")) == {"heat", "propulate"}


def test_environment_has_the_versions_of_requirements() -> None:
    environment = read_environment()
    assert environment.pop("python") == "3.11"
    assert environment.pop("pip") == ""
    assert environment.pop("cxx-compiler") == ""
    expected = {n: version for n, (version, _) in read_requirements("requirements.txt").items()}
    assert environment == expected


def test_the_environment_has_one_mpi_and_the_site_may_replace_it() -> None:
    """What the comments of environment.yml propose are specs, and select no build of their own."""
    text = (ROOT / "environment.yml").read_text()
    proposed = [MatchSpec(entry) for entry in re.findall(r"^#   - (\S+)", text, re.MULTILINE)]
    assert {spec.name.as_package_name().source for spec in proposed} == {"mpich", "openmpi"}
    assert {spec.build for spec in proposed} == {"external_*"}
    entries = yaml.safe_load(text)["dependencies"]
    assert {MatchSpec(e).build for e in entries if e.startswith("h5py")} == {"nompi_*"}
    with pytest.raises(InvalidMatchSpecError):
        MatchSpec("numpy==>2")


def test_the_container_is_made_from_these_files() -> None:
    sections = re.split(r"^%(\w+)\n", (ROOT / "apptainer.def").read_text(), flags=re.MULTILINE)
    header, names, bodies = sections[0], sections[1::2], sections[2::2]
    assert {"Bootstrap", "From"} <= set(re.findall(r"^(\w+): \S+$", header, re.MULTILINE))
    content = dict(zip(names, bodies, strict=True))
    copied = dict(line.split() for line in content["files"].strip().splitlines())
    assert set(copied) == {"environment.yml", "requirements-nodeps.txt"}
    for name, target in copied.items():
        assert (ROOT / name).exists()
        assert target in content["post"]
    for name in ("post", "test"):
        subprocess.run(["sh", "-n"], input=content[name], text=True, check=True)


def test_imported_packages_are_required() -> None:
    required = {**read_requirements("requirements.txt")}
    required.update(read_requirements("requirements-nodeps.txt"))
    imported = imported_packages()
    assert imported.pop("pandas") == "oialr/stability/alone.py"  # of those who ask for a table
    for framework, module in (("lightning", "lightning"), ("transformers", "huggingface")):
        assert imported.pop(framework) == f"oialr/integrations/{module}.py"  # of those who have it
        assert framework in read_requirements("requirements-dev.txt")
    missing = {name: path for name, path in imported.items() if name not in required}
    assert not missing


@pytest.mark.slow
def test_required_packages_are_imported_or_explained() -> None:
    imported = imported_packages()
    superfluous = [
        name
        for file in ("requirements.txt", "requirements-nodeps.txt")
        for name, (_, comment) in read_requirements(file).items()
        if name not in imported and not comment
    ]
    assert not superfluous


FAKE_PYTHON = """\
#!/bin/sh
echo "$*" >>log
case "$*" in
    *version_info*) {old} ;;
    *ensurepip*) {no_venv} ;;
    *"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
esac
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the Makefile and of what it installs from."""
    need("make")
    for name in ("Makefile", *REQUIREMENT_FILES):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make_setup(
    project: Path, *, old: str = ":", no_venv: str = ":", python: str = "./python"
) -> subprocess.CompletedProcess[str]:
    """Run ``make setup`` with a stand-in for Python that records its arguments."""
    (project / "python").write_text(FAKE_PYTHON.format(old=old, no_venv=no_venv))
    (project / "python").chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(
        ["make", "setup", f"PYTHON={python}"],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def installations(project: Path) -> list[str]:
    log = (project / "log").read_text().splitlines()
    return [line.partition(" install ")[2] for line in log if " install " in line]


def test_setup_installs_in_two_steps_and_only_once(project: Path) -> None:
    steps = ["-r requirements.txt -r requirements-dev.txt", "--no-deps -r requirements-nodeps.txt"]
    result = make_setup(project)
    assert result.returncode == 0, result.stderr
    assert installations(project) == steps
    assert make_setup(project).returncode == 0
    assert installations(project) == steps


@pytest.mark.parametrize("name", REQUIREMENT_FILES)
def test_setup_is_repeated_when_a_requirement_file_changes(project: Path, name: str) -> None:
    make_setup(project)
    installed = (project / ".venv" / "installed").stat().st_mtime
    os.utime(project / name, (installed + 10, installed + 10))
    make_setup(project)
    assert len(installations(project)) == 4


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({"old": "exit 1"}, r"Python 3\.11 or newer is needed"),
        ({"no_venv": "exit 1"}, "install the package python3-venv"),
        ({"python": "./no_python"}, "not found; install Python 3.11"),
    ],
)
def test_setup_names_what_the_machine_lacks(
    project: Path, machine: dict[str, str], message: str
) -> None:
    result = make_setup(project, **machine)
    assert result.returncode != 0
    complaint, end = result.stderr.strip().splitlines()  # ours, and make's own last line
    assert re.search(message, complaint)
    assert end.startswith("make: ***")
    assert not (project / ".venv").exists()


def test_the_hooks_before_a_commit_check_what_make_lint_checks() -> None:
    rule = re.search(r"^lint: .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert rule
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in rule[1].splitlines()]
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"] for hook in repository["hooks"]] == commands
    assert all(hook["language"] == "system" for hook in repository["hooks"])


def logs_of_the_batch_scripts() -> list[str]:
    """Names of the files that the jobs of slurm/ write their output into."""
    names = []
    for script in sorted((ROOT / "slurm").glob("*.sh")):
        options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", script.read_text(), re.MULTILINE))
        if pattern := options.get("output"):
            for key, value in (("%x", options["job-name"]), ("%j", "7"), ("%A", "8"), ("%a", "0")):
                pattern = pattern.replace(key, value)
            names.append(pattern)
    return names


def test_git_sees_the_sources_and_nothing_that_they_write(tmp_path: Path) -> None:
    need("git")
    shutil.copy(ROOT / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)

    def ignored(paths: list[str]) -> list[str]:
        result = subprocess.run(
            ["git", "check-ignore", "--no-index", "--stdin"],
            cwd=tmp_path,
            input="\n".join(paths),
            capture_output=True,
            text=True,
            check=False,
        )
        return result.stdout.split()

    written = [
        ".venv/bin/python",
        "build/lib/app/train.py",
        "oialr.egg-info/PKG-INFO",
        "dist/oialr.tar.gz",
    ]
    written += ["runs/a/metrics.h5", "data/x", "comparison/report.html", "report/report.html"]
    written += ["analysis/metrics.h5", "docs/api/oialr.html", "costs.json", "calibration.json"]
    logs = logs_of_the_batch_scripts()
    assert len(logs) == 5
    assert ignored(written + logs) == written + logs
    folders = ("app", "benchmarks", "configs", "docs", "slurm", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    made = ROOT / "docs" / "api"  # by `make docs`, perhaps before the tests
    sources = [
        path for path in files if "__pycache__" not in path.parts and made not in path.parents
    ]
    assert ignored([str(path.relative_to(ROOT)) for path in sources]) == []
