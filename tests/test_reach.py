"""What the package asks of the JAX, and of the packages, that it finds."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent

# What has no public home in any JAX that is supported.
EXPERIMENTAL = {
    "jax.experimental.multihost_utils": "the only way to broadcast to, and to wait for, processes",
    "jax.experimental.pallas.ops.tpu": "splash attention is in no other package of JAX",
    "jax.experimental.topologies": "the only way to compile for devices that are not there",
}

# Modules whose package has another name.
PACKAGES = {
    "absl": "absl-py",
    "array_record": "array-record",
    "markdown_it": "markdown-it-py",
    "ml_collections": "ml-collections",
    "orbax": "orbax-checkpoint",
}


def imports(path, *, attributes=True):
    """The dotted names that a file imports, or reads as attributes of jax."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif attributes and isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def test_of_jax_what_is_public_or_has_no_public_home():
    unexplained = [
        f"{path.relative_to(ROOT)}: {name}"
        for folder in ("mup_jax", "experiments", "notebooks")
        for path in (ROOT / folder).rglob("*.py")
        for name in imports(path)
        if name.startswith(("jax._src", "jax.experimental"))
        and not name.startswith(tuple(EXPERIMENTAL))
    ]
    assert unexplained == []


def test_a_step_needs_neither_grain_nor_ml_collections():
    code = """
import sys
sys.modules |= dict.fromkeys(["grain", "ml_collections"])  # imports of these fail

import jax, jax.numpy as jnp
from mup_jax.training import Program
from mup_jax.training.config import as_namespace, default_settings
from mup_jax.training.mesh import make_mesh
from mup_jax.training.program import Hyperparameters

config = as_namespace(default_settings() | {"context": 16, "batch_size": 2})
with jax.set_mesh(make_mesh(config)):
    program = Program(config, vocab_size=7)
    batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), program.abstract_batch)
    _, metrics = program.step(program.init(0), batch, Hyperparameters.of(config))
print(float(metrics["loss"]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert abs(float(result.stdout) - 1.9459) < 1e-3  # log 7: logits begin at 0


def test_what_is_imported_is_declared():
    """Of the extra that a folder needs, and no more: a missing one is found by users first."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {
        "core": project["dependencies"],
        "train": project["dependencies"] + extras["train"],
        "all": project["dependencies"] + [name for extra in extras.values() for name in extra],
    }
    declared = {key: {re.split(r"[>=\[]", name)[0] for name in d} for key, d in declared.items()}
    needs = {
        "core": ["__init__.py", "testing.py", "transforms", "transfer", "optimizers"],
        "train": ["models", "training", "analysis"],
        "all": ["data"],
    }
    for key, names in needs.items():
        for name in names:
            path = ROOT / "mup_jax" / name
            for file in [path] if path.is_file() else path.rglob("*.py"):
                modules = {dotted.split(".")[0] for dotted in imports(file, attributes=False)}
                packages = {PACKAGES.get(module, module) for module in modules}
                assert packages - sys.stdlib_module_names <= declared[key] | {"mup_jax"}, file
    used = {
        PACKAGES.get(module, module)
        for folder in ("mup_jax", "experiments")
        for file in (ROOT / folder).rglob("*.py")
        for module in (dotted.split(".")[0] for dotted in imports(file, attributes=False))
    }
    assert declared["train"] <= used
