# SPDX-License-Identifier: Apache-2.0
"""What each key of a configuration accepts, in words.

In: a pydantic model whose fields are sections (models themselves) or plain keys. Out: the text of
`--help`, and the lines of an error message; both state the same rule, read from the field's schema.
What the keys are is not known here: see `sections`.
"""

import datetime
import json
import textwrap
from collections.abc import Container, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dsjax.config.other_trainers import counterpart
from dsjax.errors import nearest


def sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Return the fields of a model that are models themselves."""
    annotations = {name: field.annotation for name, field in model.model_fields.items()}
    return {
        name: kind
        for name, kind in annotations.items()
        if isinstance(kind, type) and issubclass(kind, BaseModel)
    }


def keys(model: type[BaseModel]) -> dict[str, list[str]]:
    """List the keys of each section; a field that is no section has none."""
    parts = sections(model)
    return {
        name: list(parts[name].model_fields) if name in parts else [] for name in model.model_fields
    }


def meant(path: str, known: Mapping[str, list[str]]) -> str:
    """Name the dotted keys that a wrong one could have meant, also one of another trainer."""
    section, dot, key = path.partition(".")
    leaf = key if dot else section
    elsewhere = [f"{name}.{leaf}" for name, inside in known.items() if leaf in inside]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    told = counterpart(leaf)
    if told:
        return told
    if dot and known.get(section):
        return nearest(key, known[section])
    return nearest(section, known)


def describe(model: type[BaseModel]) -> str:
    """List every key with its rule, default and meaning."""
    lines = []
    parts = sections(model)
    for name, field in model.model_fields.items():
        if name not in parts:
            lines += ["", *_describe_field(name, _rule_of(model, name), field)]
            continue
        lines += ["", f"{name}: {parts[name].__doc__}"]
        for key, inner in parts[name].model_fields.items():
            lines += _describe_field(f"{name}.{key}", _rule_of(parts[name], key), inner)
    return "\n".join(lines[1:])


def _describe_field(path: str, rule: str, field: FieldInfo) -> list[str]:
    default = "required" if field.is_required() else f"default {_show(field.default)}"
    meaning = textwrap.wrap(_meaning(field), width=92)
    return [f"  {path}: {rule} ({default})", *(f"      {line}" for line in meaning)]


def _meaning(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


def problems(
    error: ValidationError,
    tree: Mapping[str, Any],
    model: type[BaseModel],
    planned: Mapping[str, Container[Any]],
) -> list[str]:
    """Say what is wrong with each key, in one line a key.

    Args:
        error: what pydantic found.
        tree: what it looked at.
        model: what it compared with.
        planned: values by dotted key that have a meaning, but no code yet.
    """
    lines: dict[str, str] = {}
    for item in error.errors():
        location = tuple(str(part) for part in item["loc"][:2])
        path = ".".join(location)
        if not path:
            lines[path] = str(item.get("ctx", {}).get("error", item["msg"]))
        elif path not in lines:
            lines[path] = f"{path}: {_problem(item['type'], location, tree, model, planned)}"
    return list(lines.values())


def _problem(
    kind: str,
    location: tuple[str, ...],
    tree: Mapping[str, Any],
    model: type[BaseModel],
    planned: Mapping[str, Container[Any]],
) -> str:
    """Say what stands at a key and what is expected there."""
    path, key = ".".join(location), location[-1]
    owner, values = model, tree
    if len(location) == 2:
        owner, values = sections(model)[location[0]], tree[location[0]]
    if key not in owner.model_fields:
        place = f"a key of {location[0]}" if len(location) == 2 else "a section"
        return f"got an unknown key, expected {place}; {meant(path, keys(model))}"
    rule = _rule_of(owner, key)
    if kind == "missing":
        return f"got nothing, expected {rule}: {_meaning(owner.model_fields[key])}"
    if values[key] in ("", []):
        rule += ", and not empty"
    elif isinstance(values[key], (datetime.date, int, float)) and rule.startswith("text"):
        rule += "; put it in quotes"
    unbuilt = ", which is not built yet" if values[key] in planned.get(path, ()) else ""
    return f"got {_show(values[key])}{unbuilt}, expected {rule}"


def _show(value: object) -> str:
    """Write a value as the user's file would."""
    return textwrap.shorten(json.dumps(value, ensure_ascii=False, default=str), 200)


def _rule_of(model: type[BaseModel], key: str) -> str:
    schema = model.model_json_schema()["properties"][key]
    return "a mapping of keys" if "$ref" in schema else _rule(schema)


def _rule(schema: Mapping[str, Any]) -> str:
    """Say in words what a JSON schema accepts."""
    choices = _choices(schema)
    # An integer is a number: where both stand with the same bound, the wider rule says it all.
    narrow = {c.replace("a number", "an integer") for c in choices if c.startswith("a number")}
    wide = [choice for choice in choices if choice not in narrow]
    return " or ".join(filter(None, [", ".join(wide[:-1]), wide[-1]]))


def _choices(schema: Mapping[str, Any]) -> list[str]:
    """List the alternatives that a JSON schema accepts, each in words."""
    if "anyOf" in schema:
        return [choice for each in schema["anyOf"] for choice in _choices(each)]
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return [value if isinstance(value, str) else _show(value) for value in values]
    if "examples" in schema:
        return schema["examples"]
    kind = schema["type"]
    if kind == "array":
        if "minItems" in schema and schema["minItems"] == schema.get("maxItems"):
            return [f"a list of {schema['minItems']}, each {_rule(schema['items'])}"]
        return [f"a list of {_rule(schema['items']).removeprefix('an ')}"]
    if kind == "object":
        return [f"a mapping from text to {_rule(schema['additionalProperties'])}"]
    words = {"integer": "an integer", "number": "a number", "string": "text", "null": "null"}
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[name]}" for name, sign in signs.items() if name in schema]
    return [f"{words.get(kind, 'true or false')} {' and '.join(bounds)}".strip()]
