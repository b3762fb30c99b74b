"""Rules for functions with derivatives of their own, which stay in force."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.transform import compat
from lora_jax.transform.cotangent import weight_products
from lora_jax.transform.einsum import Named, multiply
from lora_jax.transform.stored import Stored
from lora_jax.transform.view import Factor, Term, View, dense, is_view, named
from lora_jax.transform.walk import Walk


def custom_jvp(walk: Walk, equation: Any, values: list[Any]) -> list[Any]:
    """`custom_jvp`: the user's rule, given the low-rank tangent `dA B + A dB`."""
    jaxpr, consts = compat.open_jaxpr(equation.params["call_jaxpr"])
    if walk.finds_roles(values):
        return walk.run(jaxpr, consts, values)
    place = walk.place(equation, "an output of ")

    def call(*inputs: Any) -> list[Any]:
        return [walk.array(v, place) for v in walk.run(jaxpr, consts, list(inputs))]

    def rule(primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
        tangents = [_tangent(p, t) for p, t in zip(primals, tangents, strict=True)]
        moving = [index for index, tangent in enumerate(tangents) if tangent is not None]
        stand_ins = [_stand_in(primal) for primal in primals]

        def pushed(inputs: list[Any], directions: list[Any]) -> Any:
            def of(*movers: Any) -> list[Any]:
                filled = list(inputs)
                for index, mover in zip(moving, movers, strict=True):
                    filled[index] = mover
                return compat.bind(equation, filled)

            return jax.jvp(of, [inputs[index] for index in moving], directions)

        flat, structure = jax.tree.flatten((stand_ins, [stand_ins[index] for index in moving]))
        traced, traced_consts = compat.trace(
            lambda *leaves: jax.tree.leaves(pushed(*structure.unflatten(leaves))), *flat
        )
        directions = [tangents[index] for index in moving]
        outputs = walk.run(traced, traced_consts, [*primals, *directions])
        outputs = [walk.array(output, place) for output in outputs]
        half = len(outputs) // 2
        return outputs[:half], outputs[half:]

    function = jax.custom_jvp(call)
    function.defjvp(rule, symbolic_zeros=True)
    return function(*values)


def _tangent(primal: Any, tangent: Any) -> Any:
    """A value's tangent as an array or view, or None where it is zero."""
    zero = lambda leaf: isinstance(leaf, jax.custom_derivatives.SymbolicZero)  # noqa: E731
    if not isinstance(primal, View):
        return None if zero(tangent) or tangent.dtype == jax.dtypes.float0 else tangent
    terms = []
    for term, moved in zip(primal.terms, tangent.terms, strict=True):
        for name in ("a", "b"):
            factor = getattr(moved, name)
            if not zero(factor.array):
                terms.append(dataclasses.replace(term, **{name: factor}))
        if moved.gain is not None and not zero(moved.gain):
            terms.append(dataclasses.replace(term, gain=moved.gain))
    frozen = primal.base is None or isinstance(primal.base, Stored)
    base = None if frozen or zero(tangent.base) else tangent.base
    if base is None and not terms:
        return None
    return dataclasses.replace(primal, base=base, terms=tuple(terms))


def _stand_in(value: Any) -> Any:
    return jax.ShapeDtypeStruct(value.shape, value.dtype)


def custom_vjp(walk: Walk, equation: Any, values: list[Any]) -> list[Any]:
    """`custom_vjp`: the user's rule, its cotangent of the weight given on to A and B.

    The rule's own product for the weight's cotangent, `x^T g`, is kept as its two factors, so that
    no gradient of the weight's size is formed: A gets `x^T (g B^T)`.
    """
    jaxpr, consts = compat.open_jaxpr(equation.params["call_jaxpr"])
    if walk.finds_roles(values):
        return walk.run(jaxpr, consts, values)
    place = walk.place(equation, "an output of ")
    for value in filter(is_view, values):
        if any(term.keys is not None for term in value.terms):
            raise ValueError(
                f"{value.source.path}: {walk.place(equation)} has a backward pass of its own, in "
                "which adapter dropout has no meaning: it drops elements of the input, and that "
                "pass was written without. Override dropout_rate with 0 for this weight, or "
                "combine without a dropout_key."
            )
    stand_ins = [_stand_in(value) for value in values]
    smooth = [jnp.issubdtype(value.dtype, jnp.inexact) for value in values]
    residual_tree: list[Any] = []

    def call(*inputs: Any) -> list[Any]:
        return [walk.array(v, place) for v in walk.run(jaxpr, consts, list(inputs))]

    def pulled(*inputs: Any) -> list[Any]:
        def of(*movers: Any) -> list[Any]:
            rest = iter(movers)
            return compat.bind(
                equation, [next(rest) if s else v for v, s in zip(inputs, smooth, strict=True)]
            )

        outputs, pull = jax.vjp(of, *(v for v, s in zip(inputs, smooth, strict=True) if s))
        residuals, structure = jax.tree.flatten(pull)
        residual_tree[:] = [structure, len(outputs)]
        return [*outputs, *residuals]

    def forward(*inputs: Any) -> tuple[list[Any], Any]:
        traced, traced_consts = compat.trace(pulled, *stand_ins)
        outputs = walk.run(traced, traced_consts, list(inputs))
        count = residual_tree[1]
        plain = [walk.array(output, place) for output in outputs[:count]]
        # The weights are kept to give their cotangent on to A and B.
        return plain, (outputs[count:], [v for v in inputs if is_view(v)])

    def backward(saved: Any, cotangents: list[Any]) -> tuple[Any, ...]:
        residuals, weights = saved
        structure, _ = residual_tree

        def pull(*arguments: Any) -> list[Any]:
            function = structure.unflatten(arguments[: len(residuals)])
            return list(function(list(arguments[len(residuals) :])))

        traced, traced_consts = compat.trace(
            pull, *(_stand_in(value) for value in (*residuals, *cotangents))
        )
        wanted = [is_view(v) for v, s in zip(values, smooth, strict=True) if s]
        products = weight_products(
            traced, [var for var, w in zip(traced.outvars, wanted, strict=True) if w]
        )
        backward_walk = dataclasses.replace(walk, jits={}, factored=products)
        outputs = iter(backward_walk.run(traced, traced_consts, [*residuals, *cotangents]))
        weights = iter(weights)
        return tuple(
            None if not s else _handed_on(next(weights), next(outputs)) if is_view(v)
            else walk.array(next(outputs), place)
            for v, s in zip(values, smooth, strict=True)
        )  # fmt: skip

    function = jax.custom_vjp(call)
    function.defvjp(forward, backward)
    return function(*values)


def _handed_on(weight: View, cotangent: Any) -> View:
    """The cotangents of a weight's base and factors, from that of the weight.

    dA = scale dW B^T and dB = scale A^T dW, with dW a product `x^T g` or an array.
    """
    names = tuple(f"w{axis}" for axis in range(weight.ndim))

    def factor(term: Term, mine: Factor, theirs: Factor) -> Factor:
        own = named(mine, names.__getitem__, weight.dtype).names
        sizes = dict(zip(own, mine.array.shape, strict=True))
        start = named(theirs, names.__getitem__, weight.dtype)
        total = jnp.zeros(mine.array.shape, mine.array.dtype)
        for others, scaled in _summands(cotangent, names, weight.dtype):
            product = multiply(start, others, own, sizes, dtype=weight.dtype)
            total = total + term.scaled(scaled(product.astype(total.dtype)))
        return mine.now(total)

    def gain(term: Term) -> jax.Array | None:
        """<dW, scale A B>."""
        if term.gain is None:
            return None
        without = factor(dataclasses.replace(term, gain=None), term.a, term.b)
        return (without.array * term.a.array).sum().astype(term.gain.dtype)

    terms = tuple(
        dataclasses.replace(
            term,
            a=factor(term, term.a, term.b),
            b=factor(term, term.b, term.a),
            gain=gain(term),
        )
        for term in weight.terms
    )
    base = None
    if weight.base is not None and not isinstance(weight.base, Stored):
        whole = dense(cotangent) if is_view(cotangent) else cotangent
        base = whole.astype(weight.base.dtype)
    return dataclasses.replace(weight, base=base, terms=terms)


def _summands(cotangent: Any, names: tuple[str, ...], dtype: Any) -> list[tuple[list[Named], Any]]:
    """What a weight's cotangent is the sum of: operands to multiply, and how to scale each."""
    if not is_view(cotangent):
        return [([Named(cotangent.astype(dtype), names)], lambda product: product)]
    sums: list[tuple[list[Named], Any]] = [
        (
            [named(f, names.__getitem__, dtype, rank="tokens") for f in (term.a, term.b)],
            term.scaled,
        )
        for term in cotangent.terms
    ]
    if cotangent.base is not None:
        sums += _summands(cotangent.base, names, dtype)
    return sums


RULES = {"custom_jvp_call": custom_jvp, "custom_vjp_call": custom_vjp}
