"""The JSON schema of plans, made from the tables of passes and exporters, for editors that complete and check YAML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from compress.data import DataOptions
from compress.plan.reader import DEFAULT_EXPORT, Tables
from compress.plan.steps import FILLED, GRADUAL, Stages
from compress.target import Target
from compress.tasks import TASKS
from compress.verdict import KeepIf

ID = {"type": "string", "pattern": r"^\w[\w.-]*$", "description": "a name that a later step's `after` can give"}
AFTER = {
    "description": "the steps it follows, by id or name; [] is the dense model, without it the step above",
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
}


def schema(tables: tuple[Any, Any]) -> dict[str, Any]:
    """The schema of a plan; each pass is a choice of its own, so that an editor knows the options of each."""
    known = Tables(*tables)
    shared: dict[str, Any] = {}
    text = {"type": "string"}
    properties = {
        "model": {**text, "description": "a folder, a hub name, or package:NAME/FOLDER in an installed package"},
        "task": {"enum": ["auto", *TASKS], "default": "auto"},
        "data": _options("data", DataOptions, shared),
        "target": _options("target", Target, shared),
        "passes": _passes(known.passes, shared),
        "export": _list("export", known.exporters, {}, shared) | {"default": DEFAULT_EXPORT},
        "out": {**text, "description": "the folder that results are written to"},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "hf-compress plan",
        "type": "object",
        "additionalProperties": False,
        "required": ["passes"],
        "properties": properties,
        "$defs": shared,
    }


def _passes(table: Mapping[str, type[BaseModel]], shared: dict[str, Any]) -> Any:
    """The list of passes, a gradual step among them, whose own passes are given no speed-ups."""
    beside = {"id": ID, "after": AFTER}
    passes = _list("passes", table, {**beside, "keep_if": _options("keep_if", KeepIf, shared)}, shared)
    stages = _options(GRADUAL, Stages, shared)
    shared[GRADUAL]["properties"]["passes"] |= _list(f"{GRADUAL}.passes", table, {}, shared, filled=FILLED)
    passes["items"]["anyOf"].append(_form(GRADUAL, stages, beside))
    return {**passes, "minItems": 1}


def _list(
    key: str, table: Mapping[str, type[BaseModel]], beside: dict[str, Any], shared: dict[str, Any], filled: str = ""
) -> Any:
    """A list whose items are bare names, or one name with its options and what may stand beside it.

    The option `filled` is none to be given.
    """
    bare = [
        name
        for name, cls in table.items()
        if not any(field.is_required() for option, field in cls.model_fields.items() if option != filled)
    ]
    forms: list[dict[str, Any]] = [{"enum": bare}] if bare else []
    for name, cls in table.items():
        options = _options(f"{key}.{name}", cls, shared, filled)
        forms.append(_form(name, {"anyOf": [options, {"type": "null"}]} if name in bare else options, beside))
    return {"type": "array", "items": {"anyOf": forms}}


def _form(name: str, value: Any, beside: dict[str, Any]) -> dict[str, Any]:
    """One name with its options, and what may stand beside it."""
    return {
        "type": "object",
        "required": [name],
        "properties": {name: value, **beside},
        "additionalProperties": False,
    }


def _options(name: str, cls: type[BaseModel], shared: dict[str, Any], filled: str = "") -> dict[str, Any]:
    """A reference to the schema of an options class, which is put into `shared` with all that it refers to."""
    made = cls.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
    shared.update({f"{name}.{inner}": value for inner, value in made.pop("$defs", {}).items()})
    if made["properties"].pop(filled, None):
        made["required"] = [option for option in made.get("required", ()) if option != filled]
    shared[name] = made
    return {"$ref": f"#/$defs/{name}"}
