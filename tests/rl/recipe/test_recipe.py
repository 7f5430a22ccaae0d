from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from coupled.rl.cli import app
from coupled.rl.errors import CheckpointError, RecipeError
from coupled.rl.likelihood.objective import NOISE_WARMUP_START
from coupled.rl.recipe.read import (
    apply_overrides,
    dump_recipe,
    json_schema,
    load_recipe,
    load_sampling_recipe,
    recipe_from_json,
    validate,
)
from coupled.rl.recipe.retired import RETIRED
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.recipe.schema import LikelihoodRecipe, Recipe
from coupled.rl.run_folder.find import recipe_for
from coupled.rl.run_folder.folder import open_run_folder, read_run_recipe

RECIPES = Path(__file__).parents[3] / "recipes"
SHIPPED = sorted(RECIPES.rglob("*.yaml"))
FULL_SIZE = ("diffucoder", "stable-diffcoder")
"""Folders of recipes whose data the user brings."""
Write = Callable[..., Path]
MINIMAL: dict[str, Any] = {"stage": "rl", "model": {"path": "m"}, "data": {"path": "d.jsonl"}}


class Yaml12(yaml.SafeLoader):
    """Reads 4e-5 as a number, as editors do; PyYAML follows YAML 1.1 and takes it for text."""


Yaml12.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(values: object, name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
        return path

    return write


def refused(values: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        validate(values, source="mine.yaml")
    return str(caught.value)


# --- what ships ---------------------------------------------------------------------------------------------------


def test_recipes_ship() -> None:
    assert {p.stem for p in SHIPPED} >= {"quickstart", "ar", "adapt", "sft", "rl", "cpt", "midtrain"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_shipped_recipe_loads(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    for place in (recipe.data.path, recipe.data.eval_path):
        is_on_the_hub = place is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", place) and not Path(place).suffix
        assert place is None or is_on_the_hub or Path(place).is_file(), f"{path} names {place}"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_shipped_recipe_follows_the_schema(path: Path) -> None:
    jsonschema.validate(yaml.load(path.read_text(), Loader=Yaml12), json.loads(json_schema()))


def test_the_full_size_recipes_have_the_published_numbers() -> None:
    """And --dry-run prints them; what is not published is said to be ours in the file."""

    def resolved(name: str) -> Recipe:
        done = CliRunner().invoke(app, ["train", str(RECIPES / f"{name}.yaml"), "--dry-run"])
        assert done.exit_code == 0, done.output
        return validate(yaml.safe_load(done.output), source=name)

    cpt, sft = resolved("stable-diffcoder/cpt"), resolved("stable-diffcoder/sft")
    for recipe in (cpt, sft):
        assert (recipe.fit.objective, recipe.fit.block_length, recipe.fit.context) == ("block_diffusion", 4, 8192)
        assert (recipe.fit.clipped_noise, recipe.fit.mask_ratio) == ("paper", (0.0, 1.0))
    assert (cpt.model.shift, NOISE_WARMUP_START, cpt.fit.noise_warmup_steps > 0) == (0, 1e-3, True)
    assert (sft.fit.end_tokens, sft.fit.noise_warmup_steps) == ((1, 4), 0)
    tokens = {"adapt": 65e9, "midtrain": 16e9}
    for name, published in tokens.items():
        recipe = resolved(f"diffucoder/{name}")
        assert recipe.fit.objective == "masked_diffusion"
        assert recipe.num_steps * recipe.fit.batch_size * recipe.fit.context == pytest.approx(published, rel=1e-4)
    assert resolved("diffucoder/adapt").model.shift == 1
    tuned = resolved("diffucoder/sft")
    assert tuned.num_steps * tuned.fit.batch_size == pytest.approx(436_000, rel=1e-3)
    rl = resolved("diffucoder-7b-paper")
    assert (rl.rollout.group_size, rl.rollout.canvas, rl.rollout.temperature, rl.num_updates) == (10, 256, 1.2, 2)
    assert (rl.loss.reference, rl.loss.sync_every, rl.loss.sync_mix) == ("synced", 64, 0.6)
    assert rl.num_steps * rl.rollout.num_prompts == 21_000


def test_the_schema_file_is_the_one_of_the_code() -> None:
    path = RECIPES / "schema.json"
    assert path.is_file(), "write it with: coupled schema > recipes/schema.json"
    assert path.read_text() == json_schema()


@pytest.mark.parametrize(
    "values",
    [
        {"stage": "rl", "data": {"path": "d"}},
        MINIMAL | {"num_stepz": 3},
        MINIMAL | {"rollout": {"group_size": 1}},
        MINIMAL | {"advantage": "median"},
        MINIMAL | {"num_steps": "many"},
    ],
)
def test_the_schema_refuses_what_the_code_refuses(values: dict[str, Any]) -> None:
    refused(values)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, json.loads(json_schema()))


def test_every_field_of_the_schema_is_described() -> None:
    schema = json.loads(json_schema())
    jsonschema.Draft202012Validator.check_schema(schema)
    sections = {"model", "data", "rollout", "estimator", "loss", "optimizer", "reward", "sandbox", "evaluation"}
    for name, part in schema["$defs"].items():
        for field, about in part["properties"].items():
            is_recipe = name in ("Recipe", "LikelihoodRecipe")
            is_section = is_recipe and field in sections | {"checkpoint", "cluster", "fit"}
            assert is_section or about.get("description"), f"{name}.{field} says nothing of its unit and range"


def test_a_shipped_recipe_is_found_by_its_name() -> None:
    assert load_recipe("quickstart") == load_recipe(RECIPES / "quickstart.yaml")


def test_the_defaults_are_the_published_recipe() -> None:
    recipe = validate(MINIMAL, source="minimal")
    assert (recipe.estimator.name, recipe.estimator.num_pairs, recipe.estimator.mask_ratio) == (
        "coupled",
        1,
        (0.2, 0.8),
    )
    assert (recipe.rollout.group_size, recipe.rollout.canvas, recipe.rollout.denoising_steps) == (10, 256, 256)
    assert (recipe.rollout.temperature, recipe.rollout.order) == (1.2, "entropy")
    assert (recipe.loss.kl_beta, recipe.loss.clip_low, recipe.loss.clip_high) == (0.01, 0.5, 0.5)
    assert (recipe.optimizer.learning_rate, recipe.optimizer.max_grad_norm, recipe.num_updates) == (1e-6, 0.2, 2)
    assert [(f.name, f.weight) for f in recipe.reward.functions] == [("code", 2.0), ("format", 0.5)]


@pytest.mark.parametrize(("micro", "ranks", "size"), [(0, 1, 9), (0, 2, 5), (0, 4, 3), (4, 1, 4), (4, 2, 4)])
def test_rows_that_are_not_cut_into_micro_batches_are_one_for_each_rank(micro: int, ranks: int, size: int) -> None:
    fit = {"batch_size": 9, "micro_batch_size": micro}
    recipe = LikelihoodRecipe.model_validate(
        MINIMAL | {"stage": "sft", "fit": fit, "cluster": {"trainer_ranks": ranks}}
    )
    assert recipe.fit_micro_batch_size == size


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_stpes": 3}, "num_stpes: unknown key; did you mean 'num_steps'?"),
        ({"rollout": {"group_sise": 4}}, "rollout.group_sise: unknown key; did you mean 'group_size'?"),
        (
            {"model": {"path": "m", "adapter": {"rnk": 4}}},
            "model.adapter.rnk: unknown key; did you mean 'rank'?",
        ),
        (
            {"reward": {"functions": [{"name": "code", "wieght": 1}]}},
            "reward.functions.0.wieght: unknown key; did you mean 'weight'?",
        ),
        ({"zzz": 1}, "zzz: unknown key; known: accuracy_range, advantage, checkpoint,"),
        ({"rollout": {"group_size": 1}}, "rollout.group_size: Input should be greater than or equal to 2; got 1"),
        ({"rollout": {"temperature": 0}}, "rollout.temperature: Input should be greater than 0; got 0"),
        (
            {"optimizer": {"learning_rate": -1e-3}},
            "optimizer.learning_rate: Input should be greater than 0; got -0.001",
        ),
        ({"advantage": "median"}, "advantage: Input should be 'mean', 'loo', 'z' or 'softmax'; got 'median'"),
        ({"num_steps": "many"}, "got 'many'"),
        (
            {"estimator": {"mask_ratio": [0.2, 0.9]}},
            "lo + hi = 1, so that t and 1 - t have the same distribution; got (0.2, 0.9)",
        ),
        ({"estimator": {"mask_ratio": [0.8, 0.2]}}, "got (0.8, 0.2)"),
        ({"estimator": {"mask_ratio": [0.0, 1.0]}}, "inside (0, 1)"),
        (
            {"estimator": {"name": "full_mask", "num_pairs": 2}},
            "estimator: num_pairs=2 has no effect with name=full_mask: it is read by coupled, decoupled, random_mask, "
            "espo. Leave it out, or set it to its default (num_pairs=1), or choose another estimator",
        ),
        ({"estimator": {"name": "gdpo", "mask_ratio": [0.3, 0.7]}}, "mask_ratio=[0.3, 0.7] has no effect"),
        ({"estimator": {"num_nodes": 5}}, "num_nodes=5 has no effect with name=coupled: it is read by gdpo."),
        (
            {"loss": {"objective": "likelihood", "dual_clip": 3}},
            "loss: dual_clip=3.0 has no effect with objective=likelihood, which has no ratio. Leave it out, or set it "
            "to its default (dual_clip=null), or use objective=clipped",
        ),
        ({"loss": {"objective": "likelihood", "ratio": "sequence"}}, "ratio=sequence has no effect"),
        ({"cluster": {"trainer_workers": "ray"}}, "trainer_workers=ray has no effect with trainer_ranks=1"),
        (
            {"rollout": {"canvas": 8, "denoising_steps": 9}},
            "rollout.denoising_steps (9) must not exceed rollout.canvas (8)",
        ),
        (
            {"num_steps": 3, "optimizer": {"warmup_steps": 4}},
            "optimizer.warmup_steps (4) must not exceed num_steps (3)",
        ),
        ({"reward": {"functions": []}}, "reward.functions"),
        ({"reward": {"functions": [{"weight": 1.0}]}}, "either name or path; got name=None, path=None"),
        ({"reward": {"functions": [{"name": "code", "path": "x.py:f"}]}}, "either name or path; got name='code'"),
        ({"name": "a/b"}, "name: String should match pattern"),
        ({"model": {}}, "model.path: required but absent"),
        ({"model": None}, "model: "),
        ({"rollout": 3}, "rollout: "),
        ({1: 2}, "1: "),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_broken_rule_is_named_with_the_value_and_the_remedy(values: dict[str, Any], message: str) -> None:
    text = refused(MINIMAL | values)
    assert text.startswith("mine.yaml breaks 1 rule(s):\n  ")
    assert message in text


def test_all_broken_rules_are_told_at_once() -> None:
    text = refused(MINIMAL | {"num_steps": 0, "seed": -1, "stage": "train"})
    assert text.startswith("mine.yaml breaks 3 rule(s):")
    assert [line.split(":")[0].strip() for line in text.splitlines()[1:]] == ["stage", "seed", "num_steps"]


@pytest.mark.parametrize("field", ["optimizer.learning_rate", "rollout.temperature", "loss.kl_beta"])
@pytest.mark.parametrize("value", [".nan", ".inf"])
def test_numbers_that_are_not_finite_are_refused(field: str, value: str) -> None:
    with pytest.raises(RecipeError, match=field):
        apply_overrides(validate(MINIMAL, source="minimal"), (f"{field}={value}",))


def test_a_reward_weight_that_is_not_a_number_is_refused() -> None:
    text = refused(MINIMAL | {"reward": {"functions": [{"name": "code", "weight": float("nan")}]}})
    assert "reward.functions.0.weight" in text


def test_adapters_on_random_weights_are_refused() -> None:
    """An adapter checkpoint names its base; weights that were never saved have no name."""
    text = refused(MINIMAL | {"model": {"path": "m", "init": "random", "adapter": {}}})
    assert "adapter" in text


def test_a_missing_file_names_the_nearest_recipe(write: Write, tmp_path: Path) -> None:
    write(MINIMAL)
    with pytest.raises(RecipeError, match=r"no recipe at .*mine2\.yaml; did you mean 'mine\.yaml'\?"):
        load_recipe(tmp_path / "mine2.yaml")
    with pytest.raises(RecipeError, match=r"no recipe at quickstrat; did you mean 'quickstart"):
        load_recipe("quickstrat")


def test_a_file_that_is_not_yaml_is_refused(write: Write) -> None:
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(write("stage: [rl\n"))


@pytest.mark.parametrize("text", ["- a\n- b\n", "rl", "", "3"])
def test_a_file_that_is_not_a_mapping_is_refused(write: Write, text: str) -> None:
    with pytest.raises(RecipeError, match="must hold a mapping of recipe fields; got "):
        load_recipe(write(text))


@pytest.mark.parametrize("reward", ["code", ["code"], {"functions": 5}, {"functions": ["code"]}])
def test_a_reward_section_of_the_wrong_shape_is_refused(write: Write, reward: object) -> None:
    with pytest.raises(RecipeError, match="reward"):
        load_recipe(write(MINIMAL | {"reward": reward}))


# --- paths --------------------------------------------------------------------------------------------------------


def test_paths_are_meant_from_the_recipe_s_folder(write: Write, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "tasks.jsonl").touch()
    (tmp_path / "held.jsonl").touch()
    (tmp_path / "my.py").touch()
    recipe = load_recipe(
        write(
            {
                "stage": "rl",
                "model": {"path": "model"},
                "data": {"path": "tasks.jsonl", "eval_path": "./held.jsonl"},
                "reward": {"functions": [{"path": "my.py:score"}]},
            }
        )
    )
    assert recipe.model.path == str(tmp_path / "model")
    assert recipe.data.path == str(tmp_path / "tasks.jsonl")
    assert recipe.data.eval_path == str(tmp_path / "held.jsonl")
    assert recipe.reward.functions[0].path == str(tmp_path / "my.py") + ":score"
    assert recipe.name == "mine"


def test_hub_names_and_paths_of_overrides_stay_as_they_are(write: Write, tmp_path: Path) -> None:
    (tmp_path / "tasks.jsonl").touch()
    path = write(MINIMAL | {"model": {"path": "apple/DiffuCoder-7B-Instruct"}})
    recipe = load_recipe(path, ("data.path=tasks.jsonl",))
    assert recipe.model.path == "apple/DiffuCoder-7B-Instruct"
    assert recipe.data.path == "tasks.jsonl"


# --- overrides ----------------------------------------------------------------------------------------------------


def test_overrides_are_parsed_as_yaml(write: Write) -> None:
    recipe = load_recipe(
        write(MINIMAL),
        (
            "num_steps=7",
            "optimizer.learning_rate=4e-5",
            "estimator.mask_ratio=[0.3, 0.7]",
            "evaluation.has_greedy=false",
            "data.columns={prompt: text}",
            "model.adapter.rank=8",
            "name=other",
            "data.eval_path=a=b.jsonl",
            "loss.clip_low = 0.25",
        ),
    )
    assert recipe.num_steps == 7
    assert recipe.optimizer.learning_rate == 4e-5
    assert recipe.estimator.mask_ratio == (0.3, 0.7)
    assert recipe.evaluation.has_greedy is False
    assert recipe.data.columns == {"prompt": "text"}
    assert recipe.model.adapter is not None
    assert recipe.model.adapter.rank == 8
    assert recipe.name == "other"
    assert recipe.data.eval_path == "a=b.jsonl"
    assert recipe.loss.clip_low == 0.25


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_steps", r"key=value; got 'num_steps'"),
        ("num_steps.x=3", r"num_steps\.x: num_steps is a value, not a section"),
        ("rollout.group_sise=3", "did you mean 'group_size'"),
        ("rollot.group_size=3", "did you mean 'rollout'"),
        ("rollout.group_size=1", "greater than or equal to 2; got 1"),
        ("rollout=3", "rollout"),
        ("estimator.mask_ratio=[0.2", "mask_ratio"),
    ],
)
def test_a_bad_override_is_refused(write: Write, override: str, message: str) -> None:
    path = write(MINIMAL | {"num_steps": 5})
    with pytest.raises(RecipeError, match=message):
        load_recipe(path, (override,))


def test_a_section_that_is_absent_so_far_can_be_overridden() -> None:
    """A resolved recipe says `adapter: null`."""
    recipe = apply_overrides(validate(MINIMAL, source="minimal"), ("model.adapter.rank=8",))
    assert recipe.model.adapter is not None
    assert recipe.model.adapter.rank == 8


def test_overrides_of_a_recipe_leave_the_rest_alone() -> None:
    recipe = validate(MINIMAL, source="minimal")
    changed = apply_overrides(recipe, ("rollout.temperature=0.8",))
    assert changed.rollout.temperature == 0.8
    assert changed.model_copy(update={"rollout": recipe.rollout}) == recipe


# --- round trip ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_dumped_recipe_is_the_same_recipe(path: Path) -> None:
    changes = ["model.init=checkpoint", "model.adapter={rank: 4}"]
    if load_recipe(path).stage == "rl":
        changes.append("reward.functions=[{path: 'x.py:f', weight: 0.1}]")
    recipe = load_recipe(path, tuple(changes))
    assert validate(yaml.safe_load(dump_recipe(recipe)), source="dumped") == recipe


def test_a_recipe_cannot_be_changed() -> None:
    recipe = validate(MINIMAL, source="minimal")
    with pytest.raises(ValueError, match="frozen"):
        recipe.num_steps = 3  # type: ignore[misc]
    assert isinstance(recipe, Recipe)


def test_an_accuracy_filter_needs_tests_and_a_range() -> None:
    own = {"functions": [{"name": "format"}]}
    assert "group_filter=accuracy needs hidden tests" in refused(MINIMAL | {"group_filter": "accuracy", "reward": own})
    assert validate(MINIMAL | {"group_filter": "zero_std", "reward": own}, source="x").group_filter == "zero_std"
    text = refused(MINIMAL | {"group_filter": "accuracy", "accuracy_range": [0.5, 0.5]})
    assert "accuracy_range must be (lo, hi) with lo < hi; got (0.5, 0.5); for example [0, 1]" in text


def test_a_dual_clip_is_above_the_ratio_of_the_policy_with_itself() -> None:
    assert "loss.dual_clip" in refused(MINIMAL | {"loss": {"dual_clip": 1.0}})
    assert validate(MINIMAL | {"loss": {"dual_clip": 3}}, source="x").loss.dual_clip == 3


# --- stages -------------------------------------------------------------------------------------------------------

RL_ALONE = {"rollout", "estimator", "loss", "reward", "sandbox", "evaluation", "num_updates", "advantage"}
RL_ALONE |= {"group_filter", "accuracy_range"}
SFT: dict[str, Any] = MINIMAL | {"stage": "sft"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_resolved_recipe_has_the_sections_of_its_stage_alone(path: Path) -> None:
    recipe = load_recipe(path)
    fields = set(yaml.safe_load(dump_recipe(recipe)))
    others = RL_ALONE if recipe.stage != "rl" else {"fit"}
    assert not fields & others
    assert fields >= ({"fit"} if recipe.stage != "rl" else RL_ALONE)


def test_the_schema_is_a_union_by_stage() -> None:
    schema = json.loads(json_schema())
    properties = {name: schema["$defs"][name]["properties"].keys() for name in ("Recipe", "LikelihoodRecipe")}
    assert properties["Recipe"] >= RL_ALONE
    assert not RL_ALONE & properties["LikelihoodRecipe"]
    assert "fit" in properties["LikelihoodRecipe"] - properties["Recipe"]
    for values in (MINIMAL | {"fit": {}}, SFT | {"rollout": {}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(values, schema)
    for values in (MINIMAL, SFT, SFT | {"fit": {"canvas": 8}}, MINIMAL | {"rollout": {"canvas": 8}}):
        jsonschema.validate(values, schema)


@pytest.mark.parametrize("field", sorted(RL_ALONE))
@pytest.mark.parametrize("stage", ["sft", "pretrain"])
def test_a_field_of_rl_in_another_stage_is_refused_with_its_home(stage: str, field: str) -> None:
    value = dump_recipe(validate(MINIMAL, source="x"))
    text = refused(MINIMAL | {"stage": stage, field: yaml.safe_load(value)[field]})
    assert text.splitlines()[1:] == [
        f"  {field}: a recipe of stage {stage} has no such field; it belongs to rl. Leave it out"
    ]


def test_a_field_of_likelihood_training_in_an_rl_recipe_is_refused_with_its_home(write: Write) -> None:
    line = "fit: a recipe of stage rl has no such field; it belongs to sft and pretrain. Leave it out"
    assert line in refused(MINIMAL | {"fit": {"canvas": 64}})
    with pytest.raises(RecipeError, match="fit: a recipe of stage rl has no such field"):
        load_recipe(write(MINIMAL), ("fit.canvas=64",))
    text = refused(MINIMAL | {"fit": {}, "num_steps": 0})
    assert text.startswith("mine.yaml breaks 2 rule(s):")


def as_of_the_last_release(values: dict[str, Any]) -> dict[str, Any]:
    """A saved recipe with the sections of all stages, and all fields that are gone, at their defaults."""
    recipes = [yaml.safe_load(dump_recipe(validate(v, source="x"))) for v in (MINIMAL, SFT)]
    found = recipes[0] | recipes[1] | yaml.safe_load(dump_recipe(validate(values, source="x")))
    found["rollout"]["monitor"] = {"every": 0, "on_mismatch": "warn"}
    for name in ("monitor_every", "on_mismatch"):
        del found["rollout"][name]
    found["cluster"]["max_mismatch"] = found["cluster"].pop("max_policy_drift")
    for place, old in RETIRED.items():
        *sections, name = place.split(".")
        part = found
        for section in sections:
            part = part[section]
        part.setdefault(name, old.default)
    return found


@pytest.mark.parametrize("values", [MINIMAL, SFT], ids=["rl", "sft"])
def test_a_run_of_the_last_release_is_resumed(tmp_path: Path, values: dict[str, Any]) -> None:
    recipe = validate(values | {"output_dir": str(tmp_path), "name": "old"}, source="x")
    folder = open_run_folder(recipe).path
    saved = as_of_the_last_release(values | {"output_dir": str(tmp_path), "name": "old"})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(saved, sort_keys=False))
    assert read_run_recipe(folder) == recipe
    assert open_run_folder(recipe, resume="auto").path == folder
    refused(saved)
    # Other sections of the other stage change nothing either.
    other = "fit" if values["stage"] == "rl" else "rollout"
    (folder / "recipe.yaml").write_text(yaml.safe_dump(saved | {other: saved[other] | {"canvas": 64}}))
    assert open_run_folder(recipe, resume=str(folder)).path == folder
    with pytest.raises(CheckpointError, match="made with another recipe: num_steps differ"):
        open_run_folder(apply_overrides(recipe, ("num_steps=7",)), resume="auto")


def test_a_checkpoint_of_another_stage_is_sampled_as_the_rl_stage_would(write: Write) -> None:
    path = write(SFT | {"model": {"path": "somewhere"}, "seed": 3, "fit": {"canvas": 8}})
    recipe = load_sampling_recipe(path, ("rollout.canvas=64", "rollout.denoising_steps=32"))
    assert (recipe.stage, recipe.model.path, recipe.seed) == ("rl", "somewhere", 3)
    assert (recipe.rollout.canvas, recipe.rollout.denoising_steps, recipe.rollout.temperature) == (64, 32, 1.2)


def test_the_recipe_of_an_old_run_is_translated_before_settings_are_applied(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_000001").mkdir(parents=True)
    saved = as_of_the_last_release(SFT)
    saved["rollout"]["canvas"] = 64
    saved["rollout"]["denoising_steps"] = 32
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(saved))
    recipe = recipe_for(tmp_path / "checkpoints" / "step_000001", None, ("rollout.temperature=0.5",))
    assert (recipe.stage, recipe.rollout.canvas, recipe.rollout.temperature) == ("rl", 64, 0.5)
    with pytest.raises(RecipeError, match=r"rollout\.monitor\.every: no longer a field: write rollout\.monitor_every"):
        recipe_for(tmp_path / "checkpoints" / "step_000001", None, ("rollout.monitor.every=5",))


def test_a_run_folder_whose_recipe_is_no_mapping_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("- rl\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml must hold a mapping of recipe fields; got list"):
        read_run_recipe(tmp_path)


@pytest.mark.parametrize("values", [MINIMAL, SFT], ids=["rl", "sft"])
def test_processes_of_a_run_read_the_recipe_of_its_stage(values: dict[str, Any]) -> None:
    recipe = validate(values, source="x")
    assert recipe_from_json(recipe.model_dump_json()) == recipe
    assert type(recipe) is (Recipe if values["stage"] == "rl" else LikelihoodRecipe)


def test_the_names_of_the_python_door_are_found() -> None:
    import coupled.rl

    assert coupled.rl.Recipe is Recipe
    assert coupled.rl.load_recipe is load_recipe


# --- fields that are gone -----------------------------------------------------------------------------------------

OTHER_VALUES: dict[str, Any] = {
    "model.has_cuda_graphs": True,
    "rollout.monitor.every": 3,
    "rollout.monitor.on_mismatch": "stop",
    "rollout.monitor.num_prompts": 2,
    "rollout.monitor.tolerance": 0.5,
    "optimizer.schedule": "constant",
    "cluster.max_mismatch": 0.2,
    "cluster.weights": "file",
    "cluster.dashboard": True,
    "fit.noise_warmup_start": 0.1,
}


def with_field(place: str, value: Any) -> dict[str, Any]:
    *sections, name = place.split(".")
    base = SFT if place.startswith("fit.") else MINIMAL
    found: dict[str, Any] = json.loads(json.dumps(base))
    part = found
    for section in sections:
        part = part.setdefault(section, {})
    part[name] = value
    return found


@pytest.mark.parametrize("place", RETIRED)
def test_a_field_that_is_gone_is_refused_with_its_remedy(place: str) -> None:
    for value in (RETIRED[place].default, OTHER_VALUES[place]):
        text = refused(with_field(place, value))
        assert text.splitlines()[1:] == [f"  {place}: no longer a field: {RETIRED[place].remedy}"]


@pytest.mark.parametrize("place", RETIRED)
def test_a_saved_field_that_is_gone_is_dropped_where_the_run_stays_the_same(place: str) -> None:
    old = RETIRED[place]
    base = validate(SFT if place.startswith("fit.") else MINIMAL, source="x")
    if not old.renamed:
        assert validate(with_field(place, old.default), source="x", is_saved=True) == base
    changed = with_field(place, OTHER_VALUES[place])
    if old.renamed:
        section, name = old.renamed.split(".")
        found = validate(changed, source="x", is_saved=True)
        assert getattr(getattr(found, section), name) == OTHER_VALUES[place]
    elif place == "optimizer.schedule":
        assert validate(changed, source="x", is_saved=True).optimizer.final_fraction == 1.0
    elif not old.has_effect:
        assert validate(changed, source="x", is_saved=True) == base
    else:
        with pytest.raises(RecipeError, match=rf"{place}: no longer a field, and the run was made with"):
            validate(changed, source="x", is_saved=True)


def test_what_replaces_a_field_that_is_gone_exists() -> None:
    fields = {
        f"{section}.{name}"
        for recipe in (Recipe, LikelihoodRecipe)
        for section, about in recipe.model_fields.items()
        if hasattr(about.annotation, "model_fields")
        for name in about.annotation.model_fields
    }
    for place, old in RETIRED.items():
        assert place not in fields
        assert not old.renamed or (old.renamed in fields and old.renamed in old.remedy)
        assert all(field in fields for _, field, _ in old.translated)


# --- the sampler --------------------------------------------------------------------------------------------------


def test_a_rollout_section_is_a_sampler_and_more() -> None:
    rollout = load_recipe("quickstart", ("rollout.preset=fast", "rollout.top_k=7")).rollout
    sampler = rollout.sampler
    assert type(sampler) is Sampler
    assert sampler.model_dump() == {name: getattr(rollout, name) for name in Sampler.model_fields}
    assert (sampler.hash, sampler.exact().entropy_bound) == (rollout.hash, None)
    assert sampler.changed(temperature=0.0).temperature == 0
    with pytest.raises(ValueError, match="greater than 0"):
        rollout.changed(temperature=0.0)


def test_the_hash_of_a_sampler_is_the_one_of_earlier_releases() -> None:
    """Rows of logged rollouts name it."""
    assert Sampler(canvas=36, denoising_steps=18, temperature=1.0).hash == "5fd00b679a02"
    assert (
        Sampler(canvas=256, denoising_steps=256, temperature=1.2, entropy_bound=0.1, end_fill=0.99).hash
        == "a6dc8e6b1761"
    )
