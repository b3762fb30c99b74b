"""Writing text with a decoder, one token at a time, over a key-value cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.models.cache import Cache, init_cache
from lora_jax.models.config import DecoderConfig
from lora_jax.models.partition import hold

_SMALLEST_BUCKET = 32


def generate(
    apply: Callable[..., Any],
    params: Any,
    tokens: Sequence[int],
    *,
    config: DecoderConfig,
    max_new_tokens: int,
    eos_ids: Collection[int] = (),
    key: jax.Array | None = None,
    temperature: float = 0.0,
) -> Iterator[int]:
    """Yields the tokens that follow a prompt, as they are computed.

    Args:
        apply: Has the signature of `decoder.apply` without its config. Compiled programs are kept
            by this object's identity, so pass the same one again.
        params: Whatever `apply` takes; virtual weights too.
        tokens: Ids of the prompt, at least one.
        config: Of the decoder, for the cache.
        max_new_tokens: Stops after this many.
        eos_ids: Stops before yielding one of these.
        key: PRNG key, needed when the temperature is above 0.
        temperature: Divides the logits before a token is drawn; 0 takes the likeliest.

    Yields:
        Token ids.

    Raises:
        ValueError: If the prompt is empty or too long, an id is outside of the vocabulary, the
            temperature is negative, or the key is missing.

    >>> from lora_jax.models import decoder
    >>> config = DecoderConfig(
    ...     vocab_size=64, hidden_size=8, intermediate_size=16, num_layers=1,
    ...     num_heads=2, num_kv_heads=1, head_dim=4, tied_head=True)
    >>> params = decoder.init_params(jax.random.key(0), config)
    >>> apply = functools.partial(decoder.apply, config)
    >>> len(list(generate(apply, params, [1, 2, 3], config=config, max_new_tokens=4)))
    4
    """
    if temperature < 0:
        raise ValueError(f"temperature: expected 0 or more, got {temperature}.")
    if temperature > 0 and key is None:
        raise ValueError("key: expected a PRNG key, since temperature is above 0, got None.")
    steps = _decode(
        apply,
        params,
        [tokens],
        config=config,
        max_new_tokens=max_new_tokens,
        key=key if temperature > 0 else None,
        temperature=temperature,
    )
    # The checks above run at the call, not at the first token.
    return _until_end((int(row[0]) for row in steps), eos_ids)


def generate_batch(
    apply: Callable[..., Any],
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    config: DecoderConfig,
    max_new_tokens: int,
    eos_ids: Collection[int] = (),
) -> list[list[int]]:
    """Returns the likeliest continuation of each prompt, computed as one batch.

    Args:
        apply: As in `generate`.
        params: As in `generate`.
        prompts: Ids of each prompt, at least one; they may differ in length.
        config: Of the decoder, for the cache.
        max_new_tokens: Stops each row after this many.
        eos_ids: Stops a row before one of these.

    Returns:
        For each prompt, its new ids.

    Raises:
        ValueError: If a prompt is empty or too long, or an id is outside of the vocabulary.
    """
    ends = np.array(sorted(eos_ids), np.int32)
    done = np.zeros(len(prompts), bool)
    rows = []
    for row in _decode(
        apply, params, prompts, config=config, max_new_tokens=max_new_tokens, key=None
    ):
        rows.append(row)
        done |= np.isin(row, ends)
        if done.all():
            break
    return [list(_until_end((int(row[i]) for row in rows), eos_ids)) for i in range(len(prompts))]


def _decode(
    apply: Callable[..., Any],
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    config: DecoderConfig,
    max_new_tokens: int,
    key: jax.Array | None,
    temperature: float = 1.0,
) -> Iterator[np.ndarray]:
    """Checks, then returns an iterator over the new tokens int32 `[B]` of every step."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("prompt: expected at least one token, got none.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}.")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(lengths.max())
    if longest + max_new_tokens > config.max_length:
        raise ValueError(
            f"prompt: expected at most {config.max_length} tokens together with max_new_tokens="
            f"{max_new_tokens} (the model's max_length), got a prompt of {longest}. Shorten "
            "either."
        )
    for prompt in prompts:
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(
                f"prompt: expected ids from 0 to {config.vocab_size - 1}, got {min(prompt)} to "
                f"{max(prompt)}. Check that tokenizer and model belong together."
            )
    # Few shapes, so that few programs are compiled.
    width = min(_bucket(longest), config.max_length)
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    places = np.arange(width, dtype=np.int32)
    segments = (places < lengths[:, None]).astype(np.int32)

    def steps() -> Iterator[np.ndarray]:
        cache = init_cache(config, len(prompts), _bucket(width + max_new_tokens))
        token, cache = _advance(
            apply,
            params,
            tokens,
            np.broadcast_to(places, tokens.shape),
            segments,
            lengths[:, None] - 1,
            cache,
            None if key is None else jax.random.fold_in(key, 0),
            temperature,
        )
        zero = np.zeros((len(prompts), 1), np.int32)
        for step in range(max_new_tokens - 1):
            yield np.asarray(token)
            position = lengths[:, None] + np.int32(step)
            token, cache = _advance(
                apply,
                params,
                token[:, None],
                position,
                zero + 1,
                zero,
                cache,
                None if key is None else jax.random.fold_in(key, step + 1),
                temperature,
            )
        yield np.asarray(token)

    return steps()


@functools.partial(jax.jit, static_argnums=0, donate_argnums=6)
def _advance(
    apply, params, tokens, positions, segment_ids, select, cache: Cache, key, temperature
) -> tuple[jax.Array, Cache]:
    """Feeds tokens `[B, T]` and picks the next of each row, `[B]`."""
    logits, cache = apply(
        params, tokens, positions=positions, segment_ids=segment_ids, select=select, cache=cache
    )
    logits = logits[:, 0]
    if key is None:
        token = jnp.argmax(logits, axis=-1)
    else:
        token = jax.random.categorical(key, logits / temperature)
    # On a mesh, whole on every device, since every host reads it.
    return hold(token.astype(jnp.int32)), cache


def _bucket(length: int) -> int:
    """The smallest power of two that holds `length`, from `_SMALLEST_BUCKET` on."""
    return max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def _until_end(tokens: Iterator[int], eos_ids: Collection[int]) -> Iterator[int]:
    for token in tokens:
        if token in eos_ids:
            return
        yield token
