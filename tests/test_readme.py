"""What the README promises is what is there."""

from __future__ import annotations

import re
from pathlib import Path

from typer.testing import CliRunner

from coupled.rl.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_ci_runs_the_test_command_of_the_readme_word_for_word() -> None:
    command = (ROOT / ".ci" / "run").read_text().strip().splitlines()[-1]
    assert command.startswith("python3 -m venv")
    assert f"\n{command}\n" in README


def test_every_file_that_the_readme_and_the_docs_link_to_exists() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    missing = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text())
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not missing


def test_every_command_of_the_readme_is_one_of_the_command_line() -> None:
    known = set(re.findall(r"│ (\w+) ", CliRunner().invoke(app, ["--help"]).output))
    used = set(re.findall(r"^coupled (\w+)", README, re.MULTILINE))
    assert used
    assert used <= known


def test_every_recipe_that_the_readme_names_exists() -> None:
    named = set(re.findall(r"recipes/[\w/-]+\.(?:yaml|json)", README))
    assert named
    assert all((ROOT / name).is_file() for name in named)
