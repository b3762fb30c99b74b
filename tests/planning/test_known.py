"""Models known by name have as many parameters as their publishers say."""

import dataclasses
import math

import jax
import pytest

from lora_jax.models import decoder
from lora_jax.models.known import DECODERS, SHAPES, known


def count(params):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


# Of the safetensors on the Hugging Face hub; of the 405B, those with 8 key and value heads.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-32b", 32_762_123_264),
    ],
)
def test_parameters_of_decoders(name, parameters):
    config = dataclasses.replace(DECODERS[name], scan_layers=True)
    assert count(decoder.abstract_params(config)) == parameters


def test_parameters_of_gpt3():
    d, layers = 12_288, 96
    per_layer = 12 * d * d + 9 * d + 4 * d  # kernels, biases of linear layers, norms
    by_hand = 50_257 * d + 2048 * d + layers * per_layer + 2 * d
    got = count(SHAPES["gpt3-175b"].abstract_params("float16"))
    assert got == by_hand
    assert round(got / 1e9, 1) == 174.6  # arXiv:2005.14165, table D.1


def test_a_name_that_is_not_known():
    with pytest.raises(ValueError, match=r"'llama': no model is known .* llama-3\.1-8b, llama"):
        known("llama")
