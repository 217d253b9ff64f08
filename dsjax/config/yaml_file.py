# SPDX-License-Identifier: Apache-2.0
"""YAML as users write it, and the words of a command line.

In: a YAML file, or the words after a command. Out: plain dictionaries of plain values, and a
`ConfigError` for anything that is not such a file or word. What a key means is not known here:
see `load`. The value of a word is all that stands behind its `=`: it is never cut.

PyYAML follows YAML 1.1, where `1e-4` is text and a repeated key silently wins; both are put right.
"""

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.scanner import ScannerError

from dsjax.config.rules import meant
from dsjax.errors import ConfigError, nearest, raise_all

FLAGS = ("--help", "--version", "--print-config", "--schema", "--dry-run", "--fresh")

_FLOAT_TAG = "tag:yaml.org,2002:float"
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
_FLOAT_STARTS = list("-+.0123456789")


_RARE_BREAKS = frozenset("\r\x85\u2028\u2029")
_MOST_VALUES = 100_000
"""Values in a file, those behind an alias counted each time: nobody writes more by hand."""


class _Loader(yaml.SafeLoader):
    def __init__(self, stream: Any):
        super().__init__(stream)
        self._sizes: dict[int, int] = {}  # by node: the values in it

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse aliases that make a small file large: whatever walks the result would not end."""
        event = self.peek_event()
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent) and id(node) not in self._sizes:
            problem = f"the alias *{event.anchor} inside what it stands for"
            raise ComposerError(None, None, problem, event.start_mark)
        if not isinstance(event, yaml.AliasEvent):
            inside = node.value if isinstance(node, yaml.CollectionNode) else ()
            parts = [part for item in inside for part in (item if type(item) is tuple else [item])]
            self._sizes[id(node)] = 1 + sum(self._sizes[id(part)] for part in parts)
        if self._sizes[id(node)] > _MOST_VALUES:
            problem = f"more than {_MOST_VALUES} values, aliases written out"
            raise ComposerError(None, None, problem, event.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                problem = f"the key {key.value} twice"
                raise ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _WordLoader(_Loader):
    def scan_to_next_token(self) -> None:
        """Refuse a comment, which would cut the value."""
        at = 0
        while self.peek(at) in " \t\r\n\x85\u2028\u2029":
            at += 1
        if self.peek(at) == "#":
            problem = "a comment in a value"
            raise ScannerError(None, None, problem, self.get_mark())
        super().scan_to_next_token()


class _Dumper(yaml.SafeDumper):
    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Escape the line breaks that PyYAML writes as they are and reads as other ones."""
        style = '"' if _RARE_BREAKS.intersection(text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


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
    try:
        tree = parse_yaml(Path(path).read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: got {error.strerror}, expected a YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: got bytes that are not UTF-8, expected a YAML file") from error
    if tree is None:
        raise ConfigError(f"{path}: got an empty file, expected sections such as `model:`")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: got {type(tree).__name__}, expected sections such as `model:`")
    return tree


def parse_yaml(text: str, place: str) -> Any:
    """Parse YAML into plain values that later code may walk.

    Raises:
        ConfigError: it is not YAML, or is nested or multiplied beyond sense; begins with `place`
            and the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        problem = f"{place}: got lists or mappings nested too deeply, expected valid YAML"
        raise ConfigError(problem) from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(_yaml_problem(place, error)) from error


def _yaml_problem(path: str, error: Exception) -> str:
    """Say where and why a text is not YAML."""
    mark = getattr(error, "problem_mark", None)
    place = f"{path}:{mark.line + 1}" if mark else path
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{place}: got {problem}, expected valid YAML"


def set_overrides(
    tree: Mapping[str, Any], words: Sequence[str], keys: Mapping[str, list[str]]
) -> dict[str, Any]:
    """Return the tree with `section.key=value` words put in, each value read by `_word_value`.

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
            value = _word_value(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            fix = f"quote text: {path}='\"...\"'"
            problems.append(f"{path}: got {text}, expected a value written as YAML; {fix}")
            continue
        section, _, key = path.partition(".")
        if key and not isinstance(merged.get(section), dict):
            merged[section] = {}
        (merged[section] if key else merged)[key or section] = value
    raise_all(problems)
    return merged


def _word_value(text: str) -> Any:
    """Read the value of an override, all of it.

    YAML's brackets, braces and quotes are read as such, and so are its numbers, booleans and null.
    Anything else is text as it stands: `#`, `: `, `&`, spaces at its ends and line breaks
    belong to it.

    Raises:
        yaml.YAMLError, ValueError or RecursionError: brackets or quotes that do not close, or
            something after them; characters that YAML cannot hold.
    """
    if text[:1] in ("[", "{", '"', "'"):
        return yaml.load(text, Loader=_WordLoader)
    loader = _Loader(text)
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    return loader.construct_object(yaml.ScalarNode(tag, text))


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

    The file is a word that ends in .yaml or .yml, or follows `--config`, anywhere; every other word
    that is not an option is an override. A command with options of its own takes them out first.

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
            raise unknown_option(name, ("--config", *FLAGS))
        elif is_config_file(word):
            configs.append(word)
        else:
            overrides.append(word)
    return one_config(configs), overrides, frozenset(flags)


def one_config(configs: Sequence[str]) -> str | None:
    """Return the configuration of a command line, None if it names none.

    Raises:
        ConfigError: it names two, or `--config` without a file.
    """
    if len(configs) > 1 or "" in configs:
        got = " and ".join(filter(None, configs)) or "no file"
        raise ConfigError(f"--config: got {got}, expected one YAML file")
    return configs[0] if configs else None


def is_config_file(word: str) -> bool:
    """Whether a bare word of a command line names a configuration, and is no override."""
    return "=" not in word and word.endswith((".yaml", ".yml"))


def unknown_option(name: str, known: Sequence[str]) -> ConfigError:
    """Make the error of a command whose settings are bare words and that has few options."""
    expected = "expected one of the options, or a setting as section.key=value"
    return ConfigError(f"{name}: got an unknown option, {expected}; {nearest(name, known)}")
