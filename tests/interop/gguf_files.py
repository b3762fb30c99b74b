"""Writes small GGUF files from torch models, as llama.cpp's converter does."""

import gguf
import numpy as np

from lora_jax.interop.gguf import tensor_name
from lora_jax.interop.huggingface import tensor_name as hf_name
from lora_jax.interop.weights import slots
from lora_jax.models.rope import inverse_frequencies, stretch_factors

# Byte-level BPE: the bytes, then merges. "Ġ" is the byte of a space.
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "12 3", "123 4", "Ġ Ġ"]
SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]
USER = "<tool>"
# As byte-level BPE writes them: "Ċ" is a line break, "Ã¯" the two bytes of an i with diaeresis.
LETTERS = list("helowrdHW,.!'?stĊĠ0123456789Ã¯")


def vocabulary():
    return [*SPECIAL, *LETTERS, *(merge.replace(" ", "") for merge in MERGES), USER]


def permute(weight, heads):
    """llama.cpp: neighbouring rows rotate, where Hugging Face rotates halves."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write(path, config, model, *, pre="smollm", edit=None, skip=(), quantize=None, metadata=None):
    """Writes `model` (torch) of `config` (ours).

    Args:
        edit: Function of the dict name -> array, in place.
        skip: Metadata keys to leave out.
        quantize: Quantization type of the kernels.
        metadata: Extra key -> value, added as the writer's own type.
    """
    architecture = "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama"
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    names = {path: name for name, path in hf_names(config).items()}
    tensors = {}
    for name, slot in slots(config, tensor_name).items():
        array = state[names[slot.path]]
        if architecture == "llama" and slot.path[-2] in ("q_proj", "k_proj"):
            heads = config.num_heads if slot.path[-2] == "q_proj" else config.num_kv_heads
            array = permute(array, heads)
        tensors[name] = array.astype(np.float32)
    if config.rope_scaling is not None:
        frequencies = inverse_frequencies(config.head_dim, config.rope_theta)
        factors = stretch_factors(frequencies, config.rope_scaling)
        tensors["rope_freqs.weight"] = factors.astype(np.float32)
    if edit is not None:
        edit(tensors)

    writer = gguf.GGUFWriter(path, architecture)
    values = {
        "block_count": config.num_layers,
        "context_length": config.max_length,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
    }
    if config.rope_scaling is not None:
        values["rope.scaling.original_context_length"] = config.rope_scaling.original_length
    for name, value in values.items():
        if name not in skip:
            writer.add_uint32(f"{architecture}.{name}", value)
    writer.add_float32(f"{architecture}.rope.freq_base", config.rope_theta)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config.norm_eps)
    tokens = vocabulary()
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", pre)
    writer.add_array("tokenizer.ggml.tokens", tokens)
    kinds = [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL) - 1) + [4]
    writer.add_array("tokenizer.ggml.token_type", kinds)
    writer.add_array("tokenizer.ggml.merges", MERGES)
    writer.add_uint32("tokenizer.ggml.bos_token_id", 0)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    for name, value in (metadata or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, bool: writer.add_bool}
        add[type(value)](name, value)
    for name, array in tensors.items():
        if quantize is not None and name.endswith("weight") and array.ndim == 2:
            packed = gguf.quantize(array, quantize)
            writer.add_tensor(name, packed, raw_dtype=quantize)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def hf_names(config):
    return {name: slot.path for name, slot in slots(config, hf_name).items()}
