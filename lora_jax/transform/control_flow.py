"""Rules for equations that hold a function: built again with views going through."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from lora_jax.transform import compat
from lora_jax.transform.elementwise import constrain, factor_spec
from lora_jax.transform.stored import Stored, stackable, unstacked
from lora_jax.transform.view import Factor, Term, View, is_view
from lora_jax.transform.walk import Walk


def jit(walk: Walk, equation: Any, values: list[Any]) -> list[Any]:
    """A nested jit stays one; layers that share it share its trace, whatever their weights."""
    params = equation.params
    inner = params["jaxpr"]
    jaxpr, consts = compat.open_jaxpr(inner)
    ins, outs = compat.jit_shardings(params)
    within = dataclasses.replace(walk, caller=compat.source_line(equation) or walk.caller)

    def call(*inputs: Any) -> list[Any]:
        held = [v if s is None else constrain(v, s) for v, s in zip(inputs, ins, strict=True)]
        results = within.run(jaxpr, consts, held)
        return [v if s is None else constrain(v, s) for v, s in zip(results, outs, strict=True)]

    if walk.finds_roles(values) or not any(map(compat.is_tracer, jax.tree.leaves(values))):
        return call(*values)  # Run eagerly, there is nothing to compile it into.
    kind = (inner, tuple(ins), tuple(outs))
    if kind not in walk.jits:
        call.__name__ = call.__qualname__ = params["name"]
        walk.jits[kind] = jax.jit(call)
    results = walk.jits[kind](
        *(
            replace_source(value, dataclasses.replace(value.source, slot=slot))
            if is_view(value) else value
            for slot, value in enumerate(values)
        )
    )  # fmt: skip
    return [
        replace_source(out, values[out.source.slot].source) if is_view(out) else out
        for out in results
    ]


def replace_source(view: View, source: Any) -> View:
    """The view under another source."""
    return dataclasses.replace(view, source=source)


def inline(walk: Walk, equation: Any, values: list[Any]) -> list[Any]:
    """A call without a meaning of its own."""
    jaxpr, consts = compat.open_jaxpr(
        equation.params.get("call_jaxpr", equation.params.get("jaxpr"))
    )
    return walk.run(jaxpr, consts, values)


def remat(walk: Walk, equation: Any, values: list[Any]) -> list[Any]:
    """`jax.checkpoint` with the same policy; the factors' products are recomputed like others."""
    params = equation.params
    jaxpr, consts = compat.open_jaxpr(params["jaxpr"])

    def call(*inputs: Any) -> list[Any]:
        return walk.run(jaxpr, consts, list(inputs))

    if params["differentiated"]:
        # Already the recomputation in a backward pass: kept apart from the forward's, as JAX does.
        return call(*(lax.optimization_barrier(tuple(values)) if params["prevent_cse"] else values))
    again = jax.checkpoint(call, policy=params["policy"], prevent_cse=params["prevent_cse"])
    return again(*values)


def cond(walk: Walk, equation: Any, values: list[Any]) -> list[Any]:
    """`cond` and `switch`: a weight may come out if every branch returns the same one."""
    index, *operands = values
    opened = [compat.open_jaxpr(branch) for branch in equation.params["branches"]]
    place = walk.place(equation, "an output of ")

    def branch(jaxpr: Any, consts: list[Any], plain: list[bool]) -> Callable[..., list[Any]]:
        def call(*inputs: Any) -> list[Any]:
            outputs = walk.run(jaxpr, consts, list(inputs))
            return [
                walk.array(out, place) if is_plain else out
                for out, is_plain in zip(outputs, plain, strict=True)
            ]

        return call

    none = [False] * len(equation.outvars)
    if any(map(is_view, operands)):
        shapes = [jax.eval_shape(branch(*each, none), *operands) for each in opened]
        none = [
            len({jax.tree.structure(out) for out in outs}) > 1 for outs in zip(*shapes, strict=True)
        ]
    return lax.switch(index, [branch(*each, none) for each in opened], *operands)


def while_loop(walk: Walk, equation: Any, values: list[Any]) -> list[Any]:
    """`while_loop`: weights as constants, or carried and handed on as they came."""
    params = equation.params
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts = values[:n_cond], values[n_cond : n_cond + n_body]
    cond_jaxpr, body_jaxpr = (compat.open_jaxpr(params[k]) for k in ("cond_jaxpr", "body_jaxpr"))

    def body(carry: list[Any]) -> list[Any]:
        return walk.run(*body_jaxpr, [*body_consts, *carry])

    def proceed(carry: list[Any]) -> Any:
        return walk.run(*cond_jaxpr, [*cond_consts, *carry])[0]

    place = walk.place(equation, "a carried value of ")
    init, settle = _steady(walk, body, values[n_cond + n_body :], place)
    return lax.while_loop(proceed, lambda carry: settle(body(carry)), init)


def scan(walk: Walk, equation: Any, values: list[Any]) -> list[Any]:
    """`scan`: weights as constants, carried, sliced layer by layer, or stacked on the way out."""
    params = equation.params
    n_consts, n_carry = compat.scan_counts(params)
    consts, init = values[:n_consts], values[n_consts : n_consts + n_carry]
    place = walk.place(equation)
    apart = [_unstack(walk, value, place) for value in values[n_consts + n_carry :]]
    stacks = [stack for stack, _ in apart]
    jaxpr, jaxpr_consts = compat.open_jaxpr(params["jaxpr"])
    restack: list[Callable[[Any], Any]] = []

    def step(carry: list[Any], slices: list[Any]) -> list[Any]:
        layer = [rebuild(s) for (_, rebuild), s in zip(apart, slices, strict=True)]
        return walk.run(jaxpr, jaxpr_consts, [*consts, *carry, *layer])

    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacks)
    place = walk.place(equation, "a carried value of ")
    stacked = walk.place(equation, "an output of ")
    init, settle = _steady(walk, lambda carry, s: step(carry, s)[:n_carry], init, place, one)

    def body(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        outputs = step(carry, slices)
        stackable = [_stackable(walk, output, stacked) for output in outputs[n_carry:]]
        restack[:] = [build for _, build in stackable]
        return settle(outputs[:n_carry]), [piece for piece, _ in stackable]

    carry, ys = lax.scan(
        body, init, stacks,
        length=params["length"], reverse=params["reverse"], unroll=params["unroll"],
    )  # fmt: skip
    return [*carry, *(build(y) for build, y in zip(restack, ys, strict=True))]


def _unstack(walk: Walk, value: Any, place: str) -> tuple[Any, Callable[[Any], Any]]:
    """What `scan` slices along axis 0, and how a slice becomes a value or view again."""
    if not isinstance(value, View):
        return value, lambda piece: piece
    stack, base_of = value.base, lambda piece: piece
    if isinstance(value.base, Stored):
        pieces = unstacked(value.base)
        if pieces is None:
            return walk.array(value, place), lambda piece: piece
        stack, base_of = pieces
    factors, build = _take_apart(value)
    held = [0 in factor.dims for factor in factors]
    arrays = [_to_front(f) for f, mine in zip(factors, held, strict=True) if mine]

    def rebuild(piece: Any) -> View:
        base, slices = piece
        rest = iter(slices)
        parts = [
            factor.now(
                next(rest) if mine else factor.array,
                tuple(d if d < 0 else d - 1 for d in factor.dims if d != 0),
            )
            for factor, mine in zip(factors, held, strict=True)
        ]
        return dataclasses.replace(
            build(parts), base=base_of(base), shape=value.shape[1:], origin=value.origin[1:]
        )

    return (stack, arrays), rebuild


def _to_front(factor: Factor) -> Any:
    at = factor.dims.index(0)
    rest = [axis for axis in range(len(factor.dims)) if axis != at]
    return factor.array.transpose([at, *rest]) if at else factor.array


def _stackable(walk: Walk, value: Any, place: str) -> tuple[Any, Callable[[Any], Any]]:
    """What `scan` stacks for a value, and how the stack becomes a value or view again."""
    if not isinstance(value, View):
        return value, lambda stack: stack
    pieces, base_of = value.base, lambda stack: stack
    if isinstance(value.base, Stored):
        apart = stackable(value.base)
        if apart is None:
            return walk.array(value, place), lambda stack: stack
        pieces, base_of = apart
    # A gain would become one for each layer: it goes into A, where it is the same for all rows.
    terms = tuple(map(_without_gain, value.terms))
    value = dataclasses.replace(value, terms=terms)
    factors, build = _take_apart(value)
    dims = [(0, *(d if d < 0 else d + 1 for d in factor.dims)) for factor in factors]

    def rebuild(stack: Any) -> View:
        base, arrays = stack
        length = jax.tree.leaves(stack)[0].shape[0]
        parts = [f.now(array, own) for f, array, own in zip(factors, arrays, dims, strict=True)]
        return dataclasses.replace(
            build(parts),
            base=base_of(base),
            shape=(length, *value.shape),
            origin=(frozenset(), *value.origin),
        )

    return (pieces, [factor.array for factor in factors]), rebuild


def _without_gain(term: Term) -> Term:
    if term.gain is None:
        return term
    array = term.a.array * term.gain.astype(term.a.array.dtype)
    return dataclasses.replace(term, gain=None, a=term.a.now(array))


def _take_apart(view: View) -> tuple[list[Factor], Callable[[list[Factor]], View]]:
    """All factors of a view in a list, and how to put others in their places."""
    is_factor = lambda node: isinstance(node, Factor)  # noqa: E731
    factors, structure = jax.tree.flatten(view.terms, is_leaf=is_factor)
    places = [index for index, leaf in enumerate(factors) if is_factor(leaf)]

    def build(parts: list[Factor]) -> View:
        leaves = list(factors)
        for index, part in zip(places, parts, strict=True):
            leaves[index] = part
        return dataclasses.replace(view, terms=structure.unflatten(leaves))

    return [factors[index] for index in places], build


def _steady(
    walk: Walk, body: Callable[..., list[Any]], init: list[Any], place: str, *rest: Any
) -> tuple[list[Any], Callable[[list[Any]], list[Any]]]:
    """Makes a loop's carry keep its structure: what the body changes is an array throughout.

    Returns the carry to start from, and what to do to the body's output.
    """
    init = list(init)
    while any(map(is_view, init)):
        out = jax.eval_shape(body, init, *rest)
        changed = [
            index
            for index, (before, after) in enumerate(zip(init, out, strict=True))
            if is_view(before) and jax.tree.structure(before) != jax.tree.structure(after)
        ]
        if not changed:
            break
        for index in changed:
            init[index] = walk.array(init[index], place)

    def settle(out: list[Any]) -> list[Any]:
        return [
            after if is_view(before) else walk.array(after, place)
            for before, after in zip(init, out, strict=True)
        ]

    return init, settle


def shard_map(walk: Walk, equation: Any, values: list[Any]) -> list[Any]:
    """`shard_map` with weights going in: each factor is split along the axes it holds."""
    params = compat.shard_map_params(equation.params)
    jaxpr, consts = compat.open_jaxpr(equation.params["jaxpr"])
    place = walk.place(equation, "an output of ")
    locals_ = [tuple(var.aval.shape) for var in jaxpr.invars]
    in_specs = params.pop("in_specs")
    values = [
        _parted(walk, value, spec, shape, walk.place(equation))
        for value, spec, shape in zip(values, in_specs, locals_, strict=True)
    ]

    def call(*inputs: Any) -> tuple[Any, ...]:
        inside = [
            _local(value, shape, spec) if isinstance(value, View) else value
            for value, shape, spec in zip(inputs, locals_, in_specs, strict=True)
        ]
        outputs = walk.run(jaxpr, consts, inside)
        return tuple(walk.array(output, place) for output in outputs)

    specs = tuple(_specs(value, spec) for value, spec in zip(values, in_specs, strict=True))
    return list(jax.shard_map(call, in_specs=specs, **params)(*values))


def _parted(walk: Walk, value: Any, spec: PartitionSpec, shape: tuple[int, ...], place: str) -> Any:
    """A value whose base, if it is stored, can be split as the spec says."""
    if not isinstance(value, View) or not isinstance(value.base, Stored):
        return value
    base = Stored(value.base.weight.unnested(), value.base.steps)
    if not base.can_be_cut or base.weight.partition(spec, shape) is None:
        return walk.array(value, place)
    return dataclasses.replace(value, base=base)


def _local(view: View, shape: tuple[int, ...], spec: PartitionSpec) -> View:
    """A view inside a shard_map, whose factors know over which mesh axes they are split."""
    factors, build = _take_apart(view)
    parts = []
    for factor in factors:
        names = jax.tree.leaves(tuple(factor_spec(spec, factor)))
        parts.append(dataclasses.replace(factor, split=factor.split | frozenset(names)))
    base = view.base
    if isinstance(base, Stored):
        base = Stored(base.weight.part(shape), base.steps)
    return dataclasses.replace(build(parts), base=base, shape=shape)


def _specs(value: Any, spec: PartitionSpec) -> Any:
    if not isinstance(value, View):
        return spec
    factors, build = _take_apart(value)
    specs = build([factor.now(factor_spec(spec, factor)) for factor in factors])
    terms = tuple(
        dataclasses.replace(term, gain=None if term.gain is None else PartitionSpec())
        for term in specs.terms
    )
    base: Any = None if value.base is None else spec
    if isinstance(value.base, Stored):
        steps = jax.tree.map(lambda _: PartitionSpec(), value.base.steps)
        base = Stored(value.base.weight.partition(spec), steps)  # type: ignore[arg-type]
    return dataclasses.replace(specs, base=base, terms=terms)


RULES = {
    "jit": jit,
    "pjit": jit,
    "closed_call": inline,
    "core_call": inline,
    "remat2": remat,
    "checkpoint": remat,
    "cond": cond,
    "while": while_loop,
    "scan": scan,
    "shard_map": shard_map,
}
