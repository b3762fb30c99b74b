"""The tokenizer inside a GGUF file's metadata: byte-level BPE."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers import Tokenizer as Backend

from lora_jax.interop.tokenizer import Tokenizer, make_tokenizer

PRE_TOKENIZERS = ("smollm", "llama-bpe", "qwen2")
_CONTROL, _USER_DEFINED = 3, 4
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|"
    r" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_from_gguf(metadata: Mapping[str, Any], where: Path) -> Tokenizer:
    """Builds the tokenizer that a GGUF file describes.

    Args:
        metadata: The file's key-value pairs, `tokenizer.ggml.*` and
            `tokenizer.chat_template` among them.
        where: The file, for error messages.

    Raises:
        ValueError: If the kind of tokenizer is not covered, or the lists do not fit.
    """

    def field(name: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{name}", default)

    kind, pre = field("model"), field("pre")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"{where}: tokenizer: expected tokenizer.ggml.model 'gpt2' with tokenizer.ggml.pre "
            f"one of {', '.join(PRE_TOKENIZERS)}; got {kind!r} with {pre!r}. Use the model's "
            "Hugging Face folder, which holds a tokenizer.json."
        )
    tokens, types, merges = field("tokens"), field("token_type"), field("merges")
    if not tokens or not merges or types is None or len(types) != len(tokens):
        raise ValueError(
            f"{where}: tokenizer: expected tokens, as many token types, and merges; got "
            f"{len(tokens or [])}, {len(types or [])} and {len(merges or [])}."
        )
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    vocab = {token: index for index, token in enumerate(tokens)}
    try:
        model = models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre == "llama-bpe")
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"{where}: tokenizer: merges do not fit the vocabulary: {error}"
        ) from error
    backend = Backend(model)
    backend.pre_tokenizer = _pre_tokenizer(pre)
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        backend.add_tokens(
            [
                AddedToken(token, special=special, normalized=False)
                for token, kind in zip(tokens, types, strict=True)
                if kind == wanted
            ]
        )
    config = {}
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    for theirs, ours in names.items():
        index = field(f"{theirs}_token_id")
        if index is None:
            continue
        if not 0 <= index < len(tokens):
            raise ValueError(
                f"{where}: tokenizer.ggml.{theirs}_token_id: expected an id below "
                f"{len(tokens)}, got {index}."
            )
        config[f"{ours}_token"] = tokens[index]
    # Files of Llama 3 may leave the flag out; the model itself always begins with its token.
    if field("add_bos_token", pre == "llama-bpe") and "bos_token" in config:
        bos = config["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
        )
    config["clean_up_tokenization_spaces"] = False
    return make_tokenizer(
        backend,
        config=config,
        chat_template=metadata.get("tokenizer.chat_template"),
        eos_ids=[end for end in [field("eot_token_id")] if end is not None],
    )


def _pre_tokenizer(pre: str) -> Any:
    if pre == "smollm":
        parts = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    else:
        digits = r"\p{N}{1,3}" if pre == "llama-bpe" else r"\p{N}"
        parts = [
            pre_tokenizers.Split(Regex(_WORDS.format(digits=digits)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    return pre_tokenizers.Sequence(parts)
