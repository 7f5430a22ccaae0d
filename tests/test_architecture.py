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
LAYERS = (
    "base",
    "cluster",
    "data",
    "model",
    "estimators",
    "objective",
    "run_folder",
    "rollout",
    "likelihood",
    "judging",
    "monitoring",
    "trainer",
    "evaluation",
    "report",
    "loops",
    "commands",
    "cli",
)
"""The packages of rl/, lowest first. A module imports modules of its own layer and of those before it."""
BASE = ("types", "errors", "keys", "shapes", "recipe")
LOOPS = ("train", "run", "fit")
CORE = ("base", "model", "estimators", "objective", "rollout", "likelihood")
"""The numeric core: layers that import with the libraries of `CORE_LIBRARIES` alone."""
CORE_LIBRARIES = {"torch", "transformers", "peft", "safetensors", "numpy", "pydantic", "yaml"}
ABSENT = ("ray", "datasets", "trl", "vllm", "evalplus", "tensorboard", "pyarrow", "typer", "jaxtyping", "peft")
"""Blocked while the core is imported. peft is among them: a policy without adapters does without it."""
MODULES = {
    ".".join(["coupled", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): name
    for name, path in FILES.items()
    if name.startswith("rl/")
}
PUBLIC_NAMES = ("coupled.rl", "coupled.rl.train")
"""The one import that points up: `from coupled.rl import train`, resolved on first use."""


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


def layer_of(module: str) -> str:
    """Layer of a module of rl/. Example: `coupled.rl.model.policy` → `model`."""
    first = [*module.split("."), "base"][2]
    return "base" if first in BASE else "loops" if first in LOOPS else first


def edges() -> set[tuple[str, str]]:
    """Every import of one module of rl/ by another, lazy ones and those for type checkers included."""
    found = set()
    for module, name in MODULES.items():
        for node in ast.walk(ast.parse(FILES[name].read_text())):
            if isinstance(node, ast.Import):
                found |= {(module, alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                for alias in node.names:
                    member = f"{node.module}.{alias.name}"
                    found.add((module, member if member in MODULES else node.module))
    return {(one, other) for one, other in found if other in MODULES and one != other}


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one import cycle; empty when there is none."""
    finished: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in finished:
            return []
        for other in sorted(graph.get(module, ())):
            if found := visit(other, [*path, module]):
                return found
        finished.add(module)
        return []

    return next((found for module in sorted(graph) if (found := visit(module, []))), [])


def of_package(package: str) -> list[str]:
    return [name for name in FILES if name.startswith(f"{package}/")]


def is_allowed(module: str, *, ours: tuple[str, ...]) -> bool:
    top = module.split(".")[0]
    if top == "coupled":
        return any(module == name or module.startswith(f"{name}.") for name in ours)
    return top in sys.stdlib_module_names


def test_the_packages_are_where_they_are_looked_for() -> None:
    assert all(len(of_package(package)) > 5 for package in PACKAGES)
    assert {layer_of(module) for module in MODULES} == set(LAYERS)


def test_imports_point_down() -> None:
    rank = {layer: number for number, layer in enumerate(LAYERS)}
    up = {(one, other) for one, other in edges() if rank[layer_of(one)] < rank[layer_of(other)]}
    assert up - {PUBLIC_NAMES} == set()


def test_no_module_imports_itself_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for one, other in edges() - {PUBLIC_NAMES}:
        graph.setdefault(one, set()).add(other)
    assert cycle_in(graph) == []


def test_the_cycle_finder_finds_cycles() -> None:
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_no_file_is_too_long_to_read() -> None:
    long = {name: len(FILES[name].read_text().splitlines()) for name in MODULES.values()}
    assert {name: lines for name, lines in long.items() if lines > 450} == {}


def test_the_sandbox_imports_the_standard_library_alone() -> None:
    odd = {
        n: m for n in of_package("sandbox") for m in imports_within(n) if not is_allowed(m, ours=("coupled.sandbox",))
    }
    assert odd == {}


JAIL = [name for name in FILES if name.startswith("sandbox/jail/")]
"""Modules that run beside programs. They are loaded by path, in an interpreter without the package `coupled`."""


def test_modules_of_the_jail_import_the_standard_library_alone_and_not_each_other() -> None:
    assert len(JAIL) == 8
    odd = {name: module for name in JAIL for module in imports_within(name) if not is_allowed(module, ours=())}
    assert odd == {}


def test_other_modules_import_the_codec_of_the_jail_alone() -> None:
    found = {m for name in FILES.keys() - set(JAIL) for m in jail_imports_of(FILES[name])}
    assert found == {"codec"}


def jail_imports_of(path: Path) -> set[str]:
    """Modules of `sandbox/jail` that a file imports, at any depth and in either form of the statement."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    prefix = "coupled.sandbox.jail."
    return {name.removeprefix(prefix).split(".")[0] for name in found if name.startswith(prefix)}


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


def test_no_file_imports_the_bare_folder_names() -> None:
    bare = {"rl", "sandbox", "reward", "recipes", "tests"}
    assert [name for name in FILES if {m.split(".")[0] for m in imports_within(name)} & bare] == []


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
    importlib.import_module(name)
import torch
from coupled.rl.objective.advantage import group_advantages
print(group_advantages(torch.tensor([[0.0, 1.0]]), "mean").tolist())
"""


def test_the_core_imports_few_outside_libraries() -> None:
    """When a module is imported; what a function imports when it is called may be absent."""
    odd = set()
    for module, name in MODULES.items():
        if layer_of(module) in CORE:
            tree = ast.parse(FILES[name].read_text())
            nodes = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
            names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
            names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module is not None}
            odd |= {
                (name, n)
                for n in names
                if n.split(".")[0] not in {*CORE_LIBRARIES, *sys.stdlib_module_names, "coupled"}
            }
    assert odd <= {("rl/rollout/row_statistics_triton.py", n) for n in ("triton", "triton.language")}


def test_the_core_imports_and_runs_without_the_libraries_of_the_edges() -> None:
    core = [m for m in MODULES if layer_of(m) in CORE and not m.endswith("_triton")]
    assert len(core) > 40
    program = CORE_PROGRAM.format(absent=ABSENT, core=core)
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
def test_no_file_sets_a_global_generator_outside_a_fork() -> None:
    found = {}
    for name in FILES.keys() - {"sandbox/jail/child.py"}:
        calls = SeedCalls()
        calls.visit(ast.parse(FILES[name].read_text()))
        # Weights are initialised in loading.py and nowhere else.
        if calls.lines or (calls.forked and name != "rl/model/loading.py"):
            found[name] = calls.lines
    assert found == {}


# doctor reports the environment, ray_cluster hands one to its actors; the sandbox is about processes.
MAY_READ_ENVIRONMENT = {"rl/cli.py", "rl/commands/doctor.py", "rl/cluster/ray.py", *of_package("sandbox")}


def test_environment_variables_are_read_by_the_command_line_alone() -> None:
    sources = {name: FILES[name].read_text() for name in FILES.keys() - MAY_READ_ENVIRONMENT}
    assert [name for name, source in sources.items() if "os.environ" in source or "getenv" in source] == []
