"""LoraConfig: validation, patterns, overrides, and its written form."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax import LoraConfig
from lora_jax.config import matches, select

BAD = {
    "rank": [0, -1, 2.0, True, "8"],
    "alpha": [0, -1, float("nan"), float("inf"), "16"],
    "scaling": ["rslora", None],
    "method": ["dora"],
    "init": ["zeros"],
    "dropout_rate": [1.0, -0.1, float("nan"), True],
    "dtype": ["int8", "float31"],
    "targets": [(), ("",), (3,)],
    "exclude": [("",)],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, vs in BAD.items() for v in vs])
def test_a_field_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=rf"LoraConfig\.{field}: expected .*, got"):
        LoraConfig(**{field: value})


def test_scales():
    assert LoraConfig(rank=4, alpha=32).scale == 8.0
    assert LoraConfig(rank=4, alpha=32, scaling="rank_stabilized").scale == 16.0


def test_overrides_first_hit_wins_and_keeps_the_rest():
    config = LoraConfig(
        rank=8, alpha=16, dropout_rate=0.1,
        overrides={"*/0/query/*": {"rank": 2}, "*/query/*": {"rank": 4, "alpha": 4}},
    )  # fmt: skip
    first, second, other = (
        config.settings(f"layers/{path}") for path in ("0/query/w", "1/query/w", "1/key/w")
    )
    assert (first.rank, first.alpha, first.dropout_rate) == (2, 16, 0.1)
    assert (second.rank, second.alpha) == (4, 4)
    assert (other.rank, other.alpha) == (8, 16)


@pytest.mark.parametrize("fields", [{"ranks": 2}, {"rank": 0}, {"targets": "*"}])
def test_a_bad_override_is_named(fields):
    with pytest.raises(ValueError, match=r"overrides\['\*/q'\]"):
        LoraConfig(overrides={"*/q": fields})


def test_it_hashes_and_is_frozen():
    make = lambda: LoraConfig(targets="*/q", overrides={"*/q": {"rank": 2}})  # noqa: E731
    assert hash(make()) == hash(make())
    assert make() == make()
    with pytest.raises(AttributeError):
        make().rank = 3


names = st.text("abc/*", min_size=1, max_size=6)


@given(
    rank=st.integers(1, 512),
    alpha=st.floats(0.001, 1000),
    targets=st.one_of(st.just("all-linear"), st.lists(names, min_size=1, max_size=3)),
    exclude=st.lists(names, max_size=2),
    overrides=st.dictionaries(
        names, st.fixed_dictionaries({"rank": st.integers(1, 9)}), max_size=2
    ),
    scaling=st.sampled_from(["standard", "rank_stabilized"]),
    dtype=st.sampled_from([None, "bfloat16", "float32"]),
)
def test_written_as_json_and_read_again_it_is_the_same(**fields):
    config = LoraConfig(**fields)
    assert LoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_predicate_cannot_be_written():
    with pytest.raises(ValueError, match="targets is a function"):
        LoraConfig(targets=lambda path, leaf: True).to_dict()


def test_an_unknown_key_is_refused():
    with pytest.raises(ValueError, match="'r'"):
        LoraConfig.from_dict({"r": 8})


@pytest.mark.parametrize(
    ("path", "pattern", "fits"),
    [
        ("a/b/query/kernel", "*/query/kernel", True),
        ("query/kernel", "*/query/kernel", True),
        ("subquery/kernel", "*/query/kernel", False),
        ("a/query/bias", "*/query/kernel", False),
        ("layers/0/q", "layers/[01]/q", True),
        ("layers/2/q", "layers/[01]/q", False),
        ("A/b", "a/b", False),
    ],
)
def test_patterns(path, pattern, fits):
    assert matches(path, pattern) is fits


def test_a_pattern_that_matches_nothing_shows_the_nearest_paths():
    paths = ["encoder/query/kernel", "encoder/query/bias"]
    with pytest.raises(ValueError, match=r"targets.*'\*/querry/kernel'.*encoder/query/kernel"):
        select(paths, ["*/querry/kernel"], field="targets")
