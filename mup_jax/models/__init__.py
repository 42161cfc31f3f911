"""Models to train."""

from mup_jax.models.llama import (
    Llama,
    LlamaConfig,
    forward_flops_per_token,
    num_parameters,
    roles,
)

__all__ = ["Llama", "LlamaConfig", "forward_flops_per_token", "num_parameters", "roles"]
