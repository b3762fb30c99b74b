"""A weight trained whole, without a low-rank update: heads, norms, biases."""

from __future__ import annotations

import dataclasses

import jax

from lora_jax.tree import Update


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Whole(Update):
    """A trainable value that takes the base's place.

    Attributes:
      value: the weight, in the base's shape and dtype; starts as a copy of the base.
    """

    value: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight it replaces."""
        return tuple(self.value.shape)

    def add_to(self, base: jax.Array, sign: int) -> jax.Array:
        """The trained value.

        Raises:
          ValueError: sign is -1: what the value replaced cannot be computed from it.
        """
        if sign < 0:
            raise ValueError(
                "a leaf trained whole replaced its base, which cannot be computed back. "
                "Keep the base parameters and use them instead of unmerging."
            )
        return self.value.astype(base.dtype)
