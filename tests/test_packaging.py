"""What is installed is what is in the folders, under the names it is imported by."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("rl", "sandbox", "reward", "recipes")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline from a copy of the tree, so that no build folder is left in it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", source / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # What pip does after it has set up an environment, which takes a network.
    program = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("coupled-*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_every_module_is_in_the_wheel(names: set[str]) -> None:
    modules = {f"coupled/{p.relative_to(ROOT)}" for package in PACKAGES for p in (ROOT / package).rglob("*.py")}
    assert len(modules) > 40
    assert modules - names == set()


def test_the_wheel_installs_the_package_coupled_and_nothing_beside_it(names: set[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"coupled"}
    assert not any(name.startswith("coupled/tests") for name in names)


def test_recipes_and_the_embedded_model_are_in_the_wheel(names: set[str]) -> None:
    data = [p for pattern in ("*.yaml", "*.json") for p in (ROOT / "recipes").glob(pattern)]
    data += (ROOT / "recipes").glob("*/*.yaml")
    for folder in ("tasks", "architecture", "checkpoint"):
        data += [p for p in (ROOT / "recipes/tiny" / folder).rglob("*") if p.is_file()]
    wanted = {f"coupled/{p.relative_to(ROOT)}" for p in data}
    assert {"coupled/recipes/quickstart.yaml", "coupled/recipes/tiny/architecture/config.json"} <= wanted
    assert wanted - names == set()


def test_the_page_of_the_report_is_in_the_wheel(names: set[str]) -> None:
    page = [path for path in (ROOT / "rl/report/page").iterdir() if path.is_file()]
    assert len(page) == 3
    assert {f"coupled/{path.relative_to(ROOT)}" for path in page} - names == set()


def test_the_licence_and_the_command_are_in_the_wheel(wheel: Path, names: set[str]) -> None:
    (points,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "coupled = coupled.rl.cli:main" in zipfile.ZipFile(wheel).read(points).decode()
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_unpacked_wheel_imports_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    """Isolated mode keeps the working folder out; the finder of an editable install is taken out by hand."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = f"""
import sys
sys.meta_path = [f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", "")]
sys.path = [{str(tmp_path)!r}, *(p for p in sys.path if "__editable__" not in p)]
import coupled.reward, coupled.recipes, coupled.sandbox, coupled.sandbox.jail.zygote, coupled.sandbox.jail.child
from coupled.rl.recipe.read import load_recipe
for module in (coupled.reward, coupled.recipes, coupled.sandbox):
    assert module.__file__.startswith({str(tmp_path)!r}), module.__file__
recipe = load_recipe("quickstart")
assert recipe.data.path.startswith({str(tmp_path)!r}), recipe.data.path
print(recipe.name)
"""
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "quickstart"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_bare_folder_is_refused_with_the_name_to_import(package: str) -> None:
    program = f"import {package}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 1
    assert f"ImportError: import coupled.{package}, not {package}: the folder is a package" in done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_type_checkers_find_the_real_folders(package: str) -> None:
    link = ROOT / "typings/coupled" / package
    assert link.is_symlink()
    assert not Path(link.readlink()).is_absolute(), "the repository may be cloned anywhere"
    assert link.resolve() == ROOT / package


BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = {*BENCHMARKS.glob("*.py"), *BENCHMARKS.glob("verdicts/[!_]*.py"), BENCHMARKS / "hosts/__main__.py"}
"""Benchmarks that are run; the other files are imported by them."""


@pytest.mark.parametrize("path", sorted(BENCHMARKS.rglob("*.py")), ids=lambda path: str(path.relative_to(BENCHMARKS)))
def test_every_benchmark_still_finds_what_it_imports(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found = runpy.run_path(str(path), run_name="imported")
    assert path not in SCRIPTS or callable(found["main"])
