"""The programs that the benchmarks and the cost tests compare, and what to compile them for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import lora_jax as lora
from lora_jax.planning.chips import parse_topology, tpu_mesh

LAYERS, WIDTH, RANK, BATCH = 8, 1024, 16, 256
QUANTIZED_WIDTH = 2048
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


def scanned_stack(kernels: jax.Array, x: jax.Array) -> jax.Array:
    """`dense_stack` scanned, its kernels one array `[L, d, d]`."""
    return lax.scan(lambda x, kernel: (jax.nn.relu(x @ kernel), None), x, kernels)[0]


class Frozen(NamedTuple):
    """A stack of dense layers to be adapted, 16-bit and 4-bit; all arrays are abstract.

    Attributes:
      forward: `(adapted kernels, x) -> y`, lifted.
      loss: `(adapter, kernels, x) -> mean of y ** 2`.
      kernels: what stands for them, by name: "dense" in the model's dtype, "nf4" quantized.
      adapter: low-rank, on all of them.
      x: `[batch, d]`.
    """

    forward: Callable[..., Any]
    loss: Callable[..., Any]
    kernels: dict[str, Any]
    adapter: Any
    x: jax.ShapeDtypeStruct


def frozen_stack(dtype: Any, *, scan: bool = True, batch: int = BATCH) -> Frozen:
    """`LAYERS` layers of `QUANTIZED_WIDTH`, rank `RANK`, in a model of that dtype."""
    width = QUANTIZED_WIDTH
    function: Any = scanned_stack if scan else dense_stack
    kernels: Any = (
        jax.ShapeDtypeStruct((LAYERS, width, width), dtype) if scan
        else [jax.ShapeDtypeStruct((width, width), dtype)] * LAYERS
    )  # fmt: skip
    x = jax.ShapeDtypeStruct((batch, width), dtype)
    config = lora.LoraConfig(rank=RANK, alpha=SCALE * RANK, targets="*")
    adapter = jax.eval_shape(lambda key: lora.init(key, config, function, kernels, x), _key())
    forward = lora.lift(function)

    def loss(adapter: Any, kernels: Any, x: jax.Array) -> jax.Array:
        return (forward(lora.combine(kernels, adapter), x).astype(jnp.float32) ** 2).mean()

    both = {"dense": kernels, "nf4": lora.quantize(function, kernels, x)}
    return Frozen(forward, loss, both, adapter, x)


def frozen_step(stack: Frozen, kind: str, sharding: Any = None) -> Any:
    """Compiled `value_and_grad` with respect to the adapter.

    Args:
      stack: the program.
      kind: which of its kernels.
      sharding: of every argument and result; None for the default device.
    """
    step = jax.jit(jax.value_and_grad(stack.loss), in_shardings=sharding, out_shardings=sharding)
    return step.lower(stack.adapter, stack.kernels[kind], stack.x).compile()


def base_argument_bytes(stack: Frozen, compiled: Any) -> int:
    """What of a compiled step's arguments is the frozen base."""
    other = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stack[-2:]))
    return compiled.memory_analysis().argument_size_in_bytes - other


def tpu_v5e() -> NamedSharding | None:
    """All on one chip of a TPU v5e, to compile for without having one; None without libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        return None
    return NamedSharding(tpu_mesh(parse_topology("v5e:1x1"), {"chip": 1}), PartitionSpec())


WITHOUT_LIBTPU = "not compiled for TPU v5e: no libtpu; pip install 'lora_jax[tpu-aot]'"
