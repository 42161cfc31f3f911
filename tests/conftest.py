import os

import jax
import numpy as np
import pytest

from experiments.cells.worker import quick_emitters

# Before the first use of a device: meshes of eight are made on any machine.
jax.config.update("jax_num_cpu_devices", 8)


def pytest_addoption(parser):
    parser.addoption("--optimize", action="store_true", help="compile as users do: in 5 × the time")


def pytest_configure(config):
    """Most of what a test costs is compiling a program that runs for a moment.

    So they are compiled without optimizations, in processes that tests start too. Tests that are
    marked `optimized` have LLVM's all the same, and with --optimize everything that users have.
    """
    if config.getoption("optimize"):
        return
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    jax.config.update("jax_disable_most_optimizations", True)
    # Of flags that are given twice the last one holds.
    quick = ["--xla_cpu_parallel_codegen_split_count=1", *quick_emitters()]
    os.environ["XLA_FLAGS"] = " ".join([*quick, os.environ.get("XLA_FLAGS", "")])


@pytest.fixture(autouse=True)
def same_numbers_in_any_order(request):
    """A module's `RNG` begins every test anew: what a test draws does not depend on others."""
    if rng := getattr(request.module, "RNG", None):
        rng.bit_generator.state = np.random.default_rng(0).bit_generator.state


@pytest.fixture(autouse=True)
def programs_of_users(request):
    """What is said of an optimized program is tested of one, whatever was compiled before."""
    quick = jax.config.read("jax_disable_most_optimizations")
    if not quick or not request.node.get_closest_marker("optimized"):
        yield
        return
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


@pytest.fixture(
    params=["quick", pytest.param("optimized", marks=[pytest.mark.slow, pytest.mark.optimized])]
)
def with_and_without_optimizations():
    """The slow tests repeat the tests that use this, with programs as users compile them."""
