"""Rotary position embedding, in the layout of Hugging Face: the two halves of a head rotate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.models.config import DecoderConfig, Llama3Scaling


def inverse_frequencies(
    head_dim: int, theta: float, scaling: Llama3Scaling | None = None
) -> np.ndarray:
    """Returns the angle that each pair of channels turns by per token.

    Args:
        head_dim: `H`, width of one head.
        theta: Base of the geometric series.
        scaling: Llama 3's stretching, or `None`.

    Returns:
        float64 `[H / 2]`, radians per token: `theta ** (-2 i / H)`, stretched.

    >>> inverse_frequencies(4, 100.0).tolist()
    [1.0, 0.1]
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if scaling is None:
        return frequencies
    return frequencies / stretch_factors(frequencies, scaling)


def stretch_factors(frequencies: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    """Returns what Llama 3 divides each frequency by (GGUF stores these as `rope_freqs.weight`).

    Args:
        frequencies: `[H / 2]`, radians per token, not stretched.
        scaling: The stretching.

    Returns:
        float64 `[H / 2]`, from 1 (short wavelengths) to `scaling.factor` (long ones).
    """
    turns = scaling.original_length * frequencies / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1 / (kept + (1 - kept) / scaling.factor)


def rope_tables(config: DecoderConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines of every position's angles, one table for all layers.

    Args:
        config: Gives `head_dim` and the frequencies.
        positions: int32 `[B, T]`.

    Returns:
        Two float32 arrays `[B, T, 1, H / 2]`, ready to broadcast over heads.
    """
    frequencies = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies.astype(np.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates channel `i` with channel `i + H / 2` by the angle of the token's position.

    Args:
        x: `[B, T, N, H]`, queries or keys.
        cos: float32 `[B, T, 1, H / 2]`.
        sin: float32 `[B, T, 1, H / 2]`.

    Returns:
        `[B, T, N, H]` in `x`'s dtype.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return rotated.astype(x.dtype)
