# SPDX-License-Identifier: Apache-2.0
"""YAML as users write it, and the words of a command line.

In: a YAML file, or the words after a command. Out: plain dictionaries of plain values, and a
`ConfigError` for anything that is not such a file or word. What a key means is not known here:
see `config.py`.

PyYAML follows YAML 1.1, where `1e-4` is text and a repeated key silently wins; both are put right.
"""

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dsjax.config_rules import meant
from dsjax.errors import ConfigError, raise_all

FLAGS = ("--help", "--print-config", "--schema")

_FLOAT_TAG = "tag:yaml.org,2002:float"
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
_FLOAT_STARTS = list("-+.0123456789")


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                problem = f"the key {key.value} twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    pass


# YAML 1.1 reads 016 as 14 and 1:30 as 90; here they are texts, which no number field takes.
_INT_TAG, _INT = "tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$")
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {
        start: [(tag, rule) for tag, rule in rules if tag != _INT_TAG]
        for start, rules in _class.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver(_INT_TAG, _INT, list("-+0123456789"))

# The writer needs the rule too: only then does it put quotes around text that reads as a number.
_Loader.add_implicit_resolver(_FLOAT_TAG, _FLOAT, _FLOAT_STARTS)
_Dumper.add_implicit_resolver(_FLOAT_TAG, _FLOAT, _FLOAT_STARTS)


def to_text(tree: Mapping[str, Any]) -> str:
    """Write plain values as YAML that `read_yaml` reads back as the same values."""
    return yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Raises:
        ConfigError: there is no such file, it is empty, or it is not YAML; names the line.
    """
    file = Path(path)
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path}: got {error.strerror}, expected a YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: got bytes that are not UTF-8, expected a YAML file") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(_yaml_problem(str(path), error)) from error
    if tree is None:
        raise ConfigError(f"{path}: got an empty file, expected sections such as `model:`")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: got {type(tree).__name__}, expected sections such as `model:`")
    return tree


def _yaml_problem(path: str, error: Exception) -> str:
    """Say where and why a text is not YAML."""
    mark = getattr(error, "problem_mark", None)
    place = f"{path}:{mark.line + 1}" if mark else path
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{place}: got {problem}, expected valid YAML"


def set_overrides(
    tree: Mapping[str, Any], words: Sequence[str], keys: Mapping[str, list[str]]
) -> dict[str, Any]:
    """Return the tree with `section.key=value` words put in, each value read as YAML.

    Args:
        tree: what the file says; not changed.
        words: the overrides; of two for the same key the later one holds.
        keys: the keys of each section; a top-level key that is no section has none.

    Raises:
        ConfigError: a word has no `=`, names no key, or its value is not YAML; names every one.
    """
    merged = {name: dict(part) if isinstance(part, dict) else part for name, part in tree.items()}
    problems = []
    for word in words:
        path, equals, text = word.partition("=")
        problem = _path_problem(path, keys) if equals else f"{word}: got a word without `=`"
        if problem:
            problems.append(f"{problem}, expected section.key=value; {meant(path, keys)}")
            continue
        try:
            value = yaml.load(text, Loader=_Loader)
        except (yaml.YAMLError, ValueError):
            fix = f"quote text: {path}='\"...\"'"
            problems.append(f"{path}: got {text}, expected a value written as YAML; {fix}")
            continue
        section, _, key = path.partition(".")
        if key and not isinstance(merged.get(section), dict):
            merged[section] = {}
        (merged[section] if key else merged)[key or section] = value
    raise_all(problems)
    return merged


def _path_problem(path: str, keys: Mapping[str, list[str]]) -> str | None:
    """Say what is wrong with the left side of an override, if anything is."""
    section, dot, key = path.partition(".")
    if section not in keys:
        return f"{path}: got an unknown section"
    if dot and key not in keys[section]:
        return f"{path}: got an unknown key"
    if not dot and keys[section]:
        return f"{path}: got a whole section"
    return None


def split_arguments(argv: Sequence[str]) -> tuple[str | None, list[str], frozenset[str]]:
    """Split a command line into its config file, its overrides and its flags.

    `--config FILE` (or `--config=FILE`) stands anywhere; every word that is not an option is an
    override. A command with options of its own takes them out first.

    Returns:
        (config file or None, overrides in order, those of `FLAGS` that were given).

    Raises:
        ConfigError: an option is unknown, or `--config` has no file or stands there twice.
    """
    configs, overrides, flags = [], [], set()
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--config":
            configs.append(value if equals else next(words, ""))
        elif word in (*FLAGS, "-h"):
            flags.add("--help" if word == "-h" else word)
        elif word.startswith("-"):
            known = ", ".join(("--config", *FLAGS))
            fix = "every other setting is a bare section.key=value"
            raise ConfigError(f"{name}: got an unknown option, expected one of {known}; {fix}")
        else:
            overrides.append(word)
    if len(configs) > 1 or "" in configs:
        got = " and ".join(filter(None, configs)) or "no file"
        raise ConfigError(f"--config: got {got}, expected one YAML file")
    return (configs[0] if configs else None), overrides, frozenset(flags)
