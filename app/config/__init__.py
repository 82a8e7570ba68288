"""The typed configuration: YAML files, ``section.key=value`` and the checks of both."""

from app.config.loading import (
    DEFAULT_CONFIGURATION,
    apply_overrides,
    assign,
    build,
    describe_keys,
    documented_keys,
    load,
    named,
    parse,
    parse_override,
    read,
    set_default_name,
    shortened,
    to_yaml,
)

__all__ = [
    "DEFAULT_CONFIGURATION",
    "apply_overrides",
    "assign",
    "build",
    "describe_keys",
    "documented_keys",
    "load",
    "named",
    "parse",
    "parse_override",
    "read",
    "set_default_name",
    "shortened",
    "to_yaml",
]
