"""Causal attention, by the fastest kernel that a platform has.

Dimensions: B batch, T tokens, H heads, K head dimension.
"""

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import jax
import jax.numpy as jnp

# The product of queries and keys is divided by √K; all arrays are (B, T, H, K).
Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

_SPLASH_LANES = 128
# The kernel's own default is its smallest tile.
_SPLASH_TILE = 512


def _splash(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """The Pallas kernel for TPUs; T is a multiple of 128."""
    # Loads Pallas, which nothing else needs.
    from jax.experimental.pallas.ops.tpu import splash_attention

    _, context, heads, head_dim = query.shape
    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((context, context))] * heads)
    tile = math.gcd(context, _SPLASH_TILE)
    tiles = splash_attention.BlockSizes(
        block_q=tile, block_kv=tile, block_kv_compute=tile,
        block_q_dkv=tile, block_kv_dkv=tile, block_kv_dkv_compute=tile,
        block_q_dq=tile, block_kv_dq=tile,
    )  # fmt: skip
    kernel = splash_attention.make_splash_mha_single_device(mask, block_sizes=tiles)
    heads_first = [jnp.swapaxes(x, 1, 2) for x in (query * head_dim**-0.5, key, value)]
    return jnp.swapaxes(jax.vmap(kernel)(*heads_first), 1, 2)


def _jax(
    query: jax.Array, key: jax.Array, value: jax.Array, *, kernel: Literal["xla", "cudnn"]
) -> jax.Array:
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation=kernel)


ATTENTION: Mapping[str, Attention] = MappingProxyType(
    {
        "xla": functools.partial(_jax, kernel="xla"),
        "cudnn": functools.partial(_jax, kernel="cudnn"),
        "splash": _splash,
    }
)


def attention_of(platform: str, dtype: jax.typing.DTypeLike, context: int, head_dim: int) -> str:
    """The name of the kernel to use: cuDNN's on GPUs in 16 bits, splash on TPUs, or XLA's."""
    fits_cudnn = jnp.dtype(dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128
    if platform in ("gpu", "cuda") and fits_cudnn:
        return "cudnn"
    if platform == "tpu" and context % _SPLASH_LANES == 0:
        return "splash"
    return "xla"
