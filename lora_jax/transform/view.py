"""What a virtual weight is while it travels through a function: a base and thin factors.

A `View` stands for the array `base + sum over terms of scale * gain * A B`. Each factor names,
for every axis of its array, the axis of the view that it belongs to. So a transposition only
renames, a reshape or a slice touches a factor only where it holds the axis, and every product can
be computed from the factors without ever forming `A B`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters.lora import Lora
from lora_jax.adapters.whole import Whole
from lora_jax.transform.einsum import Named, multiply
from lora_jax.transform.stored import Stored
from lora_jax.tree import Adapted, Packed

RANK = -1

_static = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factor:
    """One factor of an update, or what goes along a weight's axes with it.

    Attributes:
      array: its values.
      dims: for each axis of `array`, the view's axis that it is, or `RANK`.
      split: mesh axes over which a shard_map splits it.
    """

    array: Any
    dims: tuple[int, ...] = dataclasses.field(metadata=_static)
    split: frozenset[str] = dataclasses.field(default=frozenset(), metadata=_static)

    def now(self, array: Any, dims: tuple[int, ...] | None = None) -> Factor:
        """The factor after a change: another array, and other axes of the view if given."""
        return Factor(array, self.dims if dims is None else dims, self.split)

    def renamed(self, new: Callable[[int], int]) -> Factor:
        """The same array, each axis of the view under its new number."""
        return self.now(self.array, tuple(d if d == RANK else new(d) for d in self.dims))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Term:
    """One low-rank update `scale * gain * A B`.

    Attributes:
      a: A, which holds the in axes, the batch axes and the rank.
      b: B, which holds the out axes, the batch axes and the rank.
      keys: dropout keys, one for each index of the batch axes; None when dropout is off.
      gain: a scalar that the function multiplied the weight with, or None for 1.
      scale: alpha / rank, times constants that the function multiplied the weight with.
      rate: dropout rate.
    """

    a: Factor
    b: Factor
    keys: Factor | None
    gain: jax.Array | None
    scale: float = dataclasses.field(metadata=_static)
    rate: float = dataclasses.field(metadata=_static)

    def map(self, function: Callable[[Factor], Factor]) -> Term:
        """The term with a structural change made to each factor."""
        keys = None if self.keys is None else function(self.keys)
        return dataclasses.replace(self, a=function(self.a), b=function(self.b), keys=keys)

    def scaled(self, array: jax.Array) -> jax.Array:
        """`array` times the term's scale and gain, in the array's dtype."""
        if self.scale != 1.0:
            array = array * self.scale
        return array if self.gain is None else array * self.gain.astype(array.dtype)


@dataclasses.dataclass(frozen=True)
class Source:
    """Which weight a view comes from.

    Attributes:
      slot: tells the weights of one jitted function apart; equal slots let layers share a trace.
      path: the weight's path in the parameter tree, for messages.
      uses: collects what the function does with the weight, while roles are found; else None.
    """

    slot: int
    path: str = dataclasses.field(default="", compare=False)
    uses: Any = dataclasses.field(default=None, compare=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """A virtual weight, as the equations of a function see it.

    Attributes:
      base: the frozen array, or where it is stored in another form, that; None stands for zeros
        (in tangents and cotangents).
      terms: low-rank updates on it.
      shape: shape of the array it stands for.
      dtype: dtype of the array it stands for.
      origin: for each axis, the axes of the original weight that it came from.
      source: the weight in the parameter tree, for messages and for `Uses`.
    """

    base: jax.Array | Stored | None
    terms: tuple[Term, ...]
    shape: tuple[int, ...] = dataclasses.field(metadata=_static)
    dtype: Any = dataclasses.field(metadata=_static)
    origin: tuple[frozenset[int], ...] = dataclasses.field(metadata=_static)
    source: Source = dataclasses.field(metadata=_static)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)


def is_view(value: Any) -> bool:
    """Whether a value is a `View`."""
    return isinstance(value, View)


def view_of(weight: Any, slot: int) -> Any:
    """The view of a virtual weight, or the array itself where nothing needs a view."""
    if isinstance(weight, Packed):
        # Without its path: layers that share a jitted function share its trace.
        unnamed: Any = dataclasses.replace(weight, path="")  # type: ignore[type-var]
        return plain_view(Stored(unnamed), weight, Source(slot, weight.path))
    if not isinstance(weight, Adapted):
        return weight
    inner = view_of(weight.base, slot)
    if isinstance(weight.update, Whole):
        return weight.update.value.astype(weight.dtype)
    source = Source(slot, weight.path)
    view = inner if is_view(inner) else plain_view(inner, inner, source)
    term = _term(weight.update, weight.dropout_key)
    return dataclasses.replace(view, terms=(*view.terms, term))


def plain_view(base: Any, like: Any, source: Source) -> View:
    """A view of a base with the shape and dtype of `like`, and with no update on it."""
    shape = tuple(like.shape)
    origin = tuple(frozenset([axis]) for axis in range(len(shape)))
    return View(base, (), shape, jnp.dtype(like.dtype), origin, source)


def _term(update: Any, key: jax.Array | None) -> Term:
    if not isinstance(update, Lora):
        raise TypeError(f"lift does not know the update {type(update).__name__}.")
    axes = update.axes
    keys = None
    if key is not None and update.dropout_rate > 0:
        batch = tuple(update.shape[axis] for axis in axes.batch)
        keys = Factor(jax.random.split(key, batch) if batch else key, axes.batch)
    return Term(
        a=Factor(update.lora_a, (*axes.batch, *axes.inputs, RANK)),
        b=Factor(update.lora_b, (*axes.batch, RANK, *axes.outputs)),
        keys=keys,
        gain=None,
        scale=update.scale,
        rate=update.dropout_rate,
    )


def holding(view: View, axes: Iterable[int]) -> View:
    """The same view, with each of `axes` in a factor of every term.

    An axis that a reshape or a broadcast inserted is in none, which is right as long as nothing but
    the copies themselves depends on it. Here A gets the copies.
    """

    def one(term: Term) -> Term:
        a = term.a
        for axis in axes:
            if axis not in (*a.dims, *term.b.dims):
                array = jnp.broadcast_to(a.array, (view.shape[axis], *a.array.shape))
                a = a.now(array, (axis, *a.dims))
        return dataclasses.replace(term, a=a)

    return dataclasses.replace(view, terms=tuple(map(one, view.terms)))


def named(factor: Factor, name: Callable[[int], str], dtype: Any, *, rank: str = "rank") -> Named:
    """A factor ready to be multiplied: its view axes under the names of an equation's axes."""
    names = tuple(rank if d == RANK else name(d) for d in factor.dims)
    return Named(factor.array.astype(dtype), names)


def dense(view: View) -> jax.Array:
    """Forms the array that a view stands for: what `lift` otherwise never does."""
    names = tuple(f"w{axis}" for axis in range(view.ndim))
    sizes = dict(zip(names, view.shape, strict=True))
    wide = jnp.promote_types(view.dtype, jnp.float32)
    base = view.base.array() if isinstance(view.base, Stored) else view.base
    total = jnp.zeros(view.shape, wide) if base is None else base.astype(wide)
    for term in view.terms:
        a, b = (named(factor, names.__getitem__, wide) for factor in (term.a, term.b))
        product = multiply(a, [b], names, sizes, dtype=wide, precision="highest")
        total = total + term.scaled(product)
    return total.astype(view.dtype)


def dropped(x: jax.Array, term: Term) -> jax.Array:
    """The activations that enter a term: with dropout when it is on."""
    if term.keys is None:
        return x
    key = term.keys.array if term.keys.array.ndim == 0 else term.keys.array.reshape(-1)[0]
    keep = jax.random.bernoulli(key, 1 - term.rate, x.shape)
    return jnp.where(keep, x / (1 - term.rate), jnp.zeros_like(x))
