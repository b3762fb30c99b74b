"""The decoder against arithmetic written out, and its options against each other."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import decoder
from lora_jax.models.attention import attend, attention_bias
from lora_jax.models.cache import init_cache
from lora_jax.models.config import DecoderConfig, Llama3Scaling
from lora_jax.models.rope import inverse_frequencies, rope_tables, rotate

TINY = DecoderConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    qkv_bias=True,
    qk_norm=True,
)
VARIANTS = {
    "full": TINY,
    "tied": dataclasses.replace(TINY, tied_head=True, qkv_bias=False, qk_norm=False),
    "mixed window": dataclasses.replace(TINY, sliding_window=5, first_sliding_layer=1),
}


def random_params(config, seed=0):
    """Like init_params, but large enough that every part shows in the logits."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape) + (leaf.ndim == 1), leaf.dtype),
        decoder.abstract_params(config),
    )


def stack(params):
    layers = params["layers"]
    ordered = [layers[str(i)] for i in range(len(layers))]
    return {**params, "layers": jax.tree.map(lambda *leaves: np.stack(leaves), *ordered)}


def tokens_of(shape, seed=1):
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, shape, np.int32)


def jitted(config):
    return jax.jit(functools.partial(decoder.apply, config))


def loss_and_gradient(config, params, tokens):
    def loss(params):
        return jax.nn.logsumexp(decoder.apply(config, params, tokens)).sum()

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("full", {"scan_layers": True}),
        ("full", {"remat": True}),
        ("tied", {"scan_layers": True, "remat": True}),
        ("mixed window", {"scan_layers": True, "remat": True}),
    ],
)
def test_scan_and_remat_equal_unrolled(variant, options):
    config = VARIANTS[variant]
    params, tokens = random_params(config), tokens_of((2, 12))
    expected = loss_and_gradient(config, params, tokens)
    if "scan_layers" in options:
        params = stack(params)
        expected = (expected[0], stack(expected[1]))
    got = loss_and_gradient(dataclasses.replace(config, **options), params, tokens)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-5), got, expected)


def test_remat_stores_less():
    config = dataclasses.replace(VARIANTS["tied"], num_layers=8, scan_layers=True)
    tokens = tokens_of((4, 64))

    def temporary(config):
        def loss(params):
            return jax.nn.logsumexp(decoder.apply(config, params, tokens, select=tokens[:, :1]))

        step = jax.jit(jax.grad(lambda p: loss(p).sum())).lower(decoder.abstract_params(config))
        return step.compile().memory_analysis().temp_size_in_bytes

    assert temporary(dataclasses.replace(config, remat=True)) < 0.5 * temporary(config)


@pytest.mark.parametrize("variant", ["full", "mixed window"])
def test_packed_segments_equal_separate_sequences(variant):
    config = VARIANTS[variant]
    params, tokens = random_params(config), tokens_of((1, 19))
    lengths = [7, 9, 3]
    starts = np.cumsum([0, *lengths])
    segments = np.repeat([1, 2, 0], lengths)[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32)
    apply = jitted(config)
    packed = apply(params, tokens, positions=positions, segment_ids=segments)
    # The rotary embedding is relative, so positions that count on through the row do as well.
    counted = apply(params, tokens, segment_ids=segments)
    for start, length in list(zip(starts, lengths, strict=False))[:2]:
        alone = apply(params, tokens[:, start : start + length])
        assert np.std(alone) > 0.5
        np.testing.assert_allclose(packed[:, start : start + length], alone, atol=2e-4)
        np.testing.assert_allclose(counted[:, start : start + length], alone, atol=2e-4)
    assert np.isfinite(packed).all()


def test_select_equals_slicing():
    params, tokens = random_params(TINY), tokens_of((2, 9))
    select = jnp.array([[8, 0, 3], [1, 1, 5]])
    logits = jitted(TINY)(params, tokens)
    got = jitted(TINY)(params, tokens, select=select)
    expected = np.stack([np.asarray(logits)[row, select[row]] for row in range(2)])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_select_computes_no_other_logits():
    config = dataclasses.replace(TINY, vocab_size=50_000, tied_head=True)
    tokens = jnp.zeros((4, 64), jnp.int32)
    run = jitted(config)
    lowered = run.lower(decoder.abstract_params(config), tokens, select=tokens[:, :1])
    head = 2 * 4 * 64 * config.hidden_size * config.vocab_size
    assert lowered.compile().cost_analysis()["flops"] < 0.2 * head


@pytest.mark.parametrize(
    ("variant", "scan"), [("full", False), ("mixed window", False), ("mixed window", True)]
)
def test_cached_equals_uncached(variant, scan):
    config = VARIANTS[variant]
    params, tokens = random_params(config), tokens_of((2, 14))
    # Row 1 is shorter: its last prompt tokens are padding.
    expected = jitted(config)(params, tokens)
    short = np.delete(np.asarray(tokens), [6, 7], axis=1)[1:]
    expected_short = jitted(config)(params, short)
    if scan:
        config, params = dataclasses.replace(config, scan_layers=True), stack(params)
    apply = jitted(config)
    segments = np.ones((2, 8), np.int32)
    segments[1, 6:] = 0
    logits, cache = apply(
        params, tokens[:, :8], segment_ids=segments, cache=init_cache(config, 2, 16)
    )
    np.testing.assert_allclose(logits[0], expected[0, :8], rtol=1e-4, atol=1e-4)
    for place in range(8, 14):
        positions = np.array([[place], [place - 2]], np.int32)
        logits, cache = apply(
            params, tokens[:, place : place + 1], positions=positions, cache=cache
        )
        np.testing.assert_allclose(logits[0, 0], expected[0, place], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(logits[1, 0], expected_short[0, place - 2], rtol=1e-4, atol=1e-4)
    assert int(cache.length) == 14


def test_cache_counts_positions_on():
    params, tokens = random_params(TINY), tokens_of((1, 6))
    apply = jitted(TINY)
    _, cache = apply(params, tokens[:, :4], cache=init_cache(TINY, 1, 8))
    logits, _ = apply(params, tokens[:, 4:], cache=cache)
    expected = apply(params, tokens)[:, 4:]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_attention_written_out():
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 5, n, 4)) for i, n in enumerate((6, 2, 2)))
    slots = jnp.arange(5)
    bias = attention_bias(
        slots,
        slots,
        query_positions=slots[None],
        key_positions=slots[None],
        query_segments=None,
        key_segments=None,
        window=3,
    )
    got = attend(q, k, v, bias)
    for head in range(6):
        for t in range(5):
            seen = slice(max(0, t - 2), t + 1)
            scores = np.asarray(k)[0, seen, head // 3] @ np.asarray(q)[0, t, head] / 2.0
            weights = np.exp(scores) / np.exp(scores).sum()
            expected = weights @ np.asarray(v)[0, seen, head // 3]
            np.testing.assert_allclose(got[0, t, head], expected, rtol=1e-5, atol=1e-6)


def test_rotation_written_out():
    config = dataclasses.replace(TINY, head_dim=4, rope_theta=100.0)
    x = jnp.arange(1.0, 5.0).reshape(1, 1, 1, 4)
    cos, sin = rope_tables(config, jnp.array([[7]]))
    a, b = 7 * 1.0, 7 * 0.1
    expected = [
        1 * np.cos(a) - 3 * np.sin(a),
        2 * np.cos(b) - 4 * np.sin(b),
        3 * np.cos(a) + 1 * np.sin(a),
        4 * np.cos(b) + 2 * np.sin(b),
    ]
    np.testing.assert_allclose(rotate(x, cos, sin)[0, 0, 0], expected, rtol=1e-5)


def test_llama3_scaling_written_out():
    # Wavelengths 2 pi * 10 ** i: 6.28 and 62.8 tokens stay, 628 is blended, 6283 is stretched.
    scaling = Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=1000
    )
    plain = 10.0 ** -np.arange(4)
    turns = 1000 * plain[2] / (2 * np.pi)
    smooth = (turns - 1) / 3
    expected = plain * [1, 1, (1 - smooth) / 8 + smooth, 1 / 8]
    np.testing.assert_allclose(inverse_frequencies(8, 1e4, scaling), expected, rtol=1e-12)


def test_half_precision_keeps_float32_logits():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    params = random_params(TINY)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    tokens = tokens_of((2, 9))
    logits = jitted(config)(half, tokens)
    expected = np.asarray(jitted(TINY)(exact, tokens))
    assert logits.dtype == jnp.float32
    assert np.linalg.norm(logits - expected) < 0.05 * np.linalg.norm(expected)


def test_init_params_follow_the_config():
    for config in (TINY, dataclasses.replace(TINY, scan_layers=True)):
        params = decoder.init_params(jax.random.key(3), config)
        shapes = decoder.abstract_params(config)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
            lambda x: (x.shape, x.dtype), shapes
        )
        flat = {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        }
        first = "layers" if config.scan_layers else "layers/0"
        kernel = flat[f"{first}/attention/q_proj/kernel"]
        assert kernel.shape[-2:] == (24, 32)
        assert np.std(kernel) == pytest.approx(0.02, rel=0.1)
        assert np.all(flat[f"{first}/input_norm/scale"] == 1)
        assert np.all(flat[f"{first}/attention/q_proj/bias"] == 0)
        assert flat["lm_head/kernel"].shape == (24, 61)
    stacked = flat["layers/attention/q_proj/kernel"]
    assert not np.allclose(stacked[0], stacked[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, r"num_layers: expected at least 1, got 0"),
        ({"num_kv_heads": 3}, r"expected a multiple of num_kv_heads=3, got 4"),
        ({"head_dim": 7}, r"expected an even number .* got 7"),
        ({"dtype": "int8"}, r"expected one of float32, .* got 'int8'"),
        ({"sliding_window": 0}, r"sliding_window: expected at least 1"),
    ],
)
def test_bad_config(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_bad_scaling():
    with pytest.raises(ValueError, match="low_freq_factor=4"):
        Llama3Scaling(factor=8.0, low_freq_factor=4.0, high_freq_factor=4.0)
    with pytest.raises(ValueError, match="factor=0"):
        Llama3Scaling(factor=0.0)


def test_bad_arrays():
    params, tokens = decoder.abstract_params(TINY), jnp.zeros((2, 5), jnp.int32)
    run = functools.partial(jax.eval_shape, functools.partial(decoder.apply, TINY))
    with pytest.raises(ValueError, match=r"tokens: expected integers .* got float32\[2, 5\]"):
        run(params, tokens.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"segment_ids: .* \[2, 5\], got \[2, 4\]"):
        run(params, tokens, segment_ids=tokens[:, :4])
    with pytest.raises(ValueError, match=r"cache: expected 2 rows and at least 5 slots"):
        run(params, tokens, cache=init_cache(TINY, 2, 4))
    with pytest.raises(ValueError, match=r"select: expected integers \[2, k\]"):
        run(params, tokens, select=jnp.zeros((1, 1), jnp.int32))
    with pytest.raises(ValueError, match="init_cache: expected"):
        init_cache(TINY, 0, 4)
