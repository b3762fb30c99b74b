"""GGUF files (llama.cpp's format): config, dequantized weights, tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from jax.sharding import Mesh

from lora_jax.interop.gguf_tokenizer import tokenizer_from_gguf
from lora_jax.interop.tokenizer import Tokenizer
from lora_jax.interop.weights import (
    ParamPath,
    build_params,
    check_names,
    check_shape,
    plan_params,
    slots,
)
from lora_jax.models.config import DecoderConfig, Llama3Scaling
from lora_jax.models.decoder import Params
from lora_jax.models.rope import inverse_frequencies, stretch_factors
from lora_jax.quantization.formats import Format

ARCHITECTURES = ("llama", "qwen2", "qwen3")
ROPE_FACTORS = "rope_freqs.weight"

_TOP: dict[ParamPath, str] = {
    ("embed", "embedding"): "token_embd.weight",
    ("norm", "scale"): "output_norm.weight",
    ("lm_head", "kernel"): "output.weight",
}
_MODULES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "input_norm": "attn_norm",
    "post_attention_norm": "ffn_norm",
}


def tensor_name(path: ParamPath) -> str:
    """Returns GGUF's name of a parameter.

    >>> tensor_name(("layers", "0", "attention", "q_proj", "kernel"))
    'blk.0.attn_q.weight'
    """
    if path in _TOP:
        return _TOP[path]
    leaf = "bias" if path[-1] == "bias" else "weight"
    return f"blk.{path[1]}.{_MODULES[path[-2]]}.{leaf}"


def read_gguf(
    path: str | Path,
    *,
    dtype: str = "float32",
    scan_layers: bool = False,
    remat: bool = False,
    quantize: Format | None = None,
    compute_dtype: str | None = None,
    mesh: Mesh | None = None,
) -> tuple[DecoderConfig, Params, Tokenizer]:
    """Reads a model from one GGUF file; its quantized tensors are dequantized.

    Args:
        path: The file.
        dtype: Of the parameters returned: float32, bfloat16 or float16.
        scan_layers: Whether to stack the layers' parameters.
        remat: Whether the model recomputes activations.
        quantize: Quantizes every kernel but the head's while it is read, so that besides the
            result only one tensor is in memory.
        compute_dtype: Dtype that quantized weights are formed in; by default bfloat16.
        mesh: Devices to split the parameters over; by default all on one. Every host reads the
            files, and keeps its devices' parts.

    Returns:
        The config, the parameters, and the tokenizer.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the architecture, the tokenizer or a quantization is not covered, a
            tensor is missing, left over or of the wrong shape, or the file is damaged; with
            `quantize`, if a kernel holds a NaN or an infinity.
    """
    path = Path(path)
    metadata, tensors = _contents(path)
    config = _config(metadata, tensors, path)
    config = dataclasses.replace(config, dtype=dtype, scan_layers=scan_layers, remat=remat)
    expected = slots(config, tensor_name)
    check_names(path, expected, set(tensors) - {ROPE_FACTORS})
    permuted = metadata["general.architecture"] == "llama"

    def read(name: str, slot) -> np.ndarray:
        tensor = tensors[name]
        check_shape(path, name, slot.shape, _shape(tensor))
        array = _dequantize(tensor, path)
        if permuted and slot.path[-2] in ("q_proj", "k_proj"):
            return unpermute(array, config.head_dim)
        return array

    plan = plan_params(config, quantize, compute_dtype)
    params = build_params(config, plan, expected, dict.fromkeys(expected, path), read, mesh)
    return config, params, tokenizer_from_gguf(metadata, path)


def read_gguf_config(path: str | Path) -> DecoderConfig:
    """Reads what a model in a GGUF file is made of, without its weights.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the architecture is not covered, or the file is damaged.
    """
    path = Path(path)
    return _config(*_contents(path), path)


def unpermute(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Puts the rows of q or k back from GGUF's rotary layout into Hugging Face's.

    GGUF's llama rotates neighbouring rows `(2 i, 2 i + 1)`; Hugging Face rotates `(i, i + H / 2)`.

    Args:
        weight: `[N * H, D]`.
        head_dim: `H`.

    Returns:
        `[N * H, D]`.

    >>> unpermute(np.arange(4)[:, None], 4)[:, 0].tolist()
    [0, 2, 1, 3]
    """
    heads = weight.reshape(-1, head_dim // 2, 2, weight.shape[-1])
    return heads.swapaxes(1, 2).reshape(weight.shape)


def _contents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata, and tensors, which are read when they are looked at."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found. Expected a GGUF file.")
    reader = _open(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def _open(path: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # on a damaged file it raises whatever numpy does
        raise ValueError(
            f"{path}: expected a complete GGUF file, got a damaged or truncated one of "
            f"{path.stat().st_size} bytes ({error}). Download it again."
        ) from error


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


def _dequantize(tensor: Any, path: Path) -> np.ndarray:
    try:
        return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(_shape(tensor))
    except NotImplementedError as error:
        raise ValueError(
            f"{path}: tensor {tensor.name}: quantization {tensor.tensor_type.name} is not "
            "covered by the gguf package. Use a file with another quantization, such as Q8_0."
        ) from error


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, Any], path: Path) -> DecoderConfig:
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{path}: general.architecture: expected one of {', '.join(ARCHITECTURES)} (Mistral "
            f"is 'llama' here), got {architecture!r}. Other architectures are not covered."
        )

    def field(name: str, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{name}", default)
        if not isinstance(value, int | float | str):
            raise ValueError(f"{path}: {architecture}.{name}: expected one number, got {value!r}.")
        return value

    heads, hidden = field("attention.head_count"), field("embedding_length")
    head_dim = field("attention.key_length", hidden // heads)
    off = {
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.scaling.type": "none",
        "attention.sliding_window": 0,
        "expert_count": 0,
    }
    for name, only in off.items():
        if field(name, only) != only:
            raise ValueError(
                f"{path}: {architecture}.{name}={field(name)!r} is not covered; expected {only!r}."
            )
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{path}: tensor token_embd.weight is missing. Download it again.")
    try:
        config = DecoderConfig(
            vocab_size=_shape(tensors["token_embd.weight"])[0],
            hidden_size=hidden,
            intermediate_size=field("feed_forward_length"),
            num_layers=field("block_count"),
            num_heads=heads,
            num_kv_heads=field("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_length=field("context_length", 2048),
            rope_theta=_decimal(field("rope.freq_base", 10000.0)),
            norm_eps=_decimal(field("attention.layer_norm_rms_epsilon")),
            qkv_bias=architecture == "qwen2",
            qk_norm=architecture == "qwen3",
            tied_head="output.weight" not in tensors,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if ROPE_FACTORS not in tensors:
        return config
    factors = _dequantize(tensors[ROPE_FACTORS], path)
    original = metadata.get(f"{architecture}.rope.scaling.original_context_length")
    return dataclasses.replace(config, rope_scaling=_scaling(config, factors, original, path))


def _scaling(
    config: DecoderConfig, factors: np.ndarray, original: int | None, path: Path
) -> Llama3Scaling | None:
    """Finds the scaling that gives the stored factors: the file holds no other trace of it."""
    check_shape(path, ROPE_FACTORS, (config.head_dim // 2,), factors.shape)
    if np.all(factors == 1):
        return None
    frequencies = inverse_frequencies(config.head_dim, config.rope_theta)
    for length in (original, 8192):
        if length is None or not np.all(factors > 0):
            continue
        scaling = Llama3Scaling(factor=_decimal(factors.max()), original_length=int(length))
        if np.allclose(stretch_factors(frequencies, scaling), factors, rtol=1e-4):
            return scaling
    raise ValueError(
        f"{path}: tensor {ROPE_FACTORS}: expected the factors of Llama 3's scaling for an "
        f"original context of {original or 8192} tokens, got {factors.min():g} to "
        f"{factors.max():g}. Other scalings are not covered."
    )


def _decimal(value: float) -> float:
    """The file holds float32; 1e-5 must not become 9.999999747378752e-06."""
    return float(str(np.float32(value)))
