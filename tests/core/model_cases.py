"""The table's models: Flax linen, Flax NNX, Haiku and Equinox, as their users write them."""

from __future__ import annotations

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from .cases import IDS, KEY, X, case, cast, normal

IMAGE = normal("image", 2, 8, 8, 3)
SEQUENCE = normal("sequence", 2, 5, 12)


def linen(module, *args, mutable=False):
    variables = module.init(KEY, *args)

    def fn(variables, *args):
        return module.apply(variables, *args, mutable=mutable)

    return fn, variables, args


@case({"params/Dense_0/kernel": "in, out", "params/Dense_1/kernel": "in, out"}, targets="*/kernel")
def linen_dense():
    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(7)(nn.relu(nn.Dense(9)(x)))

    return linen(Mlp(), X)


@case({"params/kernel": "in, in, out, out"}, targets="*kernel")
def linen_dense_general():
    return linen(nn.DenseGeneral((3, 4), axis=(-2, -1)), normal("x3", 5, 3, 4))


@case(targets="*kernel")
def linen_conv_with_batch_statistics():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(8, (3, 3), strides=2)(x)
            x = nn.BatchNorm(use_running_average=False)(x)
            x = nn.ConvTranspose(6, (3, 3))(nn.relu(x))
            return nn.Conv(12, (3, 3), feature_group_count=6)(x).mean((1, 2))

    return linen(Net(), IMAGE, mutable=["batch_stats"])


@case({"params/embed/embedding": "in, out", "params/mix/kernel": "in, out"},
      targets=("*/embedding", "*/kernel"))  # fmt: skip
def linen_embed_attend():
    class Model(nn.Module):
        def setup(self):
            self.embed = nn.Embed(11, 6)
            self.mix = nn.Dense(6)

        def __call__(self, ids):
            return self.embed.attend(jnp.tanh(self.mix(self.embed(ids))))

    return linen(Model(), IDS)


@case({"params/query/kernel": "in, out, out", "params/value/kernel": "in, out, out",
       "params/out/kernel": "in, in, out"},
      targets=("*/query/kernel", "*/value/kernel", "*/out/kernel"))  # fmt: skip
def linen_attention():
    return linen(nn.MultiHeadDotProductAttention(num_heads=3), SEQUENCE)


@case({"params/layers/Dense_0/kernel": "batch, in, out"}, targets="*/kernel")
def linen_scan_remat():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.tanh(nn.Dense(6)(x)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return layers(name="layers")(x, None)[0]

    return linen(Stack(), X)


@case(targets="*/kernel")
def linen_scan_on_axis_1():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(nn.Dense(6)(x)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                Layer, variable_axes={"params": 1}, split_rngs={"params": True}, length=3
            )
            return layers(name="layers")(x, None)[0]

    return linen(Stack(), X)


@case(targets="*/kernel")
def linen_dropout():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            x = nn.Dropout(0.5, deterministic=not train)(nn.Dense(8)(x))
            return nn.Dense(7)(x)

    module = Net()
    variables = module.init(KEY, X, train=False)

    def fn(variables, x, key):
        return module.apply(variables, x, train=True, rngs={"dropout": key})

    return fn, variables, (X, jax.random.key(3))


@case(targets="*kernel")
def linen_lstm():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            zeros = jnp.zeros_like(x[:, 0])
            return nn.RNN(nn.LSTMCell(6))(x, initial_carry=(zeros, zeros))

    return linen(Net(), normal("frames", 2, 4, 6))


def split_nnx(model, *args):
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def fn(params, *args):
        return nnx.merge(graph, params, rest, copy=True)(*args)

    return fn, params, args


@case({"first/kernel": "in, out", "second/kernel": "in, out"}, targets="*/kernel")
def nnx_linear():
    class Mlp(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(6, 9, rngs=rngs)
            self.second = nnx.Linear(9, 7, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.first(x)))

    return split_nnx(Mlp(nnx.Rngs(0)), X)


@case({"general/kernel": "in, in, out, out", "einsum/kernel": "in, in, out"}, targets="*/kernel")
def nnx_general_and_einsum():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.general = nnx.LinearGeneral((3, 4), (2, 5), axis=(-2, -1), rngs=rngs)
            self.einsum = nnx.Einsum("bhk,hkd->bd", (2, 5, 7), rngs=rngs)

        def __call__(self, x):
            return self.einsum(jnp.tanh(self.general(x)))

    return split_nnx(Model(nnx.Rngs(0)), normal("x3", 5, 3, 4))


@case(targets="*kernel")
def nnx_conv():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.back = nnx.ConvTranspose(8, 6, (3, 3), rngs=rngs)

        def __call__(self, x):
            return self.back(self.norm(self.conv(x), use_running_average=True)).mean((1, 2))

    return split_nnx(Model(nnx.Rngs(0)), IMAGE)


@case({"embed/embedding": "in, out"}, targets="*embedding")
def nnx_embed():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(11, 6, rngs=rngs)

        def __call__(self, ids):
            return self.embed.attend(jnp.tanh(self.embed(ids)))

    return split_nnx(Model(nnx.Rngs(0)), IDS)


@case({"query/kernel": "in, out, out", "key/kernel": "in, out, out",
       "value/kernel": "in, out, out", "out/kernel": "in, in, out"}, targets="*/kernel",
      jax_cannot=("float16",))  # fmt: skip
def nnx_attention():
    attention = nnx.MultiHeadAttention(3, 12, decode=False, rngs=nnx.Rngs(0))
    return split_nnx(attention, SEQUENCE)


@case({"layers/linear/kernel": "batch, in, out"}, targets="*/kernel")
def nnx_scan():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(6, 6, rngs=rngs)

        def __call__(self, x):
            return jnp.tanh(self.linear(x))

    class Stack(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.vmap(lambda key: Layer(nnx.Rngs(key)))(jax.random.split(KEY, 3))

        def __call__(self, x):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            def forward(x, layer):
                return layer(x)

            return forward(x, self.layers)

    return split_nnx(Stack(nnx.Rngs(0)), X)


@case(targets="*kernel")
def nnx_scan_remat():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(6, 6, rngs=rngs)

        @nnx.remat
        def __call__(self, x):
            return jnp.tanh(self.linear(x))

    class Stack(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.vmap(lambda key: Layer(nnx.Rngs(key)))(jax.random.split(KEY, 3))

        def __call__(self, x):
            scanned = nnx.scan(
                lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
            )
            return scanned(x, self.layers)

    return split_nnx(Stack(nnx.Rngs(0)), X)


@case(targets="*/w")
def haiku_attention():
    def forward(x):
        x = hk.MultiHeadAttention(3, 4, w_init=hk.initializers.VarianceScaling())(x, x, x)
        return hk.nets.MLP([8, 6])(x)

    pure = hk.without_apply_rng(hk.transform(forward))
    return pure.apply, pure.init(KEY, SEQUENCE), (SEQUENCE,)


@case(targets=("*/w", "*embeddings"))
def haiku_conv_and_embed():
    def forward(image, ids):
        x = hk.Conv2D(8, 3, stride=2)(image).mean((1, 2))
        return hk.Linear(6)(x)[:, None] + hk.Embed(11, 6)(ids)

    pure = hk.without_apply_rng(hk.transform(forward))
    return pure.apply, pure.init(KEY, IMAGE, IDS), (IMAGE, IDS)


@case({"layers/0/weight": "out, in", "layers/1/weight": "out, in"}, targets="*/weight")
def equinox_mlp():
    model = eqx.nn.MLP(6, 7, 9, 1, key=KEY)
    return lambda model, x: jax.vmap(model)(x), model, (X,)


@case({"query_proj/weight": "out, in", "key_proj/weight": "out, in",
       "value_proj/weight": "out, in", "output_proj/weight": "out, in"},
      targets="*_proj/weight")  # fmt: skip
def equinox_attention():
    model = eqx.nn.MultiheadAttention(3, 12, key=KEY)
    return lambda model, x: jax.vmap(lambda s: model(s, s, s))(x), model, (SEQUENCE,)


@case(targets="*weight", exclude=("norm/*",))
def equinox_conv_and_embedding():
    class Model(eqx.Module):
        conv: eqx.nn.Conv1d
        norm: eqx.nn.LayerNorm
        table: eqx.nn.Embedding
        cell: eqx.nn.GRUCell

        def __call__(self, x, ids):
            x = self.norm(self.conv(x).mean(1))
            rows = jax.vmap(self.table)(ids)
            return jax.lax.scan(lambda h, row: (self.cell(row, h), None), x, rows)[0]

    a, b, c = jax.random.split(KEY, 3)
    model = Model(
        eqx.nn.Conv1d(5, 6, 3, key=a),
        eqx.nn.LayerNorm(6),
        eqx.nn.Embedding(11, 6, key=b),
        eqx.nn.GRUCell(6, 6, key=c),
    )
    model = eqx.tree_at(lambda m: m.cell.weight_hh, model, replace_fn=lambda w: w * 1.5)
    return (
        lambda model, x, ids: jax.vmap(model)(x, ids),
        cast(model, jnp.float32),
        (SEQUENCE, IDS),
    )
