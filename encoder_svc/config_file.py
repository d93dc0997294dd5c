"""The config file: YAML whose values are texts, each for its option to read, as it reads a flag.

YAML's own reading would make 510 of ``8:30``, 8 of ``010``, and of a name that looks like a date an error.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar, Final

import yaml

from encoder_svc.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Hashable
    from pathlib import Path

_NULL: Final = "tag:yaml.org,2002:null"
_NO_VALUE: Final = re.compile(r"(~|null|Null|NULL|)$")
_TAGS: Final = (_NULL, "tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map", None)


def read_config_file(path: Path) -> dict[str, Any]:
    """Option names to texts; None where no value is given. What is a list or a map stays one.

    Raises:
        ConfigError: it cannot be read, or is no map of option names, each there once.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _TextLoader)  # noqa: S506 - a safe loader, and less
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror}).") from None
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"--config {path}: is not YAML ({where}{error.problem}).") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ConfigError(f"--config {path}: is not YAML.") from None
    except RecursionError:
        raise ConfigError(f"--config {path}: is nested too deeply.") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"--config {path}: must map option names to values.")
    return values


class _TextLoader(yaml.SafeLoader):
    """Knows texts, lists, maps and no value at all."""

    yaml_implicit_resolvers = {first: [(_NULL, _NO_VALUE)] for first in ("~", "n", "N", "")}  # noqa: RUF012
    yaml_constructors: ClassVar = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in _TAGS}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        mapping = super().construct_mapping(node, deep)
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is there twice", key.start_mark)
            seen.add(key.value)
        return mapping
