"""What a decoder is made of: sizes, rotary embedding, window, and how it is run."""

from __future__ import annotations

import dataclasses

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's stretching of the rotary frequencies to longer contexts.

    Wavelengths above `original_length / low_freq_factor` tokens are stretched by `factor`, those
    below `original_length / high_freq_factor` are left alone, those between are blended.

    Attributes:
        factor: How many times the longest wavelengths are stretched.
        low_freq_factor: Divides `original_length` to give the upper bound of the blend.
        high_freq_factor: Divides `original_length` to give the lower bound of the blend.
        original_length: Context length of the model before stretching, in tokens.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self):
        if self.factor <= 0 or self.original_length < 1:
            raise ValueError(
                "Llama3Scaling: expected factor > 0 and original_length >= 1, got "
                f"factor={self.factor}, original_length={self.original_length}."
            )
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                "Llama3Scaling: expected 0 < low_freq_factor < high_freq_factor, got "
                f"low_freq_factor={self.low_freq_factor}, "
                f"high_freq_factor={self.high_freq_factor}."
            )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and options of one decoder; hashable, so it can be a static argument of `jax.jit`.

    Attributes:
        vocab_size: Number of token ids, `V`.
        hidden_size: Width of the residual stream, `D`.
        intermediate_size: Width inside the MLP, `F`.
        num_layers: Number of layers, `L`.
        num_heads: Query heads, `N`.
        num_kv_heads: Key and value heads, `K`; divides `num_heads`.
        head_dim: Width of one head, `H`; even.
        max_length: Longest sequence the model was trained for, in tokens.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: Llama 3's stretching of those frequencies, or `None`.
        norm_eps: Added to the mean square inside each RMSNorm.
        qkv_bias: Whether q, k and v projections have a bias (Qwen2).
        qk_norm: Whether each head of q and k is normalised before the rotation (Qwen3).
        sliding_window: A token sees itself and the `sliding_window - 1` tokens before it;
            `None` for all tokens before it.
        first_sliding_layer: Layers before this index ignore `sliding_window` (Qwen2, Qwen3).
        tied_head: Whether the embedding table is also the output head.
        dtype: Of the parameters and of the arithmetic: float32, bfloat16 or float16.
            Softmax, norm statistics and logits are float32 always.
        scan_layers: Stack the layers' parameters on axis 0 and scan over them: compiles in the
            time of one layer.
        remat: Recompute each layer's activations in the backward pass instead of storing them.

    Raises:
        ValueError: If a size is not positive, heads do not divide, or the dtype is unknown.

    >>> config = DecoderConfig(
    ...     vocab_size=64, hidden_size=8, intermediate_size=16, num_layers=2,
    ...     num_heads=2, num_kv_heads=1, head_dim=4)
    >>> config.num_heads // config.num_kv_heads
    2
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: Llama3Scaling | None = None
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    first_sliding_layer: int = 0
    tied_head: bool = False
    dtype: str = "float32"
    scan_layers: bool = False
    remat: bool = False

    def __post_init__(self):
        sizes = (
            "vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads "
            "head_dim max_length"
        )
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise ValueError(
                    f"DecoderConfig.{name}: expected at least 1, got {getattr(self, name)}."
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                "DecoderConfig.num_heads: expected a multiple of num_kv_heads="
                f"{self.num_kv_heads}, got {self.num_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"DecoderConfig.head_dim: expected an even number (halves are rotated), "
                f"got {self.head_dim}."
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(
                "DecoderConfig.sliding_window: expected at least 1, or None for no window, "
                f"got {self.sliding_window}."
            )
        if self.dtype not in DTYPES:
            raise ValueError(
                f"DecoderConfig.dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}."
            )
