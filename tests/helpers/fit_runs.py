"""Short supervised runs, and their metrics without times."""

from __future__ import annotations

import json
from pathlib import Path

from coupled.rl.model.policy import Policy
from coupled.rl.model.weights import save_policy
from coupled.rl.monitoring.metrics import DETERMINISTIC_EXCEPT
from coupled.rl.recipe.schema import LikelihoodRecipe
from coupled.rl.run_folder.folder import read_rows
from helpers.toys import make_likelihood_recipe


def sft_recipe(
    tmp_path: Path, policy: Policy, fit: dict[str, object] | None = None, window: int = 0, **fields: object
) -> LikelihoodRecipe:
    if not (tmp_path / "base").exists():
        save_policy(policy, tmp_path / "base")
        rows = [{"prompt": f"write {c}", "solution": f"{c * 3} {i}"} for i, c in enumerate("abcdefgh")]
        rows.insert(3, {"prompt": "write", "solution": ""})
        (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_likelihood_recipe(
        stage="sft",
        num_steps=4,
        output_dir=str(tmp_path / "runs"),
        model={"path": str(tmp_path / "base")},
        data={"path": str(tmp_path / "tasks.jsonl"), "window": window},
        optimizer={"learning_rate": 1e-2, "max_grad_norm": 1.0},
        fit={"batch_size": 4, "canvas": 24, **(fit or {})},
        **fields,
    )


def numbers(run: Path) -> list[dict[str, object]]:
    """The metrics of a run that may not depend on the machine."""
    return [
        {name: value for name, value in row.items() if not name.startswith(DETERMINISTIC_EXCEPT)}
        for row in read_rows(run / "metrics.jsonl")
    ]
