"""Reading, overriding, validating and writing recipes. Every complaint names the key, the rule and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from coupled.rl.errors import RecipeError, nearest
from coupled.rl.recipe.schema import OF_PRESETS, Recipe, Reward

PATH_FIELDS = (("model", "path"), ("data", "path"), ("data", "eval_path"))


def load_recipe(path: Path | str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe file, apply `key=value` overrides, and validate.

    Relative paths in the file are meant from the file's folder; those in overrides from the working folder.

    Raises:
        RecipeError: the file is missing or not YAML, a key is unknown, or a value breaks a rule.
    """
    file = Path(path)
    if not file.is_file():
        shipped = Path(__file__).parents[2] / "recipes"
        if (shipped / f"{path}.yaml").is_file():
            file = shipped / f"{path}.yaml"
        else:
            beside = list(file.parent.glob("*.yaml")) if file.parent.is_dir() else []
            candidates = {p.stem if not file.suffix else p.name for p in beside or shipped.glob("*.yaml")}
            raise RecipeError(f"no recipe at {path}; {nearest(file.name, candidates)}")
    try:
        values = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise RecipeError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{file} must hold a mapping of recipe fields; got {type(values).__name__}")
    values.setdefault("name", file.stem)
    for section, key in PATH_FIELDS:
        _resolve(values, section, key, file.parent)
    reward = values.get("reward")
    functions = reward.get("functions") if isinstance(reward, dict) else None
    for function in functions if isinstance(functions, list) else []:
        if isinstance(function, dict) and isinstance(function.get("path"), str):
            function["path"] = _from(file.parent, function["path"])
    for override in overrides:
        _apply_override(values, override)
    return validate(values, source=str(file))


def validate(values: dict[str, Any], source: str) -> Recipe:
    """Build a Recipe of plain values, turning every complaint into one readable RecipeError."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        items = error.errors()
        places = [item["loc"] for item in items]
        # A part that failed also makes its list too short; only the failure itself is of use.
        lines = [
            _complaint(item)
            for item in items
            if item["type"] != "too_short"
            or not any(p != item["loc"] and p[: len(item["loc"])] == item["loc"] for p in places)
        ]
        raise RecipeError(f"{source} breaks {len(lines)} rule(s):\n  " + "\n  ".join(lines)) from error


def apply_overrides(recipe: Recipe, overrides: tuple[str, ...]) -> Recipe:
    """The recipe with `key=value` settings changed.

    Raises:
        RecipeError: an unknown key or a value that breaks a rule.
    """
    values = recipe.model_dump(mode="json")
    for override in overrides:
        _apply_override(values, override)
    return validate(values, source="the recipe with its overrides")


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: what `--dry-run` prints and the run folder keeps."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def json_schema() -> str:
    """JSON schema of recipe files, for editors: `recipes/schema.json`."""
    schema = Recipe.model_json_schema()
    schema["title"] = "coupled recipe"
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


def _from(folder: Path, value: str) -> str:
    path, colon, function = value.partition(":")
    candidate = folder / path
    return str(candidate.resolve()) + colon + function if candidate.exists() else value


def _resolve(values: dict[str, Any], section: str, key: str, folder: Path) -> None:
    part = values.get(section)
    if isinstance(part, dict) and isinstance(part.get(key), str):
        part[key] = _from(folder, part[key])


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"an override is written key=value; got {override!r}, for example num_steps=10")
    *parents, last = key.strip().split(".")
    node = values
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise RecipeError(f"{key}: {parent} is a value, not a section; it has no fields to override")
    if key.strip() == "rollout.preset":
        # A saved recipe names every field, and those would win over the preset that is asked for now.
        for field in OF_PRESETS:
            node.pop(field, None)
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{key}: the value {text!r} is not valid YAML: {error}") from error


def _complaint(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _fields_at(item["loc"][:-1])
        return f"{where}: unknown key; {nearest(str(item['loc'][-1]), known)}"
    if item["type"] == "missing":
        return f"{where}: required but absent"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {message}; got {item['input']!r}"


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    section: Any = Recipe
    for part in location:
        if isinstance(part, int):
            section = Reward
            continue
        annotation = section.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        found = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not found:
            return []
        section = found[0]
    return list(section.model_fields)
