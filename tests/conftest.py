import jax
import numpy as np
import pytest

# Before the first use of a device: meshes of eight are made on any machine.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(autouse=True)
def same_numbers_in_any_order(request):
    """A module's `RNG` begins every test anew: what a test draws does not depend on others."""
    if rng := getattr(request.module, "RNG", None):
        rng.bit_generator.state = np.random.default_rng(0).bit_generator.state
