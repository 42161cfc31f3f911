"""Llama without a parameter in its norms: the network of Qiu et al. (arXiv 2512.05620), Fig. 6.

With GELU and learned positions, the GPT-2 like one of their Fig. 2 to 5.

Dimensions: B batch, T tokens of context, V vocabulary, D width, H heads, K head dimension,
F = mlp_ratio * D.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mup_jax.models.attention import ATTENTION
from mup_jax.models.sharding import linear, lookup, per_head, place

# Cosine and sine of the rotary angles; None for learned positions.
Rotation = tuple[jax.Array, jax.Array] | None

_NORM_EPSILON = 1e-6
_EMBEDDING_STD = 0.1
_ROLE_OF = {
    "embedding": "embedding",
    "positions": "embedding",
    "layers": "hidden",
    "readout": "readout",
}
# The names of the axes, for `mup_jax.models.sharding`.
_AXES = {
    "embedding": ("vocab", "embed"),
    "positions": (None, "embed"),
    "readout": ("embed", "vocab"),
    **dict.fromkeys(("query", "key", "value"), ("layers", "embed", "heads")),
    "output": ("layers", "heads", "embed"),
    **dict.fromkeys(("gate", "up"), ("layers", "embed", "mlp")),
    "down": ("layers", "mlp", "embed"),
}
_MLP_MATRICES = {"swiglu": 3, "gelu": 2}
# What the backward pass finds in memory; the rest it computes again.
_REMAT: dict[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
_SIZES = ("vocab_size", "width", "depth", "head_dim", "mlp_ratio", "base_depth", "rope_theta")


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a Llama.

    Attributes:
      vocab_size: V.
      width: D, a multiple of `head_dim`.
      depth: number of blocks.
      head_dim: K, even.
      mlp_ratio: hidden units of the MLP per unit of width, F / D.
      mlp: "swiglu", with three matrices, or "gelu", with two.
      learned_positions: rows of a table of positions that is added to the embedding, at least T; 0
        for rotary positions instead.
      base_depth: every residual branch is multiplied by `base_depth / depth` (CompleteP with
        α = 1, arXiv 2505.01618). None stands for `depth`: no multiplier.
      rope_theta: base of the rotary wavelengths.
      dtype: of activations and matrix products; parameters and logits are float32.
      attention: the kernel of `mup_jax.models.attention`: "xla", "cudnn" or "splash".
      remat: of each block, which activations the backward pass computes again: "none", "dots" (all
        but the products with weights), or "full".

    Raises:
      ValueError: a size is not positive, the heads do not divide the width, or an unknown name.
    """

    vocab_size: int
    width: int
    depth: int
    head_dim: int = 64
    mlp_ratio: int = 4
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    learned_positions: int = 0
    base_depth: int | None = None
    rope_theta: float = 10_000.0
    dtype: DTypeLike = jnp.float32
    attention: str = "xla"
    remat: Literal["none", "dots", "full"] = "none"

    def __post_init__(self) -> None:
        for size in _SIZES:
            value = getattr(self, size)
            if value is not None and value <= 0:
                raise ValueError(f"{size}={value}: choose a positive value")
        for name, known in (("mlp", _MLP_MATRICES), ("attention", ATTENTION), ("remat", _REMAT)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: choose one of {', '.join(known)}"
                )
        if self.learned_positions < 0:
            raise ValueError(
                f"learned_positions={self.learned_positions}: give the context, or 0 for rotary"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: choose an even one, for rotary positions")
        if self.width % self.head_dim:
            below = self.width // self.head_dim * self.head_dim
            nearest = " or ".join(str(w) for w in (below, below + self.head_dim) if w)
            raise ValueError(
                f"width={self.width} is not a multiple of head_dim={self.head_dim}: choose width "
                f"{nearest}"
            )

    @property
    def heads(self) -> int:
        """H, number of attention heads."""
        return self.width // self.head_dim

    @property
    def residual_multiplier(self) -> float:
        """Factor of every residual branch."""
        return (self.base_depth or self.depth) / self.depth


class Llama(nnx.Module):
    """Decoder-only transformer: RoPE, SwiGLU, pre-norm and QK-norm without gains, no biases.

    Parameters are float32 and stored `(d_in, d_out)`, those of the blocks stacked on a leading
    axis: `embedding (V, D)`, `layers.attention.{query,key,value,output} (depth, D, D)`,
    `layers.mlp.{gate,up} (depth, D, F)`, `layers.mlp.down (depth, F, D)`, `readout (D, V)`; with
    GELU there is no `gate`, with learned positions a `positions (learned_positions, D)`. Embeddings
    are drawn from N(0, 0.1²), hidden matrices from N(0, 1/d_in); the matrices that end a residual
    branch and the readout start at zero, so the first logits are zero.

    The model has no other state, so training code can use it as a pure function:

        graphdef, params = nnx.split(Llama(config, rngs=nnx.Rngs(0)), nnx.Param)
        logits_BTV = nnx.merge(graphdef, params)(tokens_BT)
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        shape_VD = (config.vocab_size, config.width)
        self.embedding = _embedding(rngs.params(), *shape_VD)
        if config.learned_positions:
            self.positions = _embedding(rngs.params(), config.learned_positions, config.width)
        self.layers = _stack_of_blocks(config, rngs.params())
        self.readout = nnx.Param(jnp.zeros(shape_VD[::-1]))

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Logits of the next token.

        Args:
          tokens_BT: integer ids in `[0, V)`.

        Returns:
          float32 logits of shape `(B, T, V)`.
        """
        return self._logits(self.features(tokens_BT))

    def features(self, tokens_BT: jax.Array) -> jax.Array:
        """The residual stream after the last block, before the final norm, `(B, T, D)`.

        The coordinate check measures how much training moves it.
        """
        return self._apply_blocks(self._embed(tokens_BT), lambda x_BTD: None)[0]

    def activations(self, tokens_BT: jax.Array) -> dict[str, jax.Array]:
        """The residual stream on its way through the blocks, and the logits.

        Names are the same at every width and depth: "embedding", "middle block", "last block" and
        "logits".
        """
        x_BTD = self._embed(tokens_BT)
        last_BTD, blocks_LBTD = self._apply_blocks(x_BTD, lambda x_BTD: x_BTD)
        return {
            "embedding": x_BTD,
            "middle block": blocks_LBTD[(self.config.depth - 1) // 2],
            "last block": last_BTD,
            "logits": self._logits(last_BTD),
        }

    def _embed(self, tokens_BT: jax.Array) -> jax.Array:
        x_BTD = lookup(self.embedding[...].astype(self.config.dtype), tokens_BT)
        if self.config.learned_positions:
            context = tokens_BT.shape[1]
            if context > self.config.learned_positions:
                raise ValueError(
                    f"{context} tokens, but learned_positions={self.config.learned_positions}: "
                    "give at least the context"
                )
            x_BTD += place(self.positions[...], None, None)[:context].astype(x_BTD.dtype)
        return x_BTD

    def _apply_blocks(
        self, x_BTD: jax.Array, keep: Callable[[jax.Array], jax.Array | None]
    ) -> tuple[jax.Array, Any]:
        """The residual stream after the last block, and what is kept of it after each."""
        rotation = _rotation(x_BTD.shape[1], self.config)
        block, stacked_params = nnx.split(self.layers)

        def apply_block(x_BTD: jax.Array, params: nnx.State) -> tuple[jax.Array, jax.Array | None]:
            x_BTD = nnx.merge(block, params)(x_BTD, rotation)
            return x_BTD, keep(x_BTD)

        if self.config.remat != "none":
            policy = _REMAT[self.config.remat]
            apply_block = jax.checkpoint(apply_block, policy=policy, prevent_cse=False)
        # Scanned, so that compile time does not grow with depth.
        return jax.lax.scan(apply_block, x_BTD, stacked_params)

    def _logits(self, features_BTD: jax.Array) -> jax.Array:
        x_BTD, readout_DV = _rms_norm(features_BTD), self.readout[...]
        return linear(x_BTD, readout_DV, "embed", "vocab", preferred_element_type=jnp.float32)


class _Block(nnx.Module):
    def __init__(self, config: LlamaConfig, key: jax.Array) -> None:
        attention_key, mlp_key = jax.random.split(key)
        self.residual_multiplier = config.residual_multiplier
        self.attention = _Attention(config, attention_key)
        self.mlp = _Mlp(config, mlp_key)

    def __call__(self, x_BTD: jax.Array, rotation: Rotation) -> jax.Array:
        x_BTD += self.residual_multiplier * self.attention(_rms_norm(x_BTD), rotation)
        x_BTD += self.residual_multiplier * self.mlp(_rms_norm(x_BTD))
        return x_BTD


class _Attention(nnx.Module):
    def __init__(self, config: LlamaConfig, key: jax.Array) -> None:
        width = config.width
        query_key, key_key, value_key = jax.random.split(key, 3)
        self.head_dim = config.head_dim
        self.attention = ATTENTION[config.attention]
        self.query = _hidden(query_key, width, width)
        self.key = _hidden(key_key, width, width)
        self.value = _hidden(value_key, width, width)
        self.output = nnx.Param(jnp.zeros((width, width)))

    def __call__(self, x_BTD: jax.Array, rotation: Rotation) -> jax.Array:
        def project(weight_DD: nnx.Param) -> jax.Array:
            return linear(x_BTD, weight_DD[...], "embed", "heads")

        projected = project(self.query), project(self.key), project(self.value)
        attended_BTD = per_head(self._attend, projected, rotation)
        return linear(attended_BTD, self.output[...], "heads", "embed")

    def _attend(
        self, projected: tuple[jax.Array, jax.Array, jax.Array], rotation: Rotation
    ) -> jax.Array:
        query_BTHK, key_BTHK, value_BTHK = (
            y.reshape(*y.shape[:2], -1, self.head_dim) for y in projected
        )
        query_BTHK = _rotate(_rms_norm(query_BTHK), rotation)
        key_BTHK = _rotate(_rms_norm(key_BTHK), rotation)
        return self.attention(query_BTHK, key_BTHK, value_BTHK).reshape(projected[0].shape)


class _Mlp(nnx.Module):
    def __init__(self, config: LlamaConfig, key: jax.Array) -> None:
        width, hidden = config.width, config.mlp_ratio * config.width
        gate_key, up_key = jax.random.split(key)
        self.gated = config.mlp == "swiglu"
        if self.gated:
            self.gate = _hidden(gate_key, width, hidden)
        self.up = _hidden(up_key, width, hidden)
        self.down = nnx.Param(jnp.zeros((hidden, width)))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        if self.gated:
            gate_BTF = linear(x_BTD, self.gate[...], "embed", "mlp")
            x_BTF = jax.nn.silu(gate_BTF) * linear(x_BTD, self.up[...], "embed", "mlp")
        else:
            x_BTF = jax.nn.gelu(linear(x_BTD, self.up[...], "embed", "mlp"))
        return linear(x_BTF, self.down[...], "mlp", "embed")


def roles(params: Any) -> Any:
    """Says of each parameter of a `Llama` which role it plays in the scaling rules.

    Args:
      params: the parameters, as a `nnx.State` or a pure dict.

    Returns:
      The same tree with "embedding", "hidden" or "readout" at the leaves.
    """
    return jax.tree.map_with_path(lambda path, _: _ROLE_OF[path[0].key], params)


def layer_groups(params: Any) -> Any:
    """Says of each parameter of a `Llama`, in a pure dict, which kind of layer it is part of.

    Returns:
      The same tree with "embedding", "attention", "mlp" or "readout" at the leaves.
    """

    def group(path: Any, _: Any) -> str:
        names = [entry.key for entry in path]
        return names[1] if names[0] == "layers" else _ROLE_OF[names[0]]

    return jax.tree.map_with_path(group, params)


def shard(params: Any) -> Any:
    """The parameters of a `Llama`, laid out on the mesh in use by `sharding.AXIS_RULES`.

    Args:
      params: a pure dict.
    """
    return jax.tree.map_with_path(lambda path, x: place(x, *_AXES[path[-1].key]), params)


def num_parameters(config: LlamaConfig) -> int:
    """Number of parameters, embedding and readout included."""
    per_layer = (4 + _MLP_MATRICES[config.mlp] * config.mlp_ratio) * config.width**2
    rows = 2 * config.vocab_size + config.learned_positions
    return config.depth * per_layer + rows * config.width


def forward_flops_per_token(config: LlamaConfig, context: int) -> int:
    """Floating-point operations of a forward pass per token; training takes three times as many.

    Counts a multiply-add as two, attention over the whole context without the causal half, and
    three operations per attention score for the softmax, as Qiu et al. (arXiv 2512.05620) do.
    """
    width = config.width
    mlp = 2 * _MLP_MATRICES[config.mlp] * width * (config.mlp_ratio * width)
    projections = 2 * width * 3 * width + 2 * width**2
    scores = 4 * context * width + 3 * context * config.heads
    return config.depth * (mlp + projections + scores) + 2 * width * config.vocab_size


def _stack_of_blocks(config: LlamaConfig, key: jax.Array) -> _Block:
    stacked = nnx.vmap(
        lambda key: _Block(config, key), transform_metadata={nnx.PARTITION_NAME: None}
    )
    return stacked(jax.random.split(key, config.depth))


def _embedding(key: jax.Array, rows: int, width: int) -> nnx.Param:
    return nnx.Param(_EMBEDDING_STD * jax.random.normal(key, (rows, width)))


def _hidden(key: jax.Array, d_in: int, d_out: int) -> nnx.Param:
    return nnx.Param(jax.random.normal(key, (d_in, d_out)) / math.sqrt(d_in))


def _rms_norm(x: jax.Array) -> jax.Array:
    x_float32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x_float32), axis=-1, keepdims=True)
    return (x_float32 * jax.lax.rsqrt(mean_square + _NORM_EPSILON)).astype(x.dtype)


def _rotation(context: int, config: LlamaConfig) -> Rotation:
    """Cosine and sine of the rotary angles, each of shape `(T, 1, K / 2)`."""
    if config.learned_positions:
        return None
    frequency = config.rope_theta ** -(jnp.arange(0, config.head_dim, 2) / config.head_dim)
    angle = jnp.arange(context)[:, None, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def _rotate(x_BTHK: jax.Array, rotation: Rotation) -> jax.Array:
    if rotation is None:
        return x_BTHK
    cos, sin = rotation
    a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return rotated.astype(x_BTHK.dtype)
