"""A tiny model on disk, with a byte-level tokenizer and ChatML, and data that it can learn."""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lora_jax.cli import run
from lora_jax.interop.huggingface import save_pretrained
from lora_jax.interop.tokenizer import make_tokenizer
from lora_jax.models import decoder
from lora_jax.models.config import DecoderConfig

SPECIAL = ("<|im_start|>", "<|im_end|>")


def tiny_model(path, *, seed=0, tied_head=False):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate([*SPECIAL, *letters])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer = make_tokenizer(backend, config={"eos_token": SPECIAL[1]})
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_length=256,
        tied_head=tied_head,
    )
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape) + (leaf.ndim == 1), leaf.dtype),
        decoder.abstract_params(config),
    )
    save_pretrained(path, config, params, tokenizer=tokenizer)
    return path


def chats(path, *, count=60):
    """Which of two letters comes up more often: said as a chat."""
    rng = random.Random(0)
    lines = []
    for _ in range(count):
        letters = "".join(rng.choice("ab") for _ in range(7))
        messages = [
            {"role": "system", "content": "Count."},
            {"role": "user", "content": letters},
            {"role": "assistant", "content": "ab"[letters.count("b") > 3]},
        ]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return chats(tmp_path_factory.mktemp("data") / "letters.jsonl")


@pytest.fixture(scope="session")
def options(model, data):
    """What makes `finetune` take a second."""
    return [
        *("--model", str(model), "--data", str(data), "--steps", "8", "--rank", "4"),
        *("--learning-rate", "0.02", "--row-length", "128", "--evaluations", "1"),
    ]


@pytest.fixture(scope="session")
def trained(tmp_path_factory, options):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "letters"
    assert run(["finetune", *options, "--out", str(folder)]) == 0
    return folder
