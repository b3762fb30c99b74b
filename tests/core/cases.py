"""One table of functions that use weights in every way that adapters cover.

Each case builds `(fn, params, args)`; `axes` is what tracing must find for each adapted leaf.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import lora_jax as lora

KEY = jax.random.key(7)
CASES: dict[str, Case] = {}


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], tuple[Callable[..., Any], Any, tuple[Any, ...]]]
    axes: dict[str, str] | None = None
    targets: Any = "*"
    exclude: tuple[str, ...] = ()
    rank: int = 2
    forms_base: bool = False  # Whether a quantized base would have to be formed outside a product.
    jax_cannot: tuple[str, ...] = ()  # What JAX refuses to do with the plain function, too.

    @property
    def config(self) -> lora.LoraConfig:
        return lora.LoraConfig(rank=self.rank, alpha=3, targets=self.targets, exclude=self.exclude)

    def setup(self, dtype: Any = None):
        """`(fn, params, args, adapter)` with an adapter whose leaves are all random."""
        fn, params, args = self.build()
        if dtype is not None:
            params, args = cast((params, args), dtype)
        adapter = jax.eval_shape(lambda: lora.init(KEY, self.config, fn, params, *args))
        return fn, params, args, random_like(adapter)


def case(axes: str | dict[str, str] | None = None, **options: Any):
    """Adds the decorated builder to the table."""

    def add(build: Callable[[], Any]) -> Callable[[], Any]:
        found = {"w": axes} if isinstance(axes, str) else axes
        name = build.__name__
        CASES[name] = Case(name, functools.cache(build), found, **options)
        return build

    return add


def normal(name: str, *shape: int) -> jax.Array:
    """A fixed array of standard normal values."""
    values = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    return jnp.asarray(values, jnp.float32)


def cast(tree: Any, dtype: Any) -> Any:
    def one(leaf: Any) -> Any:
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(np.asarray(leaf).astype(dtype))
        return leaf

    return jax.tree.map(one, tree)


def random_like(adapter: Any, seed: int = 0, scale: float = 0.3) -> Any:
    """An adapter of random values, made with NumPy since nothing needs compiling then."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray((generator.normal(size=x.shape) * scale).astype(x.dtype)), adapter
    )


X = normal("x", 5, 6)


def with_w(fn: Callable[..., Any], *shape: int, args: tuple[Any, ...] = (X,)):
    return lambda p, *a: fn(p["w"], *a), {"w": normal("w", *shape)}, args


# Products, from either side, with any number of axes.


@case("in, out")
def matmul():
    return with_w(lambda w, x: x @ w, 6, 8)


@case("out, in")
def matmul_weight_left():
    return with_w(lambda w, x: w @ x, 8, 6, args=(X.T,))


@case("out, in")
def matmul_transposed():
    return with_w(lambda w, x: x @ w.T, 8, 6)


@case("in, out")
def einsum_weight_left():
    return with_w(lambda w, x: jnp.einsum("io,bi->bo", w, x), 6, 8)


@case("in, out, out")
def several_out_axes():
    return with_w(lambda w, x: jnp.einsum("bd,dhk->bhk", x, w), 6, 3, 4)


@case("in, in, out")
def several_in_axes():
    return with_w(
        lambda w, x: jnp.einsum("bhk,hkd->bd", x, w), 3, 4, 6, args=(normal("x3", 5, 3, 4),)
    )


@case("in, out, in, out")
def interleaved_axes():
    return with_w(
        lambda w, x: jnp.einsum("bhk,hdke->bed", x, w), 3, 5, 4, 2, args=(normal("x3", 5, 3, 4),)
    )


@case("in, out, out")
def axes_merged():
    return with_w(lambda w, x: x @ w.reshape(6, 12), 6, 3, 4)


@case("in, out")
def axes_split():
    return with_w(lambda w, x: jnp.einsum("bd,dhk->bhk", x, w.reshape(6, 4, 2)), 6, 8)


@case("in, out")
def axis_split_and_used_as_batch():
    """As in multi-head latent attention: heads are a batch of one kernel axis."""

    def fn(w, x):
        return jnp.einsum("bhd,chd->bhc", x, w.reshape(7, 3, 4))

    fn_, params, args = with_w(lambda w, x: fn(w.T, x), 12, 7, args=(normal("x3", 5, 3, 4),))
    return fn_, params, args


@case("in, out")
def vector_input():
    return with_w(lambda w, x: x[0] @ w, 6, 8)


@case("in, out")
def added_axis():
    return with_w(lambda w, x: jnp.matmul(x[None], jnp.broadcast_to(w, (3, 6, 8))), 6, 8)


@case({"a": "out, in", "b": "in, out"})
def product_of_two_weights():
    params = {"a": normal("a", 6, 7), "b": normal("b", 7, 8)}
    return lambda p, x: x @ (p["a"] @ p["b"]), params, (X,)


@case("in, out")
def used_twice():
    return with_w(lambda w, x: jnp.tanh(x @ w) @ w, 6, 6)


# Batch axes.


@case("batch, in, out")
def experts():
    return with_w(
        lambda w, x: jnp.einsum("ebi,eio->ebo", x, w), 3, 6, 8, args=(normal("xe", 3, 5, 6),)
    )


@case("batch, in, out", jax_cannot=("vmap", "pmap"))
def experts_ragged():
    sizes = jnp.array([1, 0, 4])
    return with_w(lambda w, x: lax.ragged_dot(x, w, sizes), 3, 6, 8)


@case("batch, in, out")
def expert_for_each_row():
    index = jnp.array([0, 2, 1, 1, 0])
    return with_w(lambda w, x: jnp.einsum("bi,bio->bo", x, w[index]), 3, 6, 8)


@case("batch, in, out")
def indexed_in_a_python_loop():
    def fn(w, x):
        for layer in range(3):
            x = jnp.tanh(x @ w[layer])
        return x

    return with_w(fn, 3, 6, 6)


@case("batch, in, out")
def indexed_before_the_first():
    """JAX counts a negative index from the end once, and then clamps it."""
    fn = lambda w, x, i: x @ lax.dynamic_index_in_dim(w, i, keepdims=False)  # noqa: E731
    return with_w(fn, 3, 6, 8, args=(X, jnp.array(-4)))


@case("batch, in, out")
def indexed_in_a_fori_loop():
    return with_w(lambda w, x: lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ w[i]), x), 3, 6, 6)


@case("batch, in, out")
def vmapped_with_the_weight():
    return with_w(lambda w, x: jax.vmap(jnp.matmul)(x, w), 3, 6, 8, args=(normal("xe", 3, 5, 6),))


@case("in, out")
def vmapped_over_the_input():
    return with_w(lambda w, x: jax.vmap(lambda row: row @ w)(x), 6, 8)


# Convolutions.


def convolution(*kernel: int, x: tuple[int, ...], **options: Any):
    space = "DHW"[-(len(kernel) - 2) :]
    options.setdefault("dimension_numbers", (f"N{space}C", f"{space}IO", f"N{space}C"))
    options.setdefault("window_strides", (1,) * len(space))
    options.setdefault("padding", "SAME")
    run = lambda w, x: lax.conv_general_dilated(x, w, **options)  # noqa: E731
    return with_w(run, *kernel, args=(normal("image", *x),))


@case("in, in, out")
def conv_1d_strided():
    return convolution(3, 6, 8, x=(2, 10, 6), window_strides=(2,))


@case("in, in, in, out")
def conv_2d_dilated():
    return convolution(3, 2, 6, 8, x=(2, 9, 9, 6), rhs_dilation=(1, 2), padding="VALID")


@case("out, in, in, in")
def conv_2d_channels_first():
    return convolution(
        8, 6, 3, 3, x=(2, 6, 7, 7), dimension_numbers=("NCHW", "OIHW", "NCHW"),
        window_strides=(2, 1),
    )  # fmt: skip


@case("in, in, in, in, out")
def conv_3d():
    return convolution(2, 3, 1, 6, 8, x=(2, 4, 5, 3, 6))


@case("in, in, out")
def conv_grouped():
    return convolution(3, 3, 8, x=(2, 10, 6), feature_group_count=2)


@case("in, in, out")
def conv_depthwise():
    return convolution(5, 1, 12, x=(2, 10, 6), feature_group_count=6)


@case("in, in, out")
def conv_transposed():
    image = normal("image", 2, 5, 6)
    return with_w(
        lambda w, x: lax.conv_transpose(
            x, w, (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        3, 6, 8, args=(image,),
    )  # fmt: skip


@case("in, in, out, in")
def conv_transposed_kernel_flipped():
    image = normal("image", 2, 5, 5, 8)
    return with_w(
        lambda w, x: lax.conv_transpose(
            x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), transpose_kernel=True
        ),
        3, 3, 6, 8, args=(image,),
    )  # fmt: skip


@case("in, in, out")
def conv_and_its_transpose_tied():
    numbers = ("NWC", "WIO", "NWC")

    def fn(w, x):
        hidden = jnp.tanh(lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=numbers))
        return lax.conv_transpose(
            hidden, w, (1,), "SAME", dimension_numbers=numbers, transpose_kernel=True
        )

    return with_w(fn, 3, 6, 8, args=(normal("image", 2, 10, 6),))


# Tables.

IDS = jnp.array([[0, 3], [8, 1]])


@case("in, out")
def embedding_take():
    return with_w(lambda w, ids: jnp.take(w, ids, axis=0), 9, 6, args=(IDS,))


@case("in, out")
def embedding_indexed():
    return with_w(lambda w, ids: w[ids], 9, 6, args=(IDS,))


@case("out, in")
def embedding_by_column():
    return with_w(lambda w, ids: jnp.take(w, ids, axis=1), 6, 9, args=(IDS,))


@case("in, out")
def embedding_tied_to_the_head():
    return with_w(lambda w, ids: jnp.tanh(w[ids]) @ w.T, 9, 6, args=(IDS,))


@case("batch, in, out")
def embeddings_vmapped():
    return with_w(lambda w, ids: jax.vmap(lambda t, i: t[i])(w, ids), 2, 9, 6, args=(IDS,))


@case("in, out")
def one_hot():
    return with_w(lambda w, ids: jax.nn.one_hot(ids, 9, dtype=w.dtype) @ w, 9, 6, args=(IDS,))


# What may happen to a weight on its way.


@case("in, out")
def scaled():
    return with_w(
        lambda w, x, s: x @ (2 * (w * s) / 3.0 / s), 6, 8, args=(X, jnp.float32(1.7))
    )  # fmt: skip


@case("in, out")
def negated_copied_marked():
    def fn(w, x):
        w, x = lax.optimization_barrier((jnp.copy(-w), x))
        return x @ jax.ad_checkpoint.checkpoint_name(w, "w")

    import jax.ad_checkpoint

    return with_w(fn, 6, 8)


@case("in, out")
def sliced_reversed_padded():
    return with_w(lambda w, x: x @ jnp.pad(w[::2, ::-1], ((0, 0), (1, 2))), 12, 8)


@case("in, out")
def split_in_three():
    def fn(w, x):
        q, k, v = jnp.split(w, 3, axis=1)
        return (x @ q) * (x @ k) + x @ v

    return with_w(fn, 6, 12)


@case("in, out")
def noise_added():
    noise = normal("noise", 6, 8)
    return with_w(lambda w, x: x @ (w + noise.astype(w.dtype)), 6, 8)


@case("in, out, batch")
def squeezed_and_moved():
    return with_w(lambda w, x: jnp.moveaxis(x @ jnp.squeeze(w[:, :, :1], 2), 0, 1), 6, 8, 3)


@case("in, out")
def array_less_the_weight():
    noise = normal("noise", 6, 8)
    return with_w(lambda w, x: x @ (noise.astype(w.dtype) - w), 6, 8)


@case("in, out")
def inserted_axis_padded():
    """Padding an axis that no factor holds pads the update with zeros, not with copies."""
    wide = lambda w: jnp.pad(w[None], ((1, 1), (0, 0), (0, 0)))  # noqa: E731
    return with_w(lambda w, x: jnp.einsum("bi,lio->lbo", x, wide(w)), 6, 8)


@case({"a": "out, in", "b": "in, out"})
def copies_of_both_weights_contracted():
    params = {"a": normal("a", 6, 8), "b": normal("b", 8, 7)}

    def fn(p, x):
        a, b = jnp.broadcast_to(p["a"], (4, 6, 8)), jnp.broadcast_to(p["b"], (4, 8, 7))
        return x @ jnp.einsum("kio,koj->ij", a, b)

    return fn, params, (X,)


@case("in, out")
def conv_of_an_inserted_axis_strided():
    image = normal("image", 2, 2, 6)
    numbers = ("NWC", "WIO", "NWC")

    def fn(w, x):
        one = lax.conv_general_dilated(x, w[None], (2,), "SAME", dimension_numbers=numbers)
        three = jnp.broadcast_to(w, (3, 6, 8))
        return one, lax.conv_general_dilated(x, three, (1,), ((2, 1),), dimension_numbers=numbers)

    return with_w(fn, 6, 8, args=(image,))


@case("in, out")
def embedding_with_padding_ids():
    """Ids beyond the table give a filler, to which the adapter adds nothing."""
    ids = jnp.array([0, 7, 3, 100])

    def fn(w, ids):
        rows = jnp.take(w, ids, axis=0)
        filled = jnp.take(w, ids, axis=0, mode="fill", fill_value=2.0)
        return jnp.where((ids < 9)[:, None], rows, 0), filled

    return with_w(fn, 9, 6, args=(ids,))


# Control flow.


@case("in, out")
def nested_jit():
    return with_w(lambda w, x: jax.jit(lambda w, x: jax.jit(jnp.matmul)(x, w))(w, x), 6, 8)


@case({"a": "in, out", "b": "in, out"})
def jit_shared_by_layers():
    layer = jax.jit(lambda w, x: (jnp.tanh(x @ w), w.T))

    def fn(p, x):
        x, transposed = layer(p["a"], x)
        x, _ = layer(p["b"], x @ transposed)
        return x

    return fn, {"a": normal("a", 6, 6), "b": normal("b", 6, 6)}, (X,)


@case("batch, in, out")
def scan_over_layers():
    def fn(w, x):
        return lax.scan(lambda c, layer: (jnp.tanh(c @ layer), c.sum()), x, w)

    return with_w(fn, 3, 6, 6)


@case("in, batch, out")
def scan_over_middle_axis():
    def fn(w, x):
        return lax.scan(lambda c, v: (jnp.tanh(c @ v), None), x, jnp.moveaxis(w, 1, 0))[0]

    return with_w(fn, 6, 3, 6)


@case("in, out")
def scan_constant_reversed():
    def fn(w, x):
        return lax.scan(
            lambda c, t: (jnp.tanh(c @ w) + t, c), x, jnp.arange(3.0, dtype=x.dtype), reverse=True
        )

    return with_w(fn, 6, 6)


@case("in, out")
def scan_carry():
    def fn(w, x):
        step = lambda c, _: ((jnp.tanh(c[0] @ c[1]), jnp.copy(c[1])), None)  # noqa: E731
        return lax.scan(step, (x, w), None, length=3)[0][0]

    return with_w(fn, 6, 6)


@case("batch, in, out", forms_base=True)
def scan_returning_weights():
    """As `nnx.scan` does, whose layers come out again, stacked."""

    def fn(w, x, s):
        _, (layers, sums) = lax.scan(lambda c, v: (c, (v * s, v.T)), 0.0, w)
        return jnp.einsum("bi,lio->lbo", x, layers) + jnp.einsum("bi,lio->lbo", x, sums)

    return with_w(fn, 3, 6, 6, args=(X, jnp.float32(0.5)))


@case("in, out")
def fori_loop_constant():
    return with_w(lambda w, x: lax.fori_loop(0, 3, lambda _, c: jnp.tanh(c @ w), x), 6, 6)


@case("in, out")
def cond():
    def fn(w, x, p):
        return lax.cond(p, lambda w: x @ w, lambda w: x @ (2 * w), w)

    return with_w(fn, 6, 8, args=(X, jnp.array(False)))


@case("in, out")
def switch():
    def fn(w, x, i):
        branches = [lambda w: x @ w, lambda w: x @ w.T, lambda w: x * 2]
        return lax.switch(i, branches, w) + x @ lax.cond(i > 0, lambda: -w, lambda: -w)

    return with_w(fn, 6, 6, args=(X, jnp.array(1)))


@case("in, out")
def remat():
    return with_w(jax.checkpoint(lambda w, x: jnp.sin(x @ w) @ w.T), 6, 8)


@case("in, out")
def remat_with_policy():
    policy = jax.checkpoint_policies.dots_saveable
    return with_w(jax.checkpoint(lambda w, x: jnp.sin(x @ w) @ w.T, policy=policy), 6, 8)


@case("batch, in, out")
def scan_of_remat():
    step = jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None))
    return with_w(lambda w, x: lax.scan(step, x, w)[0], 3, 6, 6)


@jax.custom_jvp
def sine_layer(x, w):
    return jnp.sin(x @ w)


@sine_layer.defjvp
def _(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    # Twice the true derivative, so that a test sees whether this rule is the one in force.
    return sine_layer(x, w), 2 * jnp.cos(x @ w) * (dx @ w + x @ dw)


@case("in, out")
def custom_jvp():
    return with_w(lambda w, x: sine_layer(jnp.tanh(x @ w), w), 6, 6)


@jax.custom_vjp
def einsum_layer(x, w, scale):
    return jnp.einsum("bi,io->bo", x, w) * scale


def _forward(x, w, scale):
    return einsum_layer(x, w, scale), (x, w, scale)


def _backward(saved, g):
    x, w, scale = saved
    dx = jnp.einsum("bo,io->bi", g, w) * scale
    return dx, 2 * jnp.einsum("bi,bo->io", x, g) * scale, jnp.zeros_like(scale)


einsum_layer.defvjp(_forward, _backward)


@case("in, out", jax_cannot=("jvp",))
def custom_vjp():
    def fn(w, x, s):
        return einsum_layer(jnp.tanh(einsum_layer(x, w, s)), w, s)

    return with_w(fn, 6, 6, args=(X, jnp.float32(0.7)))


@jax.custom_vjp
def reworked_layer(x, w):
    return x @ w


def _reworked(x, g):
    """A weight gradient that is worked on after the product."""
    dw = (x.T @ g) * jnp.arange(1, g.shape[1] + 1, dtype=g.dtype)
    return jnp.zeros_like(x), dw.reshape(-1).reshape(dw.shape) + jnp.asarray(1e-2, g.dtype)


reworked_layer.defvjp(lambda x, w: (x @ w, x), _reworked)


@case("in, out", jax_cannot=("jvp",))
def custom_vjp_that_reworks_its_product():
    return with_w(lambda w, x: reworked_layer(x, w), 6, 8)


@case("batch, in, out", jax_cannot=("jvp",))
def custom_vjp_in_scan():
    def fn(w, x, s):
        return lax.scan(lambda c, v: (jnp.tanh(einsum_layer(c, v, s)), None), x, w)[0]

    return with_w(fn, 3, 6, 6, args=(X, jnp.float32(0.7)))


def mesh(size: int = 1):
    kinds = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((size,), ("model",), axis_types=kinds, devices=jax.devices()[:size])


P = jax.sharding.PartitionSpec


@case("in, out", jax_cannot=("pmap",))
def shard_map_of_activations():
    def fn(w, x):
        double = jax.shard_map(
            lambda x: 2 * x, mesh=mesh(), in_specs=P("model"), out_specs=P("model")
        )
        return double(x @ w)

    return with_w(fn, 6, 8)


@case("in, out", forms_base=True, jax_cannot=("pmap",))
def shard_map_of_the_weight():
    def fn(w, x):
        product = lambda w, x: lax.psum(x @ w, "model")  # noqa: E731
        specs = (P("model"), P(None, "model"))
        return jax.shard_map(product, mesh=mesh(), in_specs=specs, out_specs=P())(w, x)

    return with_w(fn, 6, 8)


@case("in, out", forms_base=True, jax_cannot=("pmap",))
def shard_map_gathering_the_weight():
    def fn(w, x):
        product = lambda w, x: x @ lax.all_gather(w, "model", axis=0, tiled=True)  # noqa: E731
        specs = (P("model"), P("model"))
        return jax.shard_map(product, mesh=mesh(), in_specs=specs, out_specs=P("model"))(w, x)

    return with_w(fn, 6, 8)


@case("in, out", jax_cannot=("pmap",))
def sharding_constraint():
    sharding = jax.sharding.NamedSharding(mesh(), P(None, "model"))
    return with_w(lambda w, x: x @ lax.with_sharding_constraint(w, sharding), 6, 8)
