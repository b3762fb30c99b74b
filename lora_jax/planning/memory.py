"""How many bytes a step takes on each device, in formulas.

What stays from step to step is exact: the base as it is stored, what is trained, and AdamW's two
moments of it, each on a device as its sharding says. So are the gradients, which have the shapes of
what is trained. What else is alive at the worst moment is estimated. With b rows of T tokens on
each device, a residual stream of width D, L layers, heads N of width H, an MLP of width F, a
vocabulary of V, arithmetic in w bytes, and N, F and V split over `tensor`:

    saved  = L b T D w      what enters each layer, for its recomputation
    stream = 8 b T D w      norms, residuals and gradients of that size, some of them in float32
    logits = 4 b T V        in float32

There are two candidates for the worst moment. At the loss: the logits, over which their gradient is
written where room is short (where it is not, XLA keeps both), and the head's weight, if that is
gathered over `fsdp`; or, where the head is trained, the gradient of its weight in float32 and cast,
before it is split again:

    head   = max(logits + V D w, (4 + w) V D)

In the backward pass, inside of a layer: its kernels, as they are gathered, cut out of their stack,
or formed from 4 bits; and the larger of two things. In attention those are the weights of b N T T
pairs of tokens, and the gradient of their scores, both in float32; in the MLP the gate, the up
projection, their product, and a gradient of each:

    layer  = kernels + max(8 b N T T, 6 b T F w)

Activations are `saved + stream + max(head, layer)`. The gradients of all layers come on top: XLA
makes room for a whole stack of them before the backward pass begins. Not counted: the batch's
integers, and adapters cast to w bytes.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from lora_jax.models.config import DecoderConfig
from lora_jax.models.known import GptShapes
from lora_jax.models.partition import row_parts
from lora_jax.planning.state import State, device_bytes


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    Attributes:
      base: the model's weights, frozen or trained.
      adapter: 0 for full fine-tuning.
      gradients: of what is trained, in its dtype.
      optimizer: AdamW's moments and its count.
      activations: what else is alive at the worst moment; None for a model that cannot be run.
    """

    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int | None

    @property
    def total(self) -> int:
        """In all."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Name -> bytes."""
        return {name: n for name, n in dataclasses.asdict(self).items() if n is not None}


def memory(
    model: DecoderConfig | GptShapes,
    state: State,
    mesh: Mesh | AbstractMesh,
    *,
    batch_size: int,
    seq_len: int,
) -> Memory:
    """What a step takes.

    Args:
      model: the sizes.
      state: what is kept, placed on the mesh.
      mesh: the devices.
      batch_size: rows in all.
      seq_len: T, tokens in a row.
    """
    trained, frozen = device_bytes(state.trained), device_bytes(state.params)
    full = not state.params
    return Memory(
        base=trained if full else frozen,
        adapter=0 if full else trained,
        gradients=trained,
        optimizer=device_bytes(state.opt_state),
        activations=None if isinstance(model, GptShapes) else _activations(
            model, dict(mesh.shape), full=full, batch_size=batch_size, seq_len=seq_len
        ),
    )  # fmt: skip


def _activations(
    model: DecoderConfig, mesh: dict[str, int], *, full: bool, batch_size: int, seq_len: int
) -> int:
    tensor, width = mesh.get("tensor", 1), np.dtype(model.dtype).itemsize
    tokens = batch_size * seq_len // row_parts(mesh)
    residual = tokens * model.hidden_size * width
    saved, stream = model.num_layers * residual, 8 * residual
    logits = 4 * tokens * model.vocab_size // tensor
    weight = model.vocab_size * model.hidden_size // tensor
    head = logits + (width * weight if mesh.get("fsdp", 1) > 1 else 0)
    if full:
        head = max(head, (4 + width) * weight)

    heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    kernels = model.hidden_size * (2 * heads + 2 * kv_heads + 3 * model.intermediate_size)
    scores = 8 * tokens * seq_len * model.num_heads
    mlp = 6 * tokens * model.intermediate_size * width
    layer = (kernels * width + max(scores, mlp)) // tensor
    return saved + stream + max(head, layer)
