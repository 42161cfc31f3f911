import os

import jax
import numpy as np
import pytest

# Before the first use of a device: meshes of eight are made on any machine.
jax.config.update("jax_num_cpu_devices", 8)


def pytest_addoption(parser):
    parser.addoption("--optimize", action="store_true", help="compile as users do: in 5 × the time")


def pytest_configure(config):
    """Most of what a test costs is compiling programs that run for a moment.

    Here they are compiled without optimizations, in processes that tests start too. The slow tests
    are compiled as users' programs are, and so are those marked `optimized`.
    """
    if config.getoption("optimize"):
        return
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    jax.config.update("jax_disable_most_optimizations", True)
    quick = ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
    # Of flags that are given twice the last one holds.
    os.environ["XLA_FLAGS"] = " ".join([*quick, os.environ.get("XLA_FLAGS", "")])


@pytest.fixture(autouse=True)
def same_numbers_in_any_order(request):
    """A module's `RNG` begins every test anew: what a test draws does not depend on others."""
    if rng := getattr(request.module, "RNG", None):
        rng.bit_generator.state = np.random.default_rng(0).bit_generator.state


@pytest.fixture(autouse=True)
def programs_of_users(request):
    """What is asserted of an optimized program is asserted of one."""
    before = jax.config.read("jax_disable_most_optimizations")
    if before and request.node.get_closest_marker("optimized"):
        jax.config.update("jax_disable_most_optimizations", False)
        yield
        jax.config.update("jax_disable_most_optimizations", before)
    else:
        yield
