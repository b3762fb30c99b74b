"""The programs that the benchmarks and the cost tests compare: lifted, and written by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import lora_jax as lora

LAYERS, WIDTH, RANK, BATCH = 8, 1024, 16, 256
SCALE = 2.0


def dense_stack(params: list[jax.Array], x: jax.Array) -> jax.Array:
    """L dense layers `[d, d]` with a ReLU, unrolled; x is `[batch, d]`."""
    for kernel in params:
        x = jax.nn.relu(x @ kernel)
    return x


def dense_stack_by_hand(
    params: list[jax.Array], adapter: list[tuple[jax.Array, jax.Array]], x: jax.Array
) -> jax.Array:
    """The same with low-rank adapters, as one would write it into the model."""
    for kernel, (a, b) in zip(params, adapter, strict=True):
        x = jax.nn.relu(x @ kernel + SCALE * (x @ a) @ b)
    return x


def dense_stack_arguments() -> tuple[Any, Any, Any, Any]:
    """Abstract `(params, lifted adapter, hand-written adapter, x)`."""
    kernel = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)
    x = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)
    params = [kernel] * LAYERS
    config = lora.LoraConfig(rank=RANK, alpha=SCALE * RANK, targets="all-linear")
    adapter = jax.eval_shape(lambda key: lora.init(key, config, dense_stack, params, x), _key())
    a = jax.ShapeDtypeStruct((WIDTH, RANK), jnp.float32)
    b = jax.ShapeDtypeStruct((RANK, WIDTH), jnp.float32)
    return params, adapter, [(a, b)] * LAYERS, x


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def dense_stack_steps() -> dict[str, Any]:
    """Compiled `value_and_grad` of the stack: full, hand-written and lifted; and the forward."""
    params, adapter, by_hand, x = dense_stack_arguments()
    lifted = lora.lift(dense_stack)

    def compiled(function: Any, *args: Any) -> Any:
        return jax.jit(function).lower(*args).compile()

    def loss(y: jax.Array) -> jax.Array:
        return (y**2).mean()

    return {
        "forward": compiled(lambda p, x: loss(dense_stack(p, x)), params, x),
        "full": compiled(
            jax.value_and_grad(lambda p, x: loss(dense_stack(p, x))), params, x
        ),
        "by hand": compiled(
            jax.value_and_grad(lambda a, p, x: loss(dense_stack_by_hand(p, a, x))),
            by_hand, params, x,
        ),
        "lifted": compiled(
            jax.value_and_grad(lambda a, p, x: loss(lifted(lora.combine(p, a), x))),
            adapter, params, x,
        ),
    }  # fmt: skip


def transformer_layer(layer: dict[str, jax.Array], x: jax.Array, adapt: Any) -> jax.Array:
    """One pre-norm decoder layer; `adapt(name, x)` multiplies with the kernel of that name."""
    heads = 8
    batch, length, width = x.shape

    def norm(x: jax.Array) -> jax.Array:
        return x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    h = norm(x)
    q, k, v = (adapt(name, h).reshape(batch, length, heads, -1) for name in ("q", "k", "v"))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (width // heads) ** -0.5
    mask = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, width)
    x = x + adapt("o", mixed)
    h = norm(x)
    return x + adapt("down", jax.nn.silu(adapt("gate", h)) * adapt("up", h))


def transformer(params: Any, x: jax.Array, *, scan: bool) -> jax.Array:
    """A stack of decoder layers, unrolled (a list) or scanned (stacked kernels)."""

    def layer(x: jax.Array, kernels: Any) -> jax.Array:
        return transformer_layer(kernels, x, lambda name, h: h @ kernels[name])

    if scan:
        return lax.scan(lambda x, kernels: (layer(x, kernels), None), x, params)[0]
    for kernels in params:
        x = layer(x, kernels)
    return x


def transformer_by_hand(params: Any, adapter: Any, x: jax.Array, *, scan: bool) -> jax.Array:
    """The same with adapters written into the layer."""

    def layer(x: jax.Array, both: Any) -> jax.Array:
        kernels, factors = both

        def adapt(name: str, h: jax.Array) -> jax.Array:
            a, b = factors[name]
            return h @ kernels[name] + SCALE * (h @ a) @ b

        return transformer_layer(kernels, x, adapt)

    if scan:
        return lax.scan(lambda x, both: (layer(x, both), None), x, (params, adapter))[0]
    for both in zip(params, adapter, strict=True):
        x = layer(x, both)
    return x


def transformer_arguments(layers: int, width: int, *, scan: bool) -> tuple[Any, Any, Any, Any]:
    """Abstract `(params, lifted adapter, hand-written adapter, x)` for `transformer`."""
    shapes = dict.fromkeys("qkvo", (width, width))
    shapes |= {"gate": (width, 3 * width), "up": (width, 3 * width), "down": (3 * width, width)}
    stack = (layers,) if scan else ()

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*stack, *shape), jnp.float32)

    kernels = {name: array(*shape) for name, shape in shapes.items()}
    factors = {name: (array(i, RANK), array(RANK, o)) for name, (i, o) in shapes.items()}
    params, by_hand = (kernels, factors) if scan else ([kernels] * layers, [factors] * layers)
    x = jax.ShapeDtypeStruct((4, 128, width), jnp.float32)
    config = lora.LoraConfig(rank=RANK, alpha=SCALE * RANK, targets="all-linear")
    adapter = jax.eval_shape(
        lambda key: lora.init(key, config, transformer, params, x, scan=scan), _key()
    )
    return params, adapter, by_hand, x
