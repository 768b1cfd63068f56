"""The flow is one way (DESIGN.md, section 3), and `import jaxdiff` needs JAX only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jaxdiff"

# What each module of the mathematics may import from jaxdiff; an entry may import itself.
ALLOWED = {
    "base": set(),
    "_checks": {"base"},
    "rng": {"base"},
    "schedules": {"base", "_checks", "schedules"},
    "grids": {"base", "_checks", "schedules", "grids"},
    "process": {"base", "_checks", "rng", "schedules"},
    "predictions": {"base", "_checks"},
    "denoisers": {"base", "_checks", "rng", "schedules", "predictions"},
    "columns": {"base", "denoisers", "predictions"},
    "guidance": {"base", "_checks", "predictions", "guidance"},
    "editing": {"base", "_checks", "rng", "process", "predictions", "sampling", "solvers"},
    "timesteps": {"base", "_checks", "rng", "process"},
    "losses": {
        "base", "_checks", "rng", "schedules", "process", "predictions", "timesteps", "denoisers",
        "losses",
    },
    "likelihood": {
        "base", "_checks", "rng", "schedules", "process", "denoisers", "losses", "solvers",
        "likelihood",
    },
    "validation": {"base", "_checks", "rng", "process", "predictions", "losses"},
    "solvers": {"base", "_checks", "rng", "process", "predictions", "solvers"},
    "sampling": {"base", "_checks", "rng"},
    # These stand alone.
    "models": {"models"},
    "interop": {"base", "schedules", "predictions", "models", "interop"},
    "training": {"base", "rng", "training"},
    "data": {"data"},
    "evaluation": {"evaluation"},
    "viz": {"viz"},
}  # fmt: skip
# What the mathematics imports within functions: an optional extra, and what is slow to import.
WITHIN = {"solvers/_ode.py": {"diffrax"}, "grids/by_time.py": {"scipy"}}
MATHEMATICS = set(ALLOWED) - {"models", "interop", "training", "data", "evaluation", "viz"}
OUTSIDE = {"jax", "numpy", "chex"}


def imported(path):
    """Yields the full names of the modules that a file imports."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "jaxdiff":
                yield from (f"jaxdiff.{alias.name}" for alias in node.names)
            else:
                yield node.module


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_flow_one_way(path):
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    names = list(imported(path))
    inside = {module.split(".")[1] for module in names if module.startswith("jaxdiff.")}
    assert inside <= ALLOWED[name], f"{name} may not import {inside - ALLOWED[name]}"
    assert not [module for module in names if "._src" in module]
    if name in MATHEMATICS:
        roots = {module.split(".")[0] for module in names}
        allowed = OUTSIDE | WITHIN.get(str(path.relative_to(PACKAGE)), set())
        assert roots - {"jaxdiff"} <= allowed | set(sys.stdlib_module_names)


def test_every_module_is_in_the_table():
    modules = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert modules == set(ALLOWED)


@pytest.mark.parametrize(
    "name", ["jaxdiff", "jaxdiff.data", "jaxdiff.viz", "jaxdiff.evaluation", "jaxdiff.data.tables"]
)
def test_import_is_light(name):
    heavy = {
        "flax", "optax", "orbax", "grain", "tensorflow", "tensorflow_datasets", "sklearn", "PIL",
        "matplotlib", "scipy.stats", "diffrax", "pandas",
    }  # fmt: skip
    code = f"import sys, {name}; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_public_name_has_a_docstring():
    bare = []
    for path in [*FILES, PACKAGE / "__init__.py"]:
        tree = ast.parse(path.read_text())
        for node in [tree, *ast.walk(tree)]:
            if isinstance(node, (ast.Module, ast.ClassDef)) and not ast.get_docstring(node):
                bare.append(f"{path.name}:{getattr(node, 'name', '')}")
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                bare.append(f"{path.name}:{node.name}")
    assert not bare
