"""What `import mup_jax` gives, and what it does not load."""

import inspect
import subprocess
import sys
import warnings

import pytest

import mup_jax


def test_import_loads_jax_and_optax_only():
    code = """
import sys, mup_jax
trainer = {"flax", "grain", "orbax", "tensorstore", "ml_collections", "matplotlib"}
loaded = {name.split(".")[0] for name in sys.modules}
assert {"jax", "optax"} <= loaded
print(*sorted(loaded & trainer))
print(*(name for name in sys.modules if name.startswith(("mup_jax.training", "mup_jax.models"))))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


@pytest.mark.parametrize("name", mup_jax.__all__)
def test_every_public_name_is_there_and_documented(name):
    member = getattr(mup_jax, name)
    documented = [member]
    if inspect.ismodule(member):
        documented += [
            value
            for key, value in vars(member).items()
            if inspect.isfunction(value) and not key.startswith("_")
        ]
    for value in documented:
        text = inspect.getdoc(value)
        assert text, value
        # The docstring that a dataclass writes for itself is its signature.
        assert not text.startswith(f"{name}("), value
    if inspect.isfunction(member):
        sections = ["Args:", "Returns:"]
        assert [s for s in sections if s not in inspect.getdoc(member)] == []


def test_names_are_sorted_and_unique():
    assert list(mup_jax.__all__) == sorted(set(mup_jax.__all__))


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
@pytest.mark.parametrize(
    "module", ["mup_jax.transforms.soap", "experiments.train", "tests.somewhere"]
)
def test_what_is_about_to_go_away_is_an_error_where_we_use_it(module, category):
    """As pyproject.toml says; of a module of others it is a warning."""
    call = "warnings.warn('gone in the next release', category)"
    of = lambda name: {"__name__": name, "warnings": warnings, "category": category}
    with pytest.raises(category):
        exec(call, of(module))
    with warnings.catch_warnings(record=True) as caught:
        exec(call, of("somebody.else"))
    assert [w.category for w in caught] == [category]
