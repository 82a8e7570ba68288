"""Configurations that nobody would write, through the path on which all are read."""

import random

import pytest

from app import config
from app.config import yaml_text
from app.errors import UserError

CONFIGURATIONS = 500
SCALARS = (
    "", "null", "~", "true", "yes", "3", "-3", "0", "0x", "0b", "0o7", "1_e5", "1e5", "1e400",
    ".nan", "-.inf", "1__0", "9" * 400, "9" * 5000, "2020-13-45", "2020-01-01", "190:99:99", "<<",
    "=", "*a", "&a 3", "&a [*a]", "!!int abc", "!!float ''", "!!bool 5", "!!binary ü", "!x 3",
    "!!timestamp 5", "!!omap 5", "!!pairs [a]", "!!set {a, b}", "!!python/name:os.system",
    "[a, [b, {c: d}]]", "{a: {b: [c]}}", "[" * 60 + "]" * 60, "'a", '"\\x00"', '"\\ud800"', "? [a]",
    "|\n  a\n b", "- a", "%", "@", "`", "\t3", "a: b: c", "\0", "\x07", "\ufeff", "\u2028", "é",
    "{", "]", "#", "---", "...",
)  # fmt: skip
MAPPINGS = ("<<: &b {c: 1}", "? [a, b]\n    : 3", "a: &a {b: 1}\n    c: *a", "a: 1e-3")


def default_of(key: str) -> str:
    """Return the default of a key as YAML."""
    section, _, name = key.partition(".")
    return yaml_text.dump_value(config.build({}).model_dump()[section][name])


def generate(random_: random.Random) -> tuple[bytes, list[str]]:
    """Return the content of a file, and assignments of a command line."""
    keys = config.documented_keys()
    sections: dict[str, list[str]] = {}
    for key in random_.sample(keys, random_.randint(0, 4)):
        section, _, name = key.partition(".")
        value = default_of(key) if random_.random() < 0.85 else random_.choice(SCALARS)
        sections.setdefault(section, []).append(f"{name}: {value}")
    if random_.random() < 0.3:
        sections.setdefault("model", []).append(f"arguments:\n    {random_.choice(MAPPINGS)}")
    lines = [f"{section}:\n  " + "\n  ".join(entries) for section, entries in sections.items()]
    if random_.random() < 0.2:
        lines.append(f"extends: {random_.choice(('base.yaml', 'file.yaml', *SCALARS))}")
    if random_.random() < 0.2:
        lines.append(f"{random_.choice(SCALARS)}: {random_.choice(SCALARS)}")
    random_.shuffle(lines)
    content = bytearray("\n".join(lines).encode("utf-8", "surrogatepass"))
    for _ in range(random_.choice((0, 0, 0, 0, 0, 1, 3))):
        if content:
            content[random_.randrange(len(content))] = random_.randrange(256)
    assignments = []
    for key in random_.sample(keys, random_.choice((0, 0, 1, 2))):
        inner = random_.choice(("", "", ".a", ".", "..b"))
        assignments.append(f"{key}{inner}{random_.choice('==:')}{random_.choice(SCALARS)}")
    return bytes(content), assignments


@pytest.mark.parametrize("seed", range(5))
def test_every_configuration_is_read_or_refused_in_one_line(tmp_path, seed):
    """What is read can be stored and read again: what a run stores is what it resumes from."""
    random_ = random.Random(seed)
    (tmp_path / "base.yaml").write_text("training: {epochs: 9}")
    path = tmp_path / "file.yaml"
    read = 0
    for _ in range(CONFIGURATIONS // 5):
        content, assignments = generate(random_)
        path.write_bytes(content)
        problem, configuration = "", None
        try:
            configuration = config.load(path, assignments)
        except UserError as error:
            problem = str(error)
        assert problem.isprintable(), (content, assignments)
        assert len(problem) < 2000, (content, assignments)
        if configuration is not None:
            read += 1
            stored = config.to_yaml(configuration)
            assert config.build(config.parse(stored, source="stored")) == configuration, content
    assert 10 < read < 90
