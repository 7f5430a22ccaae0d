"""Imports point one way: recipes → rl → reward → sandbox → the standard library."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("rl", "reward", "sandbox")
FILES = {str(p.relative_to(ROOT)): p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))}
EDGES = ("ray", "datasets", "peft", "pyarrow", "typer", "tensorboard", "triton")
"""Each of these is known to one file, so that it can be replaced, or be absent."""
CORE = (
    "types",
    "keys",
    "shapes",
    "estimators/__init__",
    "estimators/draw",
    "estimators/score",
    "objective/advantage",
    "objective/loss",
    "objective/batch",
    "likelihood/noise",
    "rollout/sampler",
    "rollout/distributions",
    "rollout/row_statistics",
    "rollout/readout",
    "model/last_layer",
    "model/packing",
    "rollout/canvas_states",
    "rollout/denoise",
    "rollout/denoise_blocks",
    "model/attention",
    "model/vocabulary",
    "model/policy",
    "model/special_tokens",
    "model/weights",
    "model/reference",
    "model/loading",
    "model/families",
    "trainer/optimizer",
    "model/gradient_checkpointing",
    "objective/gradient",
    "rollout/parity",
)
ABSENT = ("ray", "datasets", "trl", "vllm", "evalplus", "tensorboard", "pyarrow", "typer", "jaxtyping", "peft")


def imports_of(path: Path) -> set[str]:
    """Full names of all modules that a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they point"
            assert node.module is not None
            found.add(node.module)
            if node.module == "coupled":
                found |= {f"coupled.{alias.name}" for alias in node.names}
    return found


def imports_within(name: str) -> set[str]:
    return imports_of(FILES[name])


def of_package(package: str) -> list[str]:
    return [name for name in FILES if name.startswith(f"{package}/")]


def is_allowed(module: str, *, ours: tuple[str, ...]) -> bool:
    top = module.split(".")[0]
    if top == "coupled":
        return any(module == name or module.startswith(f"{name}.") for name in ours)
    return top in sys.stdlib_module_names


def test_the_packages_are_where_they_are_looked_for() -> None:
    assert all(len(of_package(package)) > 5 for package in PACKAGES)
    assert {f"rl/{name}.py" for name in CORE} <= FILES.keys()


def test_the_sandbox_imports_the_standard_library_alone() -> None:
    odd = {
        n: m for n in of_package("sandbox") for m in imports_within(n) if not is_allowed(m, ours=("coupled.sandbox",))
    }
    assert odd == {}


def test_rewards_import_the_sandbox_and_the_standard_library_alone() -> None:
    ours = ("coupled.reward", "coupled.sandbox")
    odd = {n: m for n in of_package("reward") for m in imports_within(n) if not is_allowed(m, ours=ours)}
    assert odd == {}


def test_the_training_loop_does_not_know_the_recipes_that_ship() -> None:
    odd = {n: m for n in of_package("rl") for m in imports_within(n) if m.startswith("coupled.recipes")}
    assert odd == {}


@pytest.mark.parametrize("library", EDGES)
def test_each_outside_library_is_imported_in_exactly_one_file(library: str) -> None:
    users = {
        name
        for name in FILES
        for module in imports_within(name)
        if module.split(".")[0] == library or module.startswith(f"torch.utils.{library}")
    }
    assert len(users) == 1, users


@pytest.mark.parametrize("name", sorted(FILES))
def test_nobody_imports_the_bare_folder_names(name: str) -> None:
    assert not {m.split(".")[0] for m in imports_within(name)} & {"rl", "sandbox", "reward", "recipes", "tests"}


CORE_PROGRAM = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r} or name == "torch.utils.tensorboard":
            raise ModuleNotFoundError(f"No module named {{name!r}}: the core must do without it", name=name)

sys.meta_path.insert(0, Absent())
try:
    import ray
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the blocker does not block")
import importlib
for name in {core!r}:
    importlib.import_module("coupled.rl." + name.removesuffix("/__init__").replace("/", "."))
import torch
from coupled.rl.objective.advantage import group_advantages
print(group_advantages(torch.tensor([[0.0, 1.0]]), "mean").tolist())
"""


def test_the_core_imports_and_runs_without_the_libraries_of_the_edges() -> None:
    program = CORE_PROGRAM.format(absent=ABSENT, core=CORE)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/", timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[[-0.5, 0.5]]"


GLOBAL_SEEDS = (
    "manual_seed",
    "manual_seed_all",
    "set_seed",
    "seed",
    "seed_all",
    "set_rng_state",
    "setstate",
    "set_state",
)


class SeedCalls(ast.NodeVisitor):
    """Calls that set a global generator, outside of a `with torch.random.fork_rng(...)` block."""

    def __init__(self) -> None:
        self.lines: list[int] = []
        self.forked = 0
        self.is_forked = 0

    def visit_With(self, node: ast.With) -> None:
        forks = any("fork_rng" in ast.unparse(item.context_expr) for item in node.items)
        self.is_forked += forks
        self.generic_visit(node)
        self.is_forked -= forks

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in GLOBAL_SEEDS:
            if self.is_forked:
                self.forked += 1
            else:
                self.lines.append(node.lineno)
        self.generic_visit(node)


# The child process of the sandbox seeds its own generator: programs then give the same values whenever they are run.
@pytest.mark.parametrize("name", sorted(FILES.keys() - {"sandbox/child.py"}))
def test_no_file_sets_a_global_generator_outside_a_fork(name: str) -> None:
    calls = SeedCalls()
    calls.visit(ast.parse(FILES[name].read_text()))
    assert calls.lines == []
    assert calls.forked == 0 or name == "rl/model/loading.py", "weights are initialised in loading.py and nowhere else"


# doctor reports the environment, ray_cluster hands one to its actors; the sandbox is about processes.
MAY_READ_ENVIRONMENT = {"rl/cli.py", "rl/commands/doctor.py", "rl/cluster/ray.py", *of_package("sandbox")}


@pytest.mark.parametrize("name", sorted(FILES.keys() - MAY_READ_ENVIRONMENT))
def test_environment_variables_are_read_by_the_command_line_alone(name: str) -> None:
    source = FILES[name].read_text()
    assert "os.environ" not in source
    assert "getenv" not in source
