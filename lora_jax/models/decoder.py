"""One decoder for Llama, Mistral, SmolLM2, Qwen2 and Qwen3, and its functional form."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from lora_jax.models.attention import Attention, attention_bias
from lora_jax.models.cache import Cache
from lora_jax.models.config import DecoderConfig
from lora_jax.models.partition import ROWS, hold
from lora_jax.models.rope import rope_tables

Params = dict[str, Any]


class MLP(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        linear = functools.partial(
            nnx.Linear,
            use_bias=False,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.dtype),
            kernel_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, T, D]` to `[B, T, D]`."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    """Attention and MLP, each normalised before and added after."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.input_norm = _norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.post_attention_norm = _norm(config, rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x, rope, bias, kv=None, slot: jax.Array | int = 0):
        """See `Attention.__call__` for the arguments; returns `[B, T, D]` and `kv`."""
        y, kv = self.attention(self.input_norm(x), rope, bias, kv, slot)
        x = x + y
        return x + self.mlp(self.post_attention_norm(x)), kv


class Decoder(nnx.Module):
    """A causal language model.

    Parameter paths: `embed/embedding` (V, D), `layers/0/attention/q_proj/kernel` (in, out),
    `layers/0/mlp/gate_proj/kernel`, `layers/0/input_norm/scale`,
    `layers/0/post_attention_norm/scale`, `norm/scale`, `lm_head/kernel` (D, V). With
    `scan_layers` it is `layers/attention/q_proj/kernel` (L, in, out), and so on.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.config = config
        self.embed = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=dtype,
            param_dtype=dtype,
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        self.layers: Any
        if config.scan_layers:

            @nnx.split_rngs(splits=config.num_layers)
            @nnx.vmap
            def stacked(rngs: nnx.Rngs) -> Layer:
                return Layer(config, rngs=rngs)

            self.layers = stacked(rngs)
        else:
            self.layers = nnx.List([Layer(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = _norm(config, rngs)
        if not config.tied_head:
            self.lm_head = nnx.Linear(
                config.hidden_size,
                config.vocab_size,
                use_bias=False,
                dtype=dtype,
                param_dtype=dtype,
                preferred_element_type=jnp.float32,
                kernel_init=nnx.initializers.normal(0.02),
                rngs=rngs,
            )

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        select: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> jax.Array | tuple[jax.Array, Cache]:
        """Computes logits; see `apply`."""
        _check(tokens, positions=positions, segment_ids=segment_ids, select=select, cache=cache)
        length = tokens.shape[1]
        start = 0 if cache is None else cache.length
        slots = start + jnp.arange(length, dtype=jnp.int32)
        if positions is None:
            positions = slots[None]
        if cache is not None:
            cache = _record(cache, positions, segment_ids, tokens.shape)
        rope = rope_tables(self.config, positions)
        biases = self._biases(slots, positions, segment_ids, cache)

        x = self._embed(tokens)
        if self.config.scan_layers:
            x, kv = self._scan(x, rope, biases, cache)
        else:
            x, kv = self._unroll(x, rope, biases, cache)
        if select is not None:
            x = jnp.take_along_axis(x, select[:, :, None], axis=1)
        logits = hold(self._logits(self.norm(x)), ROWS, None, "tensor")
        if cache is None:
            return logits
        return logits, dataclasses.replace(
            cache, keys=kv[0], values=kv[1], length=cache.length + length
        )

    def _embed(self, tokens):
        # Each device looks up its part of every row's vectors; then rows are exchanged for parts.
        x = self.embed(hold(tokens, "data"))
        return hold(hold(x, "data", None, "fsdp"), ROWS)

    def _biases(self, slots, positions, segment_ids, cache) -> list[jax.Array]:
        """Returns one bias for layers without a window and one for those with it, if any."""
        if cache is None:
            keys = {"key_slots": slots, "key_positions": positions, "key_segments": segment_ids}
        else:
            stored = jnp.arange(cache.positions.shape[1], dtype=jnp.int32)
            keys = {
                "key_slots": stored,
                "key_positions": cache.positions,
                "key_segments": cache.segment_ids,
            }
            if segment_ids is None:
                segment_ids = jnp.ones_like(positions)
        config = self.config
        windows: list[int | None] = []
        if config.sliding_window is None or config.first_sliding_layer > 0:
            windows.append(None)
        if config.sliding_window is not None:
            windows.append(config.sliding_window)
        return [
            attention_bias(
                slots,
                query_positions=positions,
                query_segments=segment_ids,
                window=window,
                **keys,
            )
            for window in windows
        ]

    def _unroll(self, x, rope, biases, cache):
        keys, values = [], []
        for index, layer in enumerate(self.layers):
            bias = biases[-1] if index >= self.config.first_sliding_layer else biases[0]
            run = functools.partial(_rematted, *nnx.split(layer)) if self.config.remat else layer
            if cache is None:
                x, _ = run(x, rope, bias)
                x = hold(x, ROWS)
                continue
            kv = (cache.keys[index], cache.values[index])
            x, kv = run(x, rope, bias, kv, cache.length)
            x = hold(x, ROWS)
            keys.append(kv[0])
            values.append(kv[1])
        return x, (tuple(keys), tuple(values))

    def _scan(self, x, rope, biases, cache):
        graphdef, state = nnx.split(self.layers)
        run = _rematted if self.config.remat else _run
        sliding = None
        if len(biases) == 2:
            sliding = jnp.arange(self.config.num_layers) >= self.config.first_sliding_layer
        kv = None if cache is None else (cache.keys, cache.values)
        slot = 0 if cache is None else cache.length

        def body(x, per_layer):
            state, kv, slides = per_layer
            bias = biases[0] if slides is None else jnp.where(slides, biases[1], biases[0])
            x, kv = run(graphdef, state, x, rope, bias, kv, slot)
            return hold(x, ROWS), kv

        return lax.scan(body, x, (state, kv, sliding))

    def _logits(self, x: jax.Array) -> jax.Array:
        # Gathered before the product: XLA would rather gather the gradient of all rows' logits.
        if self.config.tied_head:
            kernel, contracted = hold(self.embed.embedding[...], "tensor", None), 1
        else:
            kernel, contracted = hold(self.lm_head.kernel[...], None, "tensor"), 0
        return lax.dot_general(
            x, kernel, (((2,), (contracted,)), ((), ())), preferred_element_type=jnp.float32
        )


def init_params(key: jax.Array, config: DecoderConfig) -> Params:
    """Returns fresh parameters: kernels and embedding from N(0, 0.02^2), norms one, biases zero.

    Args:
        key: PRNG key.
        config: The decoder.

    Returns:
        Nested dict of arrays; the keys are those of the paths in `Decoder`.
    """

    @jax.jit
    def init(key):
        return _to_params(nnx.state(Decoder(config, rngs=nnx.Rngs(params=key))))

    return init(key)


def abstract_params(config: DecoderConfig) -> Params:
    """Returns the shapes and dtypes of `init_params`'s result; no memory is allocated.

    Args:
        config: The decoder.

    Returns:
        Nested dict of `jax.ShapeDtypeStruct`.
    """
    return _to_params(_abstract(config)[1])


def apply(
    config: DecoderConfig,
    params: Params,
    tokens: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    select: jax.Array | None = None,
    cache: Cache | None = None,
) -> jax.Array | tuple[jax.Array, Cache]:
    """Computes the logits of the token after each token.

    Args:
        config: The decoder. `functools.partial(apply, config)` is a function of params.
        params: Nested dict as from `init_params`.
        tokens: int32 `[B, T]`.
        positions: int32 `[B, T]`, for the rotary embedding; default `0 .. T - 1`, or counted on
            from what the cache holds.
        segment_ids: int32 `[B, T]`; a token sees earlier tokens of its own id only, so several
            sequences can share a row. 0 marks padding. Default: all one segment (id 1).
        select: int32 `[B, K]`, the indices at which logits are computed; default all.
        cache: Keys and values of the tokens before; `tokens` are appended to it. It must have
            room for them.

    Returns:
        float32 `[B, T, V]`, or `[B, K, V]` with `select`; with `cache`, the pair
        `(logits, cache)`.

    Raises:
        ValueError: If an array's shape or dtype does not fit.

    >>> config = DecoderConfig(
    ...     vocab_size=64, hidden_size=8, intermediate_size=16, num_layers=2,
    ...     num_heads=2, num_kv_heads=1, head_dim=4, scan_layers=True)
    >>> params = init_params(jax.random.key(0), config)
    >>> tokens = jnp.ones((2, 5), jnp.int32)
    >>> apply(config, params, tokens, select=jnp.array([[4], [2]])).shape
    (2, 1, 64)
    """
    if not config.scan_layers:
        layers = {int(index): layer for index, layer in params["layers"].items()}
        params = {**params, "layers": layers}
    model = nnx.merge(_abstract(config)[0], params)
    return model(tokens, positions=positions, segment_ids=segment_ids, select=select, cache=cache)


@functools.lru_cache(maxsize=16)
def _abstract(config: DecoderConfig):
    """The module's structure and abstract state: the same for every call with one config."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=0))))


def _to_params(state: nnx.State) -> Params:
    # String keys, because paths and checkpoints have no other.
    def strings(node):
        if isinstance(node, dict):
            return {str(key): strings(child) for key, child in node.items()}
        return node

    return strings(nnx.to_pure_dict(state))


def _norm(config: DecoderConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    dtype = jnp.dtype(config.dtype)
    return nnx.RMSNorm(
        config.hidden_size, epsilon=config.norm_eps, dtype=dtype, param_dtype=dtype, rngs=rngs
    )


def _run(graphdef, state, *args):
    return nnx.merge(graphdef, state)(*args)


_rematted = jax.checkpoint(_run, static_argnums=0)


def _record(cache: Cache, positions, segment_ids, shape) -> Cache:
    """Writes which tokens the new slots hold."""
    if segment_ids is None:
        segment_ids = jnp.ones(shape, jnp.int32)
    write = functools.partial(lax.dynamic_update_slice_in_dim, start_index=cache.length, axis=1)
    return dataclasses.replace(
        cache,
        positions=write(cache.positions, jnp.broadcast_to(positions, shape)),
        segment_ids=write(cache.segment_ids, segment_ids),
    )


def _check(tokens, *, positions, segment_ids, select, cache) -> None:
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens: expected integers [batch, length], got {tokens.dtype}{list(tokens.shape)}."
        )
    for name, array in (("positions", positions), ("segment_ids", segment_ids)):
        if array is not None and array.shape != tokens.shape:
            raise ValueError(
                f"{name}: expected the shape of tokens, {list(tokens.shape)}, got "
                f"{list(array.shape)}."
            )
    if select is not None and (
        select.ndim != 2
        or select.shape[0] != tokens.shape[0]
        or not jnp.issubdtype(select.dtype, jnp.integer)
    ):
        raise ValueError(
            f"select: expected integers [{tokens.shape[0]}, k], got "
            f"{select.dtype}{list(select.shape)}."
        )
    if cache is not None and (
        cache.positions.shape[0] != tokens.shape[0] or cache.positions.shape[1] < tokens.shape[1]
    ):
        raise ValueError(
            f"cache: expected {tokens.shape[0]} rows and at least {tokens.shape[1]} slots, got "
            f"{list(cache.positions.shape)}; make one with init_cache."
        )
