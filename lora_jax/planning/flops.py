"""How much a step computes, in formulas.

Counted are the matrix products, two FLOPs for each multiplication and addition; what is left out is
a few percent of a large model's. N are the parameters of the layers' frozen or fully trained
kernels, n those of the adapter, V D those of the output head; a token's queries meet the keys of
all T tokens of its row, since scores are computed whole and then masked:

    layers  = 2 N + 2 n + 4 T (heads x head_dim) L      forward, for one token
    forward = layers + 2 V D

The gradient with respect to its input costs a product as much as the product itself, and so does
the gradient with respect to its weight, which a frozen weight has not:

    backward, adapters = 2 N + 4 n + 2 x attention + 2 V D
    backward, full     = 2 forward

Each layer is computed again in the backward pass, but for the product at its end, whose result no
gradient needs: `layers` comes once more, less 2 L F D. Without attention, head and that, these are
the usual 6 N for full fine-tuning, and 4 N + 6 n for adapters.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lora_jax.models.config import DecoderConfig
from lora_jax.models.known import GptShapes
from lora_jax.tree import leaves_by_path


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs for each token.

    Attributes:
      forward: of the forward pass.
      step: of the whole training step: forward, backward, and layers computed again.
    """

    forward: int
    step: int


def flops_per_token(
    model: DecoderConfig | GptShapes, params: Any, adapter_size: int | None, *, seq_len: int
) -> Flops:
    """What one token costs.

    Args:
      model: the sizes.
      params: all of its parameters, quantized or not.
      adapter_size: n, or None for full fine-tuning.
      seq_len: T, tokens in a row.
    """
    kernels = {
        path: math.prod(leaf.shape)
        for path, leaf in leaves_by_path(params).items()
        if path.endswith("/kernel")
    }
    kernels.pop("lm_head/kernel", None)
    kernels_size, n = sum(kernels.values()), adapter_size or 0
    width = model.num_heads * model.head_dim
    attention = 4 * seq_len * width * model.num_layers
    head = 2 * model.vocab_size * model.hidden_size
    layers = 2 * kernels_size + 2 * n + attention
    forward = layers + head
    if adapter_size is None:
        backward = 2 * forward
    else:
        backward = 2 * kernels_size + 4 * n + 2 * attention + head
    last = sum(size for path, size in kernels.items() if path.endswith("/down_proj/kernel"))
    return Flops(forward, forward + backward + layers - 2 * last)
