"""The walk over a traced function: each equation either bound as it is, or given to its rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.extend.core import Literal

from lora_jax.transform import compat
from lora_jax.transform.stored import Stored
from lora_jax.transform.view import View, dense, is_view

Rule = Callable[["Walk", Any, list[Any]], "list[Any] | None"]
"""`rule(walk, equation, inputs) -> outputs`; None where the rule does not cover the case."""


@dataclasses.dataclass(frozen=True)
class Walk:
    """Evaluates jaxprs with views among their inputs.

    Attributes:
      rules: primitive name -> rule, for equations that a view reaches.
      allow_dense: whether a use without a rule may form the dense weight.
      jits: jitted functions made for nested jits, so that layers that share one share its trace.
      caller: source line of the nested function being evaluated; equations of JAX's own, such as
        those inside `jnp.where`, have no line of the user's.
      factored: rules for equations, by their first output, that need no view to reach them: the
        products in a backward pass that only lead to a weight's cotangent.
    """

    rules: dict[str, Rule]
    allow_dense: bool = False
    jits: dict[Any, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    caller: str = ""
    factored: Mapping[Any, Rule] = dataclasses.field(default_factory=dict)

    def run(self, jaxpr: Any, consts: list[Any], inputs: list[Any]) -> list[Any]:
        """Evaluates a jaxpr; inputs and outputs are arrays or views."""
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else env[atom]

        for equation in jaxpr.eqns:
            values = [read(atom) for atom in equation.invars]
            with compat.context(equation):
                outputs = self.evaluate(equation, values)
            env.update(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def evaluate(self, equation: Any, values: list[Any]) -> list[Any]:
        """Evaluates one equation."""
        if not any(map(is_view, values)):
            rule = self.factored.get(equation.outvars[0]) if self.factored else None
            if rule is None:
                return compat.bind(equation, values)
        else:
            rule = self.rules.get(equation.primitive.name)
        outputs = None if rule is None else rule(self, equation, values)
        if outputs is None:
            place = self.place(equation)
            outputs = compat.bind(equation, [self.array(value, place) for value in values])
        return outputs

    def place(self, equation: Any, what: str = "") -> str:
        """An equation, or `what` of it, and the user's source line, for messages."""
        return f"{what}{equation.primitive.name} at {compat.source_line(equation) or self.caller}"

    @staticmethod
    def finds_roles(values: list[Any]) -> bool:
        """Whether this walk only finds out what the function does with its weights."""
        return any(is_view(value) and value.source.uses is not None for value in values)

    def array(self, value: Any, place: str) -> Any:
        """A value as an array where only an array will do.

        Args:
          value: an array or a view.
          place: what needs it: the primitive and the user's source line.

        Raises:
          ValueError: it is a view, and `lift` was not told to allow dense weights.
        """
        if not isinstance(value, View):
            return value
        if value.source.uses is not None:
            value.source.uses.needs_dense(place)
            return value.base
        # What is no parameter is a weight's cotangent, which the user's own rule wants dense.
        if value.source.slot >= 0 and not self.allow_dense:
            kinds = ["adapted"] * bool(value.terms) + ["quantized"] * isinstance(value.base, Stored)
            raise ValueError(
                f"{value.source.path}: {place} needs the {' and '.join(kinds)} weight as one dense "
                f"array of shape {value.shape} and dtype {np.dtype(value.dtype).name}, since there "
                "is no rule for this use. Leave the weight out (`exclude`), or accept the memory "
                'and time of forming it with lift(fn, dense="allow").'
            )
        return dense(value)
