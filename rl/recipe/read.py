"""Reading, overriding, validating and writing recipes. Every error names the key, the rule and the remedy."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from coupled.rl.errors import RecipeError, nearest
from coupled.rl.recipe.judging import Reward
from coupled.rl.recipe.retired import without_retired
from coupled.rl.recipe.rollout import OF_PRESETS
from coupled.rl.recipe.schema import STAGES, AnyRecipe, LikelihoodRecipe, Recipe, RunRecipe, recipe_class

PATH_FIELDS = (("model", "path"), ("data", "path"), ("data", "eval_path"))


def load_recipe(path: Path | str, overrides: tuple[str, ...] = ()) -> AnyRecipe:
    """Read a recipe file, apply `key=value` overrides, and validate.

    Paths in the file are relative to the file's folder, paths in overrides to the working folder.

    Raises:
        RecipeError: the file is missing or not YAML, a key is unknown, or a value breaks a rule.
    """
    file, values = _read_file(path)
    return validate(_overridden(values, overrides), source=str(file))


def load_sampling_recipe(path: Path | str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Like `load_recipe`, for sampling from a checkpoint: see `sampling_recipe`."""
    file, values = _read_file(path)
    return sampling_recipe(values, overrides, source=str(file))


def sampling_recipe(values: Any, overrides: tuple[str, ...], source: str, *, is_saved: bool = False) -> Recipe:
    """The RL recipe with which a checkpoint is sampled, evaluated and analysed.

    A recipe of another stage gives the sections that both stages have; the other sections have their defaults.

    Raises:
        RecipeError: see `validate`.
    """
    if is_saved:  # first translated, so that settings of the user name today's fields
        values, lines = without_retired(_mapping(values, source), is_saved=True)
        if lines:
            raise _refusal(source, lines)
    if values.get("stage") in STAGES:
        values = {key: value for key, value in values.items() if key not in _OTHER["rl"]} | {"stage": "rl"}
    found = validate(_overridden(values, overrides), source)
    assert isinstance(found, Recipe), "the stage is rl"
    return found


def validate(values: Any, source: str, *, is_saved: bool = False) -> AnyRecipe:
    """Build a recipe from plain values; all broken rules are reported in one RecipeError.

    Args:
        is_saved: the values come from a run folder, perhaps of an earlier release, where recipes named the sections of
            all stages and fields that no longer exist. These are dropped where the run computes the same without them.

    Raises:
        RecipeError: a key is unknown or of another stage, or a value breaks a rule.
    """
    values, lines = without_retired(_mapping(values, source), is_saved=is_saved)
    stage = values.get("stage")
    for key in [key for key in values if key in _OTHER.get(str(stage), ())]:
        del values[key]
        if not is_saved:
            homes = "rl" if stage != "rl" else "sft and pretrain"
            lines.append(f"{key}: a recipe of stage {stage} has no such field; it belongs to {homes}. Leave it out")
    try:
        recipe = recipe_class(stage).model_validate(values)
    except ValidationError as error:
        raise _refusal(source, lines + _complaints(error, recipe_class(stage))) from error
    if lines:
        raise _refusal(source, lines)
    return recipe


def recipe_from_json(text: str | bytes) -> AnyRecipe:
    """The recipe that `recipe.model_dump_json()` wrote, for processes of the same run."""
    values = json.loads(text)
    return recipe_class(values["stage"]).model_validate(values)


AnyStage = TypeVar("AnyStage", bound=RunRecipe)


def apply_overrides(recipe: AnyStage, overrides: tuple[str, ...]) -> AnyStage:
    """The recipe with `key=value` settings changed.

    Raises:
        RecipeError: an unknown key or a value that breaks a rule.
    """
    values = _overridden(recipe.model_dump(mode="json"), overrides)
    found = validate(values, source="the recipe with its overrides")
    assert isinstance(found, type(recipe)), "the sections of another stage are refused"
    return found


def dump_recipe(recipe: RunRecipe) -> str:
    """The resolved recipe as YAML, for `--dry-run` and the run folder."""
    values = recipe.model_dump(mode="json")
    return yaml.safe_dump({"stage": values.pop("stage"), **values}, sort_keys=False)


def json_schema() -> str:
    """JSON schema of recipe files, for editors: `recipes/schema.json`. A union by `stage`."""
    union: Any = Annotated[AnyRecipe, Field(discriminator="stage")]
    schema = TypeAdapter(union).json_schema()
    del schema["discriminator"]  # an OpenAPI keyword; editors use the stage that each part requires
    schema["title"] = "coupled recipe"
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


_OTHER = {
    "rl": LikelihoodRecipe.model_fields.keys() - Recipe.model_fields.keys(),
    "sft": Recipe.model_fields.keys() - LikelihoodRecipe.model_fields.keys(),
    "pretrain": Recipe.model_fields.keys() - LikelihoodRecipe.model_fields.keys(),
}
"""Stage → top-level fields that only the other stages have."""


def _read_file(path: Path | str) -> tuple[Path, dict[str, Any]]:
    """Path and values of a recipe file, given by path or by the name of a shipped recipe. Paths in it are resolved."""
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
    _mapping(values, str(file)).setdefault("name", file.stem)
    for section, key in PATH_FIELDS:
        _resolve(values, section, key, file.parent)
    reward = values.get("reward")
    functions = reward.get("functions") if isinstance(reward, dict) else None
    for function in functions if isinstance(functions, list) else []:
        if isinstance(function, dict) and isinstance(function.get("path"), str):
            function["path"] = _from(file.parent, function["path"])
    return file, values


def _mapping(values: Any, source: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise RecipeError(f"{source} must hold a mapping of recipe fields; got {type(values).__name__}")
    return values


def _overridden(values: dict[str, Any], overrides: tuple[str, ...]) -> dict[str, Any]:
    values = copy.deepcopy(values)
    for override in overrides:
        _apply_override(values, override)
    return values


def _refusal(source: str, lines: list[str]) -> RecipeError:
    return RecipeError(f"{source} breaks {len(lines)} rule(s):\n  " + "\n  ".join(lines))


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
        # A saved recipe names every field, and they would override the requested preset.
        for field in OF_PRESETS:
            node.pop(field, None)
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{key}: the value {text!r} is not valid YAML: {error}") from error


def _complaints(error: ValidationError, recipe: type[RunRecipe]) -> list[str]:
    items = sorted(
        error.errors(), key=lambda item: item["loc"] != ("stage",)
    )  # the stage decides which fields are known
    places = [item["loc"] for item in items]
    # An invalid item also makes its list too short; only the error of the item is reported.
    return [
        _complaint(item, recipe)
        for item in items
        if item["type"] != "too_short"
        or not any(p != item["loc"] and p[: len(item["loc"])] == item["loc"] for p in places)
    ]


def _complaint(item: Any, recipe: type[RunRecipe]) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _fields_at(item["loc"][:-1], recipe)
        return f"{where}: unknown key; {nearest(str(item['loc'][-1]), known)}"
    if item["type"] == "missing":
        return f"{where}: required but absent"
    if item["loc"] == ("stage",):
        return f"stage: Input should be {', '.join(map(repr, STAGES[:-1]))} or {STAGES[-1]!r}; got {item['input']!r}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {message}; got {item['input']!r}"


def _fields_at(location: tuple[Any, ...], recipe: type[RunRecipe]) -> list[str]:
    section: Any = recipe
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
