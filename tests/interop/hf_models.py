"""Tiny random models of transformers, to compare with."""

import numpy as np
import torch
import transformers

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Name -> (model type, options). Each differs from the first in what its name says.
CASES = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama scaled rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama wide heads": ("Llama", {"head_dim": 12}),
    "mistral window": ("Mistral", {"sliding_window": 6}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2 window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}
VOCAB = 99


def make(case, seed=0, **sizes):
    """Returns a model whose every tensor is random and large enough to show in the logits."""
    name, options = CASES[case]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCAB,
        **{
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
            "bos_token_id": 1,
            "eos_token_id": 2,
            **options,
            **sizes,
        },
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise + (parameter.ndim == 1))
    return model


def tokens(shape=(2, 21), seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, shape, np.int32)


def logits(model, ids):
    """Returns float32 `[B, T, V]`."""
    with torch.no_grad():
        return model(torch.tensor(ids, dtype=torch.long)).logits.float().numpy()
