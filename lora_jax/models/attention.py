"""Causal attention with grouped key and value heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from lora_jax.models.config import DecoderConfig
from lora_jax.models.rope import rotate

# Finite, so that no row of scores can turn into NaN; exp of it is 0 in float32.
MASKED = -1e30


def attention_bias(
    query_slots: jax.Array,
    key_slots: jax.Array,
    *,
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    window: int | None,
) -> jax.Array:
    """Returns what is added to the scores, 0 where a query sees a key and `MASKED` elsewhere.

    Args:
        query_slots: int32 `[T]`, where the queries stand in the sequence.
        key_slots: int32 `[S]`, where the keys stand.
        query_positions: int32 `[B or 1, T]`.
        key_positions: int32 `[B or 1, S]`.
        query_segments: int32 `[B, T]`, or `None` when all is one segment.
        key_segments: int32 `[B, S]`, or `None`.
        window: A query sees keys less than this many positions before it; `None` for all.

    Returns:
        float32 `[B or 1, 1, 1, T, S]`. Adding has a cheaper gradient than selecting.
    """
    seen = (key_slots <= query_slots[:, None])[None]
    if window is not None:
        seen = seen & (query_positions[:, :, None] - key_positions[:, None, :] < window)
    if query_segments is not None and key_segments is not None:
        seen = seen & (query_segments[:, :, None] == key_segments[:, None, :])
    return jnp.where(seen, 0.0, MASKED).astype(jnp.float32)[:, None, None]


def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
    """Computes `softmax(q k^T / sqrt(H) + bias) v`, each key head serving `N / K` query heads.

    Args:
        q: `[B, T, N, H]`.
        k: `[B, S, K, H]`.
        v: `[B, S, K, H]`.
        bias: float32, broadcast to `[B, K, N / K, T, S]`.

    Returns:
        `[B, T, N, H]` in `q`'s dtype. The softmax is float32.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    # Heads first: both products are then plain batched matmuls, which the CPU runs fastest, and
    # the query heads that share a key head are rows of one matrix, so that no key is repeated.
    q = (q * head_dim**-0.5).reshape(batch, length, kv_heads, -1, head_dim)
    q = q.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head_dim)
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    scores = jnp.matmul(q, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, -1, length, k.shape[-1])
    weights = jax.nn.softmax(scores + bias, axis=-1).astype(v.dtype)
    out = weights.reshape(batch, kv_heads, -1, k.shape[-1]) @ v
    out = out.reshape(batch, kv_heads, -1, length, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads, head_dim)


class Attention(nnx.Module):
    """Projects to queries, keys and values, attends, projects back."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim

        def linear(fan_in: int, fan_out: int, bias: bool) -> nnx.Linear:
            return nnx.Linear(
                fan_in,
                fan_out,
                use_bias=bias,
                dtype=dtype,
                param_dtype=dtype,
                kernel_init=nnx.initializers.normal(0.02),
                rngs=rngs,
            )

        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = linear(config.hidden_size, width, config.qkv_bias)
        self.k_proj = linear(config.hidden_size, kv_width, config.qkv_bias)
        self.v_proj = linear(config.hidden_size, kv_width, config.qkv_bias)
        self.o_proj = linear(width, config.hidden_size, False)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            norm = {"epsilon": config.norm_eps, "dtype": dtype, "param_dtype": dtype, "rngs": rngs}
            self.q_norm = nnx.RMSNorm(config.head_dim, **norm)
            self.k_norm = nnx.RMSNorm(config.head_dim, **norm)

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        bias: jax.Array,
        kv: tuple[jax.Array, jax.Array] | None = None,
        slot: jax.Array | int = 0,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Attends from `x` to itself, or to a cache that it is first written into.

        Args:
            x: `[B, T, D]`.
            rope: Cosines and sines, see `rope_tables`.
            bias: See `attention_bias`; `S` is `T`, or the cache's length.
            kv: Cached keys and values, each `[B, S, K, H]`, or `None`.
            slot: int32 scalar, the first slot of the cache to write.

        Returns:
            `[B, T, D]` and the updated `kv`.
        """
        batch, length, _ = x.shape
        q = self.q_proj(x).reshape(batch, length, self.heads, self.head_dim)
        k = self.k_proj(x).reshape(batch, length, self.kv_heads, self.head_dim)
        v = self.v_proj(x).reshape(batch, length, self.kv_heads, self.head_dim)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if kv is not None:
            k = lax.dynamic_update_slice_in_dim(kv[0], k, slot, axis=1)
            v = lax.dynamic_update_slice_in_dim(kv[1], v, slot, axis=1)
            kv = (k, v)
        out = attend(q, k, v, bias)
        return self.o_proj(out.reshape(batch, length, self.heads * self.head_dim)), kv
