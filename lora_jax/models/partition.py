"""How the decoder's parameters and batches are split over a mesh of devices."""

from __future__ import annotations

from jax.sharding import PartitionSpec

from lora_jax.models.config import DecoderConfig

ROWS = ("data", "fsdp")
"""Mesh axes over which the rows of a batch are split."""

_KERNELS = {
    # Into heads and hidden units, which `tensor` splits, and out of them again.
    "*/q_proj/kernel": ("fsdp", "tensor"),
    "*/k_proj/kernel": ("fsdp", "tensor"),
    "*/v_proj/kernel": ("fsdp", "tensor"),
    "*/o_proj/kernel": ("tensor", "fsdp"),
    "*/gate_proj/kernel": ("fsdp", "tensor"),
    "*/up_proj/kernel": ("fsdp", "tensor"),
    "*/down_proj/kernel": ("tensor", "fsdp"),
    "*/?_proj/bias": ("tensor",),
}


def partition_rules(config: DecoderConfig) -> dict[str, PartitionSpec]:
    """Rules for `lora_jax.params_shardings`.

    `fsdp` splits every matrix along the residual stream, and XLA gathers a layer when it is its
    turn; `tensor` splits heads, hidden units and the vocabulary. Norms are whole everywhere.

    Args:
        config: The decoder.

    Returns:
        Glob pattern over a parameter's path -> the partition of its axes.

    >>> config = DecoderConfig(
    ...     vocab_size=64, hidden_size=8, intermediate_size=16, num_layers=2,
    ...     num_heads=2, num_kv_heads=1, head_dim=4, scan_layers=True)
    >>> tuple(partition_rules(config)["*/q_proj/kernel"])
    (None, 'fsdp', 'tensor')
    """
    stack = (None,) if config.scan_layers else ()
    layers = {pattern: PartitionSpec(*stack, *axes) for pattern, axes in _KERNELS.items()}
    return {
        **layers,
        "embed/embedding": PartitionSpec("tensor", "fsdp"),
        "lm_head/kernel": PartitionSpec("fsdp", "tensor"),
        "*/scale": PartitionSpec(),
    }
