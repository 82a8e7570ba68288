"""Configuration from a YAML file plus ``section.key=value`` on the command line.

Everything is checked when the configuration is built, and a mistake is one line that names the key.
Nothing is dropped silently: an unknown key is an error, and a near miss is suggested.
"""

import difflib
import os
import re
import reprlib
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from app.config import yaml_text
from app.config.section import Section
from app.config.settings import Configuration
from app.config.yaml_text import YamlError, dump
from app.errors import UserError
from oialr.options import choices

LONGEST_CHAIN = 16
"""Files that extend each other."""
_ABBREVIATIONS = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "bs": "batch_size",
    "path": "root",
}
"""Other names that people give to keys."""
_NULL = ("null", "Null", "NULL", "~")
"""What YAML reads as none."""
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100
DEFAULT_CONFIGURATION = Path(__file__).resolve().parents[2] / "configs" / "digits_vit.yaml"


def load(
    path: str | Path | None = None, overrides: Iterable[str] = (), *, folder: str | None = None
) -> Configuration:
    """Read a configuration file, apply ``section.key=value`` overrides, check everything.

    A file may extend another one, ``extends: other.yaml`` with a path relative to its own folder,
    or one that begins with ~:
    keys that it does not give come from there, and those that it gives count as a whole, also where
    a value is a mapping (model.arguments). Of several, ``extends: [network.yaml, recipe.yaml]``,
    each counts before those that are named ahead of it.

    Args:
        path: a YAML file; None: the default configuration.
        overrides: assignments, as :func:`parse_override` reads them.
        folder: of what is resumed, which is run.dir; None: nothing is.

    Raises:
        UserError: one line with the culprit and what would be right.
    """
    path = DEFAULT_CONFIGURATION if path is None else Path(path)
    values = read(path, "--config")
    if folder is not None and not values:  # as a node that fails may leave it: not all defaults
        raise UserError(
            f"{named(str(path))} is empty: put the configuration of the run back, which state.pt "
            "of each of its checkpoints holds, too, under configuration"
        )
    set_default_name(values, path.stem)
    apply_overrides(values, overrides, folder=folder)
    return build(values)


def apply_overrides(
    values: dict[str, Any], overrides: Iterable[str], *, folder: str | None = None
) -> None:
    """Apply ``section.key=value`` to nested dictionaries.

    Args:
        values: to be changed.
        overrides: assignments, as :func:`parse_override` reads them.
        folder: of what is resumed, which is run.dir; None: nothing is.

    Raises:
        UserError: an assignment has another form, or names another run.dir than the folder.
    """
    resumed = None if folder is None else Path(folder).resolve()
    for key, value in map(parse_override, overrides):
        if resumed and key == "run.dir" and Path(str(value)).expanduser().resolve() != resumed:
            raise UserError(f"run.dir: {value} is not {folder}, which is resumed; leave it out")
        assign(values, key, value)
    if folder is not None:
        # One whose name is ~ is not the home folder: the shell would have put that in its place.
        assign(values, "run.dir", f"./{folder}" if folder.startswith("~") else folder)


def set_default_name(values: dict[str, Any], name: str) -> None:
    """Give a run its name in nested dictionaries, if it has none."""
    run = values.setdefault("run", {})
    if isinstance(run, dict):
        run.setdefault("name", name)


def read(path: Path, reason: str, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a file and what it extends; the file's own keys come on top, each as a whole.

    Args:
        path: of the file.
        reason: what names it, for messages.
        extending: the files that extend this one.

    Raises:
        UserError: a file cannot be read, or as :func:`parse`.
    """
    name = named(str(path))
    try:
        resolved = path.resolve()
        if resolved in extending:
            raise UserError(f"{reason}: {name} extends itself")
        if len(extending) > LONGEST_CHAIN:
            raise UserError(f"{reason}: more than {LONGEST_CHAIN} files extend each other")
        text = _read_text(path)
    except OSError as error:
        raise UserError(f"{reason}: cannot read {name}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{reason}: cannot read {name}: {error}") from None
    values = parse(text, source=name)
    if "extends" not in values:
        return values
    named_ones = values.pop("extends")
    others = named_ones if isinstance(named_ones, list) else [named_ones]
    if not others or not all(isinstance(other, str) for other in others):
        raise UserError(
            f"{name}: extends: expected the path of a configuration or a list of them, got "
            f"{shortened(named_ones)}"
        )
    merged: dict[str, Any] = {}
    for other in others:
        _merge(
            merged,
            read(
                path.parent / os.path.expanduser(other), f"{name}: extends", (*extending, resolved)
            ),
        )
    return _merge(merged, values)


def _merge(base: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Put the keys of every section over those of another configuration, which is changed."""
    for section, keys in values.items():
        is_section = isinstance(keys, dict) and isinstance(base.get(section), dict)
        base[section] = {**base[section], **keys} if is_section else keys
    return base


def _read_text(path: Path) -> str:
    """Return the text of a regular file; others, such as pipes, may have no end.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file, too large, or no text; or its name is impossible.
    """
    with open(path, "rb", opener=_open_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no regular file")
        content = file.read(4 * yaml_text.LARGEST_TEXT + 1)
    if len(content) > 4 * yaml_text.LARGEST_TEXT:
        raise ValueError("it is too large for a configuration")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("it is no text") from None


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without waiting for the other end of what may be a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def parse(text: str, *, source: str) -> dict[str, Any]:
    """Read the YAML text of a configuration into nested dictionaries.

    Raises:
        UserError: not YAML, a key given twice, or no mapping of sections.
    """
    try:
        values = yaml_text.load(text)
    except YamlError as error:
        raise UserError(f"{source}: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):  # not shown: it may be any file, named by mistake or not
        kind = type(values).__name__
        raise UserError(f"{source}: expected sections such as 'training:', found one {kind}")
    return values


def build(values: Mapping[str, Any]) -> Configuration:
    """Build the typed configuration from nested dictionaries.

    Raises:
        UserError: an unknown key, a wrong type, a value out of range, or a contradiction.
    """
    try:
        return Configuration.model_validate(dict(values))
    except ValidationError as error:
        problems = [_describe(problem) for problem in error.errors()]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(problems[0] + more) from None


def to_yaml(configuration: Configuration) -> str:
    """Return the resolved configuration as YAML, readable by :func:`load`."""
    return dump(configuration.model_dump())


def documented_keys() -> list[str]:
    """Return every key of the configuration with its section, in order."""
    return [
        f"{section}.{key}"
        for section, field in Configuration.model_fields.items()
        for key in _section(field.annotation).model_fields
    ]


def describe_keys(configuration: Configuration) -> str:
    """Return a table of every key: its value, its default where that is another, its meaning."""
    lines = []
    for section, field in Configuration.model_fields.items():
        section_type = _section(field.annotation)
        lines.append(f"{section}: {section_type.__doc__}")
        for key, entry in section_type.model_fields.items():
            default = entry.get_default(call_default_factory=True)
            value = getattr(getattr(configuration, section), key)
            line = f"  {section}.{key}={yaml_text.dump_value(value)}"
            if value != default:
                line += f"  (default: {yaml_text.dump_value(default)})"
            lines += [line, f"      {entry.description}"]
            if words := choices(entry.annotation):
                lines.append(
                    f"      One of {', '.join(words)}."
                    if len(words) > 1
                    else f"      Or {words[0]}."
                )
    return "\n".join(lines)


def _section(annotation: Any) -> type[Section]:
    assert issubclass(annotation, Section)
    return annotation


def parse_override(override: str) -> tuple[str, Any]:
    """Split ``section.key=value`` (deeper for model.arguments).

    A string is what was typed, as it stands: the folder of ``run.dir=1e3`` is 1e3. Quotes around
    the whole are taken off, and null means none where a key may have none. Every other value is
    read as YAML.

    Raises:
        UserError: it has another form.
    """
    key, separator, text = override.partition("=")
    parts = key.split(".")
    if not separator or len(parts) < 2 or not all(parts):
        raise UserError(
            f"{shortened(override)}: expected section.key=value, such as training.epochs=10"
        )
    types = _types_of(key)
    is_null = not text or (NoneType in types and text in _NULL)
    if str in types and not is_null and text[0] not in "'\"":
        return key, text
    try:
        return key, yaml_text.load(text)
    except YamlError as error:
        raise UserError(
            f"{key}: {shortened(text)} is not a YAML value; quote it ({error})"
        ) from None


def _types_of(key: str) -> tuple[Any, ...]:
    """Return the types that values of a key may have; none for a key that is not known."""
    if key not in documented_keys():
        return ()
    section, _, name = key.partition(".")
    kind = _section(Configuration.model_fields[section].annotation).model_fields[name].annotation
    if get_origin(kind) is Literal:
        return tuple(map(type, get_args(kind)))
    return (kind,) if get_origin(kind) in (list, dict) else get_args(kind) or (kind,)


def assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of ``section.key`` (deeper for model.arguments) in nested dictionaries.

    Raises:
        UserError: a part of the key is a value.
    """
    *parents, last = key.split(".")
    node = values
    for part in parents:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise UserError(f"{key}: {part} is a value and has no keys")
    node[last] = value


def _describe(problem: Any) -> str:
    """One line for one problem that pydantic found: key, what is wrong, what would be right."""
    location = named(".".join(str(part) for part in problem["loc"]))
    given = shortened(problem["input"])
    context = problem.get("ctx", {})
    match problem["type"]:
        case "extra_forbidden":
            return f"{location}: unknown key{_hint(problem['loc'])}"
        case "value_error":  # a contradiction, raised by a section's own check
            return f"{location}.{context['error']}" if location else str(context["error"])
        case "literal_error":
            words = re.findall(r"'([^']*)'", context["expected"])
            hint = _suggestion(str(problem["input"])[:200], words)
            return f"{location}: {given} is not one of {', '.join(words)}{hint}"
        case "model_type":
            return f"{location}: expected keys below this section, got {given}"
        case _:
            message = problem["msg"].removeprefix("Input ")
            return f"{location}: {message} (got {given})"


def _hint(location: Sequence[Any]) -> str:
    """Say what an unknown key may have been meant to be."""
    if len(location) == 1:
        section, _, key = str(location[0]).partition(".")
        if location[0] in documented_keys():  # as on the command line
            return f"; in a file it is a key of a section, {section}: {{{key}: ...}}"
        return _suggestion(str(location[0]), Configuration.model_fields)
    if suggestion := _suggestion(".".join(map(str, location)), documented_keys()):
        return suggestion
    return "; what the network is built with is in model.arguments" * (location[0] == "model")


def named(text: str) -> str:
    """Show a path or key in one line of bounded length, as it stands where that can be."""
    return text if text.isprintable() and len(text) <= 300 else _SHORT.repr(text)


def shortened(value: Any) -> str:
    """Show a value in one line of bounded length."""
    return _SHORT.repr(value)


def _suggestion(word: str, known: Iterable[str]) -> str:
    """Guess which key or value was meant: one that is alike, in its own section first."""
    by_key: dict[str, list[str]] = {}
    section, _, key = word.rpartition(".")
    for other in sorted(known, key=lambda other: other.rpartition(".")[0] != section):
        by_key.setdefault(other.rpartition(".")[-1], []).append(other)
    own = [name for name, others in by_key.items() if others[0].rpartition(".")[0] == section]
    key = _ABBREVIATIONS.get(key, key)
    matches = by_key.get(key) or [
        other
        for names in (own, by_key)
        for name in difflib.get_close_matches(key, names, n=1, cutoff=0.6)
        for other in by_key[name]
    ]
    return f"; did you mean {matches[0]}?" if matches else ""
