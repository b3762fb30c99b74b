"""Hugging Face's `config.json`, to and from `DecoderConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.models.config import DecoderConfig, Llama3Scaling

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

# What changes a model's function and is not modelled here, with the values that mean "off".
_UNMODELLED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1, 1.0, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "is_causal": (True, None),
    "use_bidirectional_attention": (False, None),
}


def config_from_hf(values: Mapping[str, Any], where: Path) -> DecoderConfig:
    """Returns the decoder that a `config.json` describes.

    Args:
        values: The parsed file, as transformers 4 or 5 writes it.
        where: The file, for error messages.

    Returns:
        The config, in float32 and with unrolled layers.

    Raises:
        ValueError: If the architecture or one of its options is not covered, or a value is
            missing or wrong.
    """
    model_type = values.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"{where}: model_type: expected one of {', '.join(MODEL_TYPES)}, got "
            f"{model_type!r}. Other architectures are not covered."
        )
    for name, off in _UNMODELLED.items():
        if name in values and values[name] not in off:
            raise ValueError(
                f"{where}: {name}={values[name]!r} is not covered; expected "
                f"{' or '.join(map(repr, off))}. Use a model without it."
            )

    def required(name: str) -> int:
        value = values.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{where}: {name}: expected an integer, got {value!r}.")
        return value

    heads = required("num_attention_heads")
    hidden = required("hidden_size")
    layers = required("num_hidden_layers")
    kv_heads = values.get("num_key_value_heads")
    if kv_heads is None:
        kv_heads = heads if model_type == "llama" else required("num_key_value_heads")
    head_dim = values.get("head_dim")
    if head_dim is None:
        head_dim = 128 if model_type == "qwen3" else hidden // heads
    theta, scaling = _rope(values, where)
    window, first_sliding = _window(values, model_type, layers, where)
    try:
        return DecoderConfig(
            vocab_size=required("vocab_size"),
            hidden_size=hidden,
            intermediate_size=required("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_length=values.get("max_position_embeddings", 2048),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=float(values.get("rms_norm_eps", 1e-6)),
            qkv_bias=model_type == "qwen2",
            qk_norm=model_type == "qwen3",
            sliding_window=window,
            first_sliding_layer=first_sliding,
            tied_head=bool(values.get("tie_word_embeddings", False)),
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the `config.json` of a decoder, in the form that transformers 4 and 5 both read.

    Args:
        config: The decoder.

    Raises:
        ValueError: If no Hugging Face architecture has this combination of options.
    """
    windowed = config.sliding_window is not None
    if config.qkv_bias and config.qk_norm:
        raise ValueError(
            "config_to_hf: expected qkv_bias (Qwen2) or qk_norm (Qwen3) or neither, got both; "
            "no Hugging Face architecture has both."
        )
    if config.qkv_bias or config.qk_norm:
        model_type = "qwen2" if config.qkv_bias else "qwen3"
    else:
        model_type = "mistral" if windowed else "llama"
        if windowed and config.first_sliding_layer:
            raise ValueError(
                "config_to_hf: Mistral's window is for all layers: expected "
                f"first_sliding_layer=0, got {config.first_sliding_layer}."
            )
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    values: dict[str, Any] = {
        "architectures": [f"{name[model_type]}ForCausalLM"],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tied_head,
        "torch_dtype": config.dtype,
    }
    if config.rope_scaling is not None:
        values["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_length,
        }
    if model_type == "mistral":
        values["sliding_window"] = config.sliding_window
    elif model_type in ("qwen2", "qwen3"):
        values["use_sliding_window"] = windowed
        values["sliding_window"] = config.sliding_window
        first = config.first_sliding_layer if windowed else config.num_layers
        values["max_window_layers"] = first
    return values


def _rope(values: Mapping[str, Any], where: Path) -> tuple[float, Llama3Scaling | None]:
    """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"{where}: rope_parameters: expected an object, got {rope!r}.")
    theta = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    if not isinstance(theta, int | float) or theta <= 0:
        raise ValueError(f"{where}: rope_theta: expected a positive number, got {theta!r}.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) not in (1.0, None):
        raise ValueError(
            f"{where}: partial_rotary_factor={rope['partial_rotary_factor']!r} is not covered; "
            "expected 1.0."
        )
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise ValueError(
            f"{where}: rotary scaling {kind!r} is not covered; expected 'default' or 'llama3'."
        )
    names = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    missing = [name for name in names if not isinstance(rope.get(name), int | float)]
    if missing:
        raise ValueError(
            f"{where}: llama3 rotary scaling: expected the numbers {', '.join(names)}; "
            f"missing: {', '.join(missing)}."
        )
    return float(theta), Llama3Scaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_length=int(rope["original_max_position_embeddings"]),
    )


def _window(
    values: Mapping[str, Any], model_type: str, layers: int, where: Path
) -> tuple[int | None, int]:
    """Returns the window and the first layer that has it."""
    window = values.get("sliding_window", 4096 if model_type == "mistral" else None)
    if model_type == "llama":
        if window is not None:
            raise ValueError(
                f"{where}: sliding_window={window!r} is not covered for model_type 'llama'; "
                "expected none (transformers ignores it; model_type 'mistral' has one)."
            )
        return None, 0
    kinds = values.get("layer_types")
    if kinds is None and model_type == "mistral":
        return window, 0
    if kinds is None:
        if not values.get("use_sliding_window", False):
            return None, 0
        first = values.get("max_window_layers", 28)
    else:
        first = sum(kind == "full_attention" for kind in kinds)
        if kinds != ["full_attention"] * first + ["sliding_attention"] * (layers - first):
            raise ValueError(
                f"{where}: layer_types: expected {layers} entries, 'full_attention' first and "
                f"'sliding_attention' after, got {kinds}. Other patterns are not covered."
            )
    if first >= layers:
        return None, 0
    if not isinstance(window, int):
        raise ValueError(f"{where}: sliding_window: expected an integer, got {window!r}.")
    return window, first
