"""Parameter trees: key paths, and virtual weights put into a tree and taken out again."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

PyTree: TypeAlias = Any


class VirtualWeight(abc.ABC):
    """A pytree that stands where a plain array stood in a parameter tree.

    `lora_jax.lift` lets any function take one. Subclasses are registered dataclasses.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the array it stands for."""

    @property
    @abc.abstractmethod
    def dtype(self) -> Any:
        """The dtype of the array it stands for."""


class Packed(VirtualWeight):
    """A frozen weight that is stored in another form than an array.

    It is formed where it is multiplied with, and formed again in the backward pass. Subclasses have
    a static field `path`: where in the parameter tree the weight stands.
    """

    path: str

    @property
    @abc.abstractmethod
    def batch(self) -> tuple[int, ...]:
        """Axes that can be cut without forming the weight."""

    @abc.abstractmethod
    def check(self) -> None:
        """Raises ValueError, with the path, if its arrays are not those of the weight any more."""

    @abc.abstractmethod
    def form(self, dtype: Any = None) -> jax.Array:
        """The weight as one dense array, by default in the dtype that it is multiplied in."""

    @abc.abstractmethod
    def transposed(self, permutation: Sequence[int]) -> Packed:
        """The same weight, its axes in another order."""

    @abc.abstractmethod
    def along_batch(
        self, axis: int, function: Callable[[jax.Array, int], jax.Array], size: int | None
    ) -> Packed:
        """`function(array, axis of the array)` done to every array along one batch axis.

        The axis has `size` elements afterwards, or is gone if that is None.
        """

    @abc.abstractmethod
    def stacked(self, arrays: Sequence[jax.Array]) -> Packed:
        """A stack of such weights: its arrays in order, each with a new axis 0, a batch axis."""

    @abc.abstractmethod
    def picked(self, axis: int, indices: jax.Array, *, mode: str) -> Packed | None:
        """The weight at some indices along an axis, in front; None where it must be formed."""

    @abc.abstractmethod
    def partition(self, spec: Any, shape: tuple[int, ...] | None = None) -> Packed | None:
        """The weight with a partition in place of each array, for a partition of its axes.

        Args:
          spec: a `PartitionSpec` of the weight's axes.
          shape: of one device's part, to ask for parts that each device can form from its own
            arrays; None is the answer where that is not possible.
        """

    @property
    @abc.abstractmethod
    def sharding(self) -> Any:
        """How the array it stands for is split, as the types of its own arrays say."""

    @abc.abstractmethod
    def part(self, shape: tuple[int, ...]) -> Packed:
        """One device's part, whose shape is given and whose arrays are in place already."""

    @abc.abstractmethod
    def unnested(self) -> Packed:
        """The same weight in a form whose arrays can be cut along its axes."""

    @abc.abstractmethod
    def again(self, array: jax.Array) -> Packed:
        """Another array, stored in the same way."""


class Update(abc.ABC):
    """What an adapter holds for one weight: trainable leaves and static settings, no base.

    Subclasses are registered dataclasses, one file each in `lora_jax.adapters`.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight it updates."""

    @abc.abstractmethod
    def add_to(self, base: jax.Array, sign: int) -> jax.Array:
        """`base + sign * update`, in float32 or wider, cast back to the base's dtype."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted(VirtualWeight):
    """A frozen base and the update on it.

    Attributes:
      base: W0: an array, or another virtual weight.
      update: what the adapter adds.
      dropout_key: the weight's own key when adapter dropout is on, else None.
      path: where in the parameter tree it stands.
    """

    base: Any
    update: Update
    dropout_key: jax.Array | None
    path: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The base's shape."""
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        """The base's dtype."""
        return self.base.dtype


def is_virtual(node: Any) -> bool:
    """Whether a tree's node is a virtual weight."""
    return isinstance(node, VirtualWeight)


def flatten(tree: PyTree) -> tuple[list[tuple[str, Any]], Any]:
    """Leaves with their paths, keys joined with "/", and the tree's structure.

    A virtual weight is one leaf. The value of a `flax.nnx.Variable` goes by the variable's path.

    Raises:
      ValueError: two leaves have the same path.

    >>> flatten({"layers": [{"kernel": 1.0}]})[0]
    [('layers/0/kernel', 1.0)]
    """
    stop = lambda node: is_virtual(node) or isinstance(node, nnx.Variable)  # noqa: E731
    nodes = jax.tree.flatten_with_path(tree, is_leaf=stop)[0]
    variables = {path for path, node in nodes if isinstance(node, nnx.Variable)}
    leaves, structure = jax.tree.flatten_with_path(tree, is_leaf=is_virtual)
    named: dict[str, Any] = {}
    for path, leaf in leaves:
        keys = path[:-1] if path[:-1] in variables else path
        name = jax.tree_util.keystr(keys, simple=True, separator="/")
        if name in named:
            raise ValueError(
                f"Two parameters have the path {name!r}, one of them with a '/' in a key. Rename "
                "one: an adapter finds its weights by their paths."
            )
        named[name] = leaf
    return list(named.items()), structure


def leaves_by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    return dict(flatten(tree)[0])


def fold_path(key: jax.Array, path: str) -> jax.Array:
    """A key for one path, whatever other paths there are."""
    return jax.random.fold_in(key, int.from_bytes(hashlib.sha256(path.encode()).digest()[:4]))


def combine(
    params: PyTree, adapter: Mapping[str, Update], *, dropout_key: jax.Array | None = None
) -> PyTree:
    """Puts an adapter onto its base.

    Args:
      params: the frozen parameters W0, any pytree. Shared, not copied.
      adapter: what `lora_jax.init` returned: path -> update.
      dropout_key: a key turns adapter dropout on; each weight derives its own from its path.
        Looked-up tables have none, as in PEFT.

    Returns:
      `params` with a virtual weight at each of the adapter's paths.

    Raises:
      ValueError: a path of the adapter is not in `params`, or has another shape there.

    Example:
      >>> import lora_jax as lora
      >>> params, x = {"w": jnp.ones((8, 8))}, jnp.ones((1, 8))
      >>> fn = lambda params, x: x @ params["w"]
      >>> config = lora.LoraConfig(rank=2, targets="w")
      >>> adapter = lora.init(jax.random.key(0), config, fn, params, x)
      >>> lora.lift(fn)(lora.combine(params, adapter), x)[0, 0]
      Array(8., dtype=float32)
    """
    leaves, structure = flatten(params)
    check_fits(dict(leaves), adapter)
    combined = []
    for path, leaf in leaves:
        if (update := adapter.get(path)) is not None:
            key = None if dropout_key is None else fold_path(_typed_key(dropout_key), path)
            leaf = Adapted(leaf, update, key, path)
        combined.append(leaf)
    return structure.unflatten(combined)


def split(tree: PyTree) -> tuple[PyTree, dict[str, Update]]:
    """Takes a combined tree apart: the exact inverse of `combine`.

    Args:
      tree: parameters with virtual weights.

    Returns:
      `(params, adapter)`: the frozen parameters, and path -> update.
    """
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_virtual)
    params, adapter = [], {}
    for leaf in leaves:
        if isinstance(leaf, Adapted):
            adapter[leaf.path] = leaf.update
        params.append(leaf.base if isinstance(leaf, Adapted) else leaf)
    return structure.unflatten(params), adapter


def check_fits(leaves: Mapping[str, Any], adapter: Mapping[str, Update]) -> None:
    """Raises ValueError, naming path and shapes, unless every update has its weight in `leaves`."""
    for path, update in adapter.items():
        if path not in leaves:
            raise ValueError(
                f"The adapter updates {path!r}, which the parameters do not have. They have: "
                f"{_some(leaves)}. Combine an adapter with the parameters it was made for."
            )
        if (shape := tuple(leaves[path].shape)) != update.shape:
            raise ValueError(
                f"{path}: the adapter updates a weight of shape {update.shape}, the parameters "
                f"have {shape} there. Combine an adapter with the parameters it was made for; "
                "for a stack of adapters, `jax.vmap` a function that combines one of them."
            )


def trainable_mask(tree: PyTree) -> PyTree:
    """Marks what trains in a combined tree.

    Args:
      tree: parameters with virtual weights.

    Returns:
      A tree of the same structure: True at the adapter's leaves, False at frozen ones.
    """

    def mask(node: Any) -> Any:
        marked = jax.tree.map(lambda _: False, node)
        if isinstance(node, Adapted):
            marked = dataclasses.replace(marked, update=jax.tree.map(lambda _: True, node.update))
        return marked

    return jax.tree.map(mask, tree, is_leaf=is_virtual)


def _typed_key(key: jax.Array) -> jax.Array:
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


def _some(paths: Any, count: int = 8) -> str:
    paths = list(paths)
    more = f", and {len(paths) - count} more" if len(paths) > count else ""
    return ", ".join(paths[:count]) + more
