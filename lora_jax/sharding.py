"""Where base, adapter and optimizer state lie on a mesh of devices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lora_jax.adapters.lora import Lora
from lora_jax.adapters.whole import Whole
from lora_jax.config import matches
from lora_jax.offloading import HOST
from lora_jax.quantization.quantized import Quantized
from lora_jax.tree import Update, flatten, leaves_by_path

Rules: TypeAlias = Mapping[str, PartitionSpec] | Callable[[str, Any], PartitionSpec]

AXES = ("data", "fsdp", "tensor", "expert")
"""Names of mesh axes: rows of a batch over `data` and `fsdp`, weights over the last three."""


def params_shardings(params: Any, mesh: Mesh | AbstractMesh, rules: Rules) -> Any:
    """The sharding of every parameter of a base, from rules about their paths.

    Args:
      params: the base W0, quantized or not; arrays or `jax.ShapeDtypeStruct`.
      mesh: the devices, its axes named; usually some of `AXES`. What the rules say of those of
        `AXES` that it does not have is passed over, so that the same rules serve every mesh.
      rules: glob pattern over a "/"-joined path -> `PartitionSpec` of the weight's axes, the first
        that matches counts; or a function `(path, leaf) -> PartitionSpec`. A spec may be shorter
        than the weight has axes: the others are not split.

    Returns:
      A tree of the structure of `params` with a `NamedSharding` in place of each array. Codes and
      scales of a quantized weight follow its axes; scales of scales its batch axes. For
      `jax.device_put` and `jax.jit`.

    Raises:
      ValueError: no rule matches a leaf, a spec has more axes than its weight or names an axis that
        the mesh does not have, or the size of an axis (of a quantized weight: the number of its
        bytes, or blocks) does not divide. The path and the axis are named.

    Example:
      >>> import jax.numpy as jnp
      >>> mesh = jax.make_mesh((1,), ("tensor",))
      >>> params = {"up": jnp.ones((8, 32)), "norm": jnp.ones(8)}
      >>> rules = {"up": PartitionSpec("fsdp", "tensor"), "*": PartitionSpec()}
      >>> {path: tuple(s.spec) for path, s in params_shardings(params, mesh, rules).items()}
      {'norm': (), 'up': (None, 'tensor')}
    """
    leaves, structure = flatten(params)
    out = []
    for path, leaf in leaves:
        spec = _fitting(path, leaf, _rule(rules, path, leaf), mesh)
        if isinstance(leaf, Quantized):
            parts = leaf.partition(spec)
            jax.tree.map_with_path(
                lambda keys, array, part, path=path: _check_divides(
                    f"{path}: {jax.tree_util.keystr(keys, simple=True)} of its quantized form",
                    array.shape, part, mesh,
                ),
                leaf, parts,
            )  # fmt: skip
            out.append(jax.tree.map(lambda part: NamedSharding(mesh, part), parts))
        else:
            _check_divides(path, leaf.shape, spec, mesh)
            out.append(NamedSharding(mesh, spec))
    return structure.unflatten(out)


def adapter_shardings(params_shardings: Any, adapter: Mapping[str, Update]) -> dict[str, Update]:
    """The shardings of an adapter: it lies as its base does, so that no product moves a base.

    A takes the partition of its base's *in* axes, B that of its *out* axes, both that of its
    *batch* axes; the rank is not split. A leaf trained whole lies as its base.

    Args:
      params_shardings: a tree of the base's structure with a `NamedSharding`, or a `PartitionSpec`
        for `shard_map`, in place of each weight; of a quantized one, its arrays'. What
        `lora_jax.params_shardings` returns, or the `.sharding` of arrays that are in their places.
      adapter: path -> update; arrays or `jax.ShapeDtypeStruct`.

    Returns:
      The adapter with a sharding in place of each array.

    Raises:
      ValueError: a weight of the adapter has no sharding; its path is named.
      TypeError: what stands for it is neither of those; the path is named.

    Example:
      >>> import jax.numpy as jnp
      >>> from lora_jax.adapters.lora import Axes
      >>> update = Lora(jnp.ones((8, 2)), jnp.ones((2, 32)), Axes((), (0,), (1,)), scale=1.0)
      >>> specs = adapter_shardings({"up": PartitionSpec("fsdp", "tensor")}, {"up": update})
      >>> tuple(specs["up"].lora_a), tuple(specs["up"].lora_b)
      (('fsdp', None), (None, 'tensor'))
    """
    bases = leaves_by_path(params_shardings)
    if missing := [path for path in adapter if path not in bases]:
        raise ValueError(
            f"adapter_shardings: {missing[0]}: the adapter updates it, and params_shardings has no "
            f"sharding for it. It has {len(bases)}: {', '.join(list(bases)[:8])}. Give the "
            "shardings of the parameters that the adapter was made for."
        )
    return {path: _following(path, bases[path], update) for path, update in adapter.items()}


def optimizer_shardings(tx: optax.GradientTransformation, adapter: Any, shardings: Any) -> Any:
    """The shardings of an optimizer's state: moments lie as the leaves that they are of.

    `jax.jit(tx.init)` alone makes moments of constants, which lie nowhere in particular: give it
    these as `out_shardings`.

    Args:
      tx: the optimizer. Of `lora_jax.adapter_only(tx)`, whose state is that of `tx` on the adapter
        alone, the `tx`.
      adapter: what it trains; arrays or `jax.ShapeDtypeStruct`.
      shardings: of the adapter's leaves, as of `adapter_shardings`.

    Returns:
      A tree of the structure of the state with a `NamedSharding` in place of each array. What is of
      no leaf's shape, such as a step count, is on all devices. State that `tx` keeps in host memory
      (`lora_jax.offload`) stays there.

    Example:
      >>> import jax.numpy as jnp
      >>> mesh = jax.make_mesh((1,), ("tensor",))
      >>> split = NamedSharding(mesh, PartitionSpec(None, "tensor"))
      >>> state = optimizer_shardings(optax.adam(1e-3), jnp.ones((2, 32)), split)
      >>> tuple(state[0].mu.spec), tuple(state[0].count.spec)
      ((None, 'tensor'), ())
    """
    spaces: list[Any] = []

    def init(adapter: Any) -> Any:
        state = tx.init(adapter)
        spaces.extend(jax.typeof(leaf).memory_space for leaf in jax.tree.leaves(state))
        return state

    state = jax.eval_shape(init, adapter)
    everywhere = NamedSharding(jax.tree.leaves(shardings)[0].mesh, PartitionSpec())
    placed: Any = optax.tree_map_params(
        tx,
        lambda moment, leaf, sharding: sharding if moment.shape == leaf.shape else everywhere,
        state, adapter, shardings,
        transform_non_params=lambda _: everywhere,
    )  # fmt: skip
    leaves, structure = jax.tree.flatten(placed)
    return structure.unflatten(
        sharding.with_memory_kind(HOST) if space == jax.memory.Space.Host else sharding
        for sharding, space in zip(leaves, spaces, strict=True)
    )


def place(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every host has, onto a mesh: each device gets its part of it and no more.

    Args:
      array: a NumPy array, or one on a device of this host.
      sharding: where it goes; may name devices of other hosts, which call this too.
    """
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def _rule(rules: Rules, path: str, leaf: Any) -> PartitionSpec:
    if callable(rules):
        return rules(path, leaf)
    for pattern, spec in rules.items():
        if matches(path, pattern):
            return spec
    raise ValueError(
        f"params_shardings: {path}: none of the rules' patterns matches it: {', '.join(rules)}. "
        'Add one; a last rule "*": PartitionSpec() leaves the rest whole on every device.'
    )


def _fitting(path: str, leaf: Any, spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """A rule's spec, less the usual axes that the mesh does not have."""
    if len(spec) > len(leaf.shape):
        raise ValueError(
            f"{path}: its rule {spec} is for {len(spec)} axes, but it has "
            f"{len(leaf.shape)}: {tuple(leaf.shape)}."
        )
    entries = []
    for axis, entry in enumerate(spec):
        names = _names(entry)
        for name in names:
            if name not in mesh.axis_names and name not in AXES:
                raise ValueError(
                    f"{path}: axis {axis}: its rule {spec} names the mesh axis {name!r}, which the "
                    f"mesh does not have. It has {', '.join(map(repr, mesh.axis_names))}."
                )
        kept = tuple(name for name in names if name in mesh.axis_names)
        entries.append(kept[0] if len(kept) == 1 else kept or None)
    return PartitionSpec(*entries)


def _check_divides(
    what: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh | AbstractMesh
) -> None:
    for axis, entry in enumerate(spec):
        names = _names(entry)
        parts = math.prod(mesh.shape[name] for name in names)
        if shape[axis] % parts:
            sizes = " x ".join(f"{name}={mesh.shape[name]}" for name in names)
            raise ValueError(
                f"{what}: axis {axis} of shape {tuple(shape)} cannot be split over {sizes}: "
                f"expected a multiple of {parts}, got {shape[axis]}. Make that mesh axis another "
                "size, or give the weight a rule that does not split it there."
            )


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes that one entry of a `PartitionSpec` names."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _following(path: str, base: Any, update: Update) -> Any:
    like, entries = _spec(path, base, update)

    def placed(*groups: tuple[int, ...] | None) -> Any:
        """Of an array with the axes of those groups; None is one that is not split."""
        spec = PartitionSpec(*(
            entry for group in groups
            for entry in ((None,) if group is None else (entries[axis] for axis in group))
        ))  # fmt: skip
        return NamedSharding(like.mesh, spec) if isinstance(like, NamedSharding) else spec

    if isinstance(update, Whole):
        return Whole(placed(tuple(range(len(update.shape)))))
    assert isinstance(update, Lora)
    batch, inputs, outputs = dataclasses.astuple(update.axes)
    return dataclasses.replace(
        update, lora_a=placed(batch, inputs, None), lora_b=placed(batch, None, outputs)
    )


def _spec(path: str, base: Any, update: Update) -> tuple[Any, list[Any]]:
    """A sharding of the weight, and for each of its axes over which mesh axes it is split."""
    ndim = len(update.shape)
    if isinstance(base, Quantized):
        return base.codes, list(base.unpartitioned(_entries(path, base.codes)))
    return base, [*_entries(path, base), *[None] * ndim][:ndim]


def _entries(path: str, sharding: Any) -> tuple[Any, ...]:
    if isinstance(sharding, NamedSharding):
        return tuple(sharding.spec)
    if isinstance(sharding, PartitionSpec):
        return tuple(sharding)
    raise TypeError(
        f"adapter_shardings: {path}: expected a NamedSharding or a PartitionSpec, got "
        f"{type(sharding).__name__}. Put the base onto a mesh with lora_jax.params_shardings."
    )
