"""Reading and writing of YAML, with bounds on what a text may ask for.

A few bytes of YAML can stand for gigabytes (aliases of aliases) or for a recursion without end, and
the parser's exceptions are of many kinds. Here every text is measured before anything is built of
it, and whatever is wrong with it is one line with the place where it is.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import yaml

LARGEST_TEXT = 2**20
"""Characters."""
DEEPEST = 40
"""Levels of mappings and lists within each other."""
MOST_VALUES = 20_000
"""Scalars, lists and mappings, each counted wherever an alias repeats it."""


class YamlError(ValueError):
    """What is wrong with a text, in one line, with line and column where there are any."""


def load(text: str) -> Any:
    """Read a text into dictionaries, lists and plain values.

    Raises:
        YamlError: it is no YAML, gives a key twice, or is beyond the bounds of this module.
    """
    if len(text) > LARGEST_TEXT:
        raise YamlError(f"it is longer than {LARGEST_TEXT} characters")
    try:
        _measure(text)
        return _written_out(yaml.load(text, Loader=_Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(_in_one_line(error.problem or error.context or "no YAML", mark)) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = f"line {before.count(chr(10)) + 1}, column {len(before.rpartition(chr(10))[2]) + 1}"
        raise YamlError(f"{place}: the character {chr(error.character)!r} is not allowed") from None
    except yaml.YAMLError as error:
        raise YamlError(_in_one_line(str(error), None)) from None


def dump(values: Mapping[str, Any]) -> str:
    """Return nested dictionaries as YAML, in their order."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False)


def dump_value(value: Any) -> str:
    """Return a value as YAML in one line, whatever its length."""
    text: str = yaml.dump(value, Dumper=_LineDumper, default_flow_style=True, width=math.inf)
    return text.splitlines()[0]  # a plain value has an end mark behind it


def _measure(text: str) -> None:
    """Refuse what is too deep or, with its aliases written out, too much; builds nothing of it."""
    sizes: dict[str, int | None] = {}  # of what has an anchor; None: it is not closed yet
    open_nodes: list[tuple[str | None, int]] = []  # anchors, and the values before them
    count = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            size = sizes.get(event.anchor, 0)  # an unknown one is the parser's to refuse
            if size is None:
                raise _refusal(f"*{event.anchor} repeats what it lies in", event)
            count += size
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, count))
            count += 1
            if event.anchor:
                sizes[event.anchor] = None
            if len(open_nodes) > DEEPEST:
                raise _refusal(f"more than {DEEPEST} levels within each other", event)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = count - before
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor:
                sizes[event.anchor] = 1
        if count > MOST_VALUES:
            raise _refusal(f"more than {MOST_VALUES} values, aliases written out", event)


def _written_out(value: Any) -> Any:
    """Give every alias a copy of its own, so that a change of one is none of another."""
    if isinstance(value, dict):
        return {key: _written_out(item) for key, item in value.items()}
    return [_written_out(item) for item in value] if isinstance(value, list) else value


def _refusal(problem: str, event: yaml.Event) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def _in_one_line(problem: str, mark: Any) -> str:
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return place + " ".join(problem.split())


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 3e-4 and 010 are numbers and a key given twice is an error."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Build a value; whatever its tag makes of it, a fault is one of the text."""
        try:
            return super().construct_object(node, deep=deep)
        except yaml.YAMLError:
            raise
        except Exception as error:  # !!int of a word, a date with 13 months, 5,000 digits
            kind = node.tag.rpartition(":")[2]
            reason = f" ({str(error)[:80]})" if isinstance(error, ValueError) else ""
            raise yaml.constructor.ConstructorError(
                None, None, f"this cannot be read as {kind}{reason}", node.start_mark
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            is_merge = key_node.tag == "tag:yaml.org,2002:merge"
            key = "<<" if is_merge else self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict | set):
                problem = "a list or mapping cannot be a key"
            elif key in seen:
                problem = f"the key {key!r} is given twice"
            else:
                seen.add(key)
                continue
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        return super().construct_mapping(node, deep=deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node).replace("_", "")
        base = {"0x": 16, "0b": 2}.get(text.lstrip("+-")[:2].lower(), 10)
        return int(text, base)


class _Dumper(yaml.SafeDumper):
    """Puts strings that :class:`_Loader` would read as numbers in quotes."""


class _LineDumper(yaml.SafeDumper):
    """Writes line breaks in a string as escapes, so that it stays in its line."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Put a string of several lines in double quotes."""
        style = '"' if "\n" in data else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_LineDumper.add_representer(str, _LineDumper.represent_str)
_DIGITS = "[0-9]+(_[0-9]+)*"
_NUMBERS = {
    "tag:yaml.org,2002:int": rf"^[-+]?(0b[01]+(_[01]+)*|0x[0-9a-fA-F]+|{_DIGITS})$",
    "tag:yaml.org,2002:float": rf"^[-+]?(({_DIGITS}(\.({_DIGITS})?)?|\.{_DIGITS})([eE][-+]?[0-9]+)?"
    r"|\.(inf|Inf|INF)|\.(nan|NaN|NAN))$",
}
"""What is a number, a whole one first. YAML 1.1, which the package reads, takes 3e-4 and 1.5e3 for
words, 010 for 8 and 1:30 for 90."""
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _class in (_Loader, _Dumper, _LineDumper):
    for _tag, _pattern in _NUMBERS.items():
        _class.add_implicit_resolver(_tag, re.compile(_pattern), list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)
