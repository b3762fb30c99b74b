"""What each axis of a weight does in a function, found by tracing it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from lora_jax.adapters.lora import Axes
from lora_jax.transform.lift import RULES, is_array, trace_call
from lora_jax.transform.view import Source, View, is_view, plain_view
from lora_jax.transform.walk import Walk
from lora_jax.tree import leaves_by_path


@dataclasses.dataclass
class Uses:
    """Collects what a function does with one weight.

    Attributes:
      ndim: number of axes of the weight.
      products: the axes' roles in each product.
      lookups: the axes' roles in each lookup of rows.
      others: uses that need the weight as one dense array.
    """

    ndim: int
    products: list[Axes] = dataclasses.field(default_factory=list)
    lookups: list[Axes] = dataclasses.field(default_factory=list)
    others: list[str] = dataclasses.field(default_factory=list)

    def multiplied(self, view: View, *, inputs: Sequence[int], batch: Sequence[int]) -> None:
        """Notes a product, with the view's contracted and batch axes."""
        axes = self._axes(view, set(inputs), set(batch))
        # Inserted axes, which came from none of the weight's, say nothing.
        own = {axis for axis in range(view.ndim) if view.origin[axis]}
        kept = own - {*inputs, *batch}
        if (own & set(inputs) and not axes.inputs) or (kept and not axes.outputs):
            # Axes were merged and split so that an in and an out axis came out of the same ones.
            self.needs_dense("a product of mingled axes")
        else:
            self.products.append(axes)

    def looked_up(self, view: View, *, inputs: Sequence[int], batch: Sequence[int]) -> None:
        """Notes a lookup, with the view's indexed and batch axes."""
        self.lookups.append(self._axes(view, set(inputs), set(batch)))

    def needs_dense(self, place: str) -> None:
        """Notes a use without a low-rank rule."""
        self.others.append(place)

    @property
    def axes(self) -> Axes | None:
        """The roles to adapt by: of the first lookup, else of the first product.

        A table that is looked up and also the output head is factored as the table that it is.
        """
        return next(iter([*self.lookups, *self.products]), None)

    @property
    def is_linear(self) -> bool:
        """Whether the function multiplies with the weight, and never looks up its rows."""
        axes = self.axes
        return axes is not None and not self.lookups and bool(axes.inputs and axes.outputs)

    def _axes(self, view: View, inputs: set[int], batch: set[int]) -> Axes:
        """The original axes' roles, from those of the view's axes.

        An axis that the view no longer has was sliced, indexed or scanned away: a batch axis. One
        that was split goes by its first of in, out, batch: any choice is exact, this one is
        smallest in the usual cases.
        """
        roles: dict[int, str] = {}
        ranks = ("in", "out", "batch")
        for axis, origin in enumerate(view.origin):
            role = "in" if axis in inputs else "batch" if axis in batch else "out"
            for original in origin:
                known = roles.get(original, role)
                roles[original] = min(known, role, key=ranks.index)
        groups = {
            role: tuple(axis for axis in range(self.ndim) if roles.get(axis, "batch") == role)
            for role in ranks
        }
        return Axes(groups["batch"], groups["in"], groups["out"])


def find_uses(
    fn: Any, params: Any, args: Any, kwargs: Any, paths: Iterable[str]
) -> dict[str, Uses]:
    """Traces `fn(params, *args, **kwargs)` and follows the weights at `paths`.

    Args:
      fn: any JAX function.
      params: its parameters, arrays or `jax.ShapeDtypeStruct`.
      args: example inputs, arrays or `jax.ShapeDtypeStruct`.
      kwargs: example keyword inputs.
      paths: the leaves to follow.

    Returns:
      path -> what the function does with that leaf.
    """
    leaves = leaves_by_path(params)
    uses = {path: Uses(len(leaves[path].shape)) for path in paths}
    trace = trace_call(fn, (params, *args), kwargs)
    # The leaves of `params` that are arrays are the first of the trace's arrays, in order.
    names = [path for path, leaf in leaves.items() if is_array(leaf)]

    def follow(*arrays: Any) -> None:
        values = list(arrays)
        for slot, (name, array) in enumerate(zip(names, arrays, strict=False)):
            if name in uses:
                values[slot] = plain_view(array, array, Source(slot, name, uses[name]))
        outputs = Walk(RULES).run(trace.jaxpr, trace.consts, values)
        for output in outputs:
            if is_view(output):
                output.source.uses.needs_dense("returning it")

    jax.eval_shape(follow, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in trace.arrays))
    return uses
