"""Models known by name: their sizes and the shapes of their parameters, without weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models.config import DecoderConfig, Llama3Scaling

_LLAMA: dict[str, Any] = {
    "vocab_size": 128_256,
    "num_kv_heads": 8,
    "head_dim": 128,
    "max_length": 131_072,
    "rope_theta": 500_000.0,
    "rope_scaling": Llama3Scaling(factor=8.0),
    "norm_eps": 1e-5,
}
_QWEN3: dict[str, Any] = {
    "vocab_size": 151_936,
    "num_kv_heads": 8,
    "head_dim": 128,
    "max_length": 40_960,
    "rope_theta": 1_000_000.0,
    "norm_eps": 1e-6,
    "qk_norm": True,
}

# As in the config.json of meta-llama/Llama-3.1-8B, -70B and -405B, Qwen/Qwen3-8B and -32B.
DECODERS = {
    "llama-3.1-8b": DecoderConfig(
        **_LLAMA, hidden_size=4096, intermediate_size=14_336, num_layers=32, num_heads=32
    ),
    "llama-3.1-70b": DecoderConfig(
        **_LLAMA, hidden_size=8192, intermediate_size=28_672, num_layers=80, num_heads=64
    ),
    "llama-3.1-405b": DecoderConfig(
        **_LLAMA, hidden_size=16_384, intermediate_size=53_248, num_layers=126, num_heads=128
    ),
    "qwen3-8b": DecoderConfig(
        **_QWEN3, hidden_size=4096, intermediate_size=12_288, num_layers=36, num_heads=32
    ),
    "qwen3-32b": DecoderConfig(
        **_QWEN3, hidden_size=5120, intermediate_size=25_600, num_layers=64, num_heads=64
    ),
}
"""Name -> sizes; as in every new `DecoderConfig`, float32 and with unrolled layers."""


@dataclasses.dataclass(frozen=True)
class GptShapes:
    """The parameters of a GPT-2 or GPT-3, by shape: it can be counted here, and not be run.

    It is no `models.decoder`: its norms have biases, as have its linear layers, its positions are
    learned, its MLP has two matrices of width 4 D, and its head is the embedding table.

    Attributes:
        vocab_size: Number of token ids.
        hidden_size: Width of the residual stream, D.
        num_layers: Number of layers.
        num_heads: Heads of attention.
        max_length: Number of learned positions.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    max_length: int

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads

    def abstract_params(self, dtype: str) -> dict[str, Any]:
        """The parameters as `jax.ShapeDtypeStruct`, stacked; named as those of the decoder."""
        width = self.hidden_size

        def array(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

        def linear(fan_in: int, fan_out: int) -> dict[str, Any]:
            layers = self.num_layers
            return {"kernel": array(layers, fan_in, fan_out), "bias": array(layers, fan_out)}

        def norm(*stack: int) -> dict[str, Any]:
            return {"scale": array(*stack, width), "bias": array(*stack, width)}

        return {
            "embed": {"embedding": array(self.vocab_size, width)},
            "positions": {"embedding": array(self.max_length, width)},
            "layers": {
                "input_norm": norm(self.num_layers),
                "attention": {f"{name}_proj": linear(width, width) for name in "qkvo"},
                "post_attention_norm": norm(self.num_layers),
                "mlp": {"up_proj": linear(width, 4 * width), "down_proj": linear(4 * width, width)},
            },
            "norm": norm(),
        }


# Brown et al. 2020 (arXiv:2005.14165), table 2.1; the vocabulary is GPT-2's.
SHAPES = {
    "gpt3-175b": GptShapes(
        vocab_size=50_257, hidden_size=12_288, num_layers=96, num_heads=96, max_length=2048
    ),
}
"""Name -> shapes of models that can be planned by arithmetic alone."""


def known(name: str) -> DecoderConfig | GptShapes:
    """What is known by a name.

    Raises:
        ValueError: Nothing is; the names are listed.

    >>> known("llama-3.1-8b").num_layers
    32
    """
    models = {**DECODERS, **SHAPES}
    if name not in models:
        raise ValueError(
            f"model: {name!r}: no model is known by that name. Known are {', '.join(models)}; of "
            "any other decoder, give its DecoderConfig."
        )
    return models[name]
