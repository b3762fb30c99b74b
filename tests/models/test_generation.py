"""Cached generation against the argmax of the whole sequence, computed anew for every token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import decoder
from lora_jax.models.config import DecoderConfig
from lora_jax.models.generation import generate, generate_batch

TINY = DecoderConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_length=128,
)
PROMPTS = [[5, 6, 7], [9], list(range(1, 41)), [60, 0, 3, 3]]


@pytest.fixture(scope="module", params=["plain", "scanned with window"])
def model(request):
    config = TINY
    if request.param != "plain":
        config = dataclasses.replace(TINY, scan_layers=True, sliding_window=4)
    params = decoder.init_params(jax.random.key(0), config)
    params = jax.tree.map(lambda x: 20 * x if x.ndim > 1 else x, params)
    return config, functools.partial(decoder.apply, config), params


def slowly(apply, params, prompt, count):
    ids = list(prompt)
    padded = np.zeros((1, 64), np.int32)
    run = jax.jit(apply)
    for _ in range(count):
        padded[0, : len(ids)] = ids
        ids.append(int(jnp.argmax(run(params, padded)[0, len(ids) - 1])))
    return ids[len(prompt) :]


def test_greedy_equals_uncached(model):
    config, apply, params = model
    expected = [slowly(apply, params, prompt, 12) for prompt in PROMPTS]
    for prompt, ids in zip(PROMPTS, expected, strict=True):
        got = list(generate(apply, params, prompt, config=config, max_new_tokens=12))
        assert got == ids
    got = generate_batch(apply, params, PROMPTS, config=config, max_new_tokens=12)
    assert got == expected
    assert len({tuple(ids) for ids in expected}) == len(PROMPTS)


def test_stops_before_the_end_token(model):
    config, apply, params = model
    expected = slowly(apply, params, PROMPTS[0], 12)
    end = expected[5]
    kept = expected[: expected.index(end)]
    options = {"config": config, "max_new_tokens": 12, "eos_ids": (end,)}
    assert list(generate(apply, params, PROMPTS[0], **options)) == kept
    assert generate_batch(apply, params, PROMPTS[:1], **options) == [kept]


def test_sampling_follows_the_distribution():
    # Logits that do not depend on the prompt: the draws must have their frequencies.
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))

    def apply(params, tokens, *, positions, segment_ids, select, cache):
        return jnp.broadcast_to(params, (tokens.shape[0], 1, 3)), cache

    config = dataclasses.replace(TINY, vocab_size=3, max_length=4096)
    draw = functools.partial(generate, apply, logits, [0], config=config, max_new_tokens=2000)
    drawn = list(draw(key=jax.random.key(0), temperature=2.0))
    expected = np.sqrt([0.5, 0.3, 0.2])
    expected /= expected.sum()
    np.testing.assert_allclose(np.bincount(drawn) / 2000, expected, atol=0.04)
    assert drawn == list(draw(key=jax.random.key(0), temperature=2.0))
    assert drawn != list(draw(key=jax.random.key(1), temperature=2.0))


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "expected at least one token"),
        ([61], {}, "expected ids from 0 to 60, got 61 to 61"),
        ([1] * 120, {}, "at most 128 tokens together with max_new_tokens=12 .* of 120"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ([1], {"temperature": -1.0}, "temperature: expected 0 or more"),
        ([1], {"temperature": 1.0}, "key: expected a PRNG key"),
    ],
)
def test_bad_input(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        generate(None, None, prompt, config=TINY, **{"max_new_tokens": 12, **options})
