"""What a training step keeps in memory, as abstract arrays in their places on a mesh."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from lora_jax.adapters.lora import Axes, Lora, factor_shapes
from lora_jax.config import ALL_LINEAR, LoraConfig, select
from lora_jax.initialization import init
from lora_jax.interop.weights import plan_params
from lora_jax.models import decoder
from lora_jax.models.config import DecoderConfig
from lora_jax.models.known import GptShapes
from lora_jax.models.partition import partition_rules
from lora_jax.quantization.formats import Format
from lora_jax.sharding import adapter_shardings, optimizer_shardings, params_shardings
from lora_jax.tree import Update

Method: TypeAlias = Literal["lora", "qlora", "full"]
"""Low-rank adapters, the same on a base in 4 bits, or all parameters trained."""

METHODS: tuple[str, ...] = get_args(Method)


@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """Base, what is trained, and its optimizer's state; all arrays are abstract and placed.

    Attributes:
      params: the frozen base; empty if all of it is trained.
      trained: the adapter, or all parameters.
      opt_state: AdamW's.
      tx: the optimizer, AdamW. Its two moments have the dtype of what is trained: float32 for an
        adapter, the parameters' own for full fine-tuning.
    """

    params: Any
    trained: Any
    opt_state: Any
    tx: optax.GradientTransformation


def make_state(
    model: DecoderConfig | GptShapes,
    config: LoraConfig,
    method: Method,
    mesh: Mesh | AbstractMesh,
    *,
    dtype: str,
) -> State:
    """What training a model keeps.

    Args:
      model: a decoder as it is run, its layers scanned; or the shapes of a GPT.
      config: the adapter's; not used for full fine-tuning.
      method: how it is trained.
      mesh: the devices.
      dtype: of the base.

    Raises:
      ValueError: a pattern of the config matches nothing, a rank does not fit, or an axis of a
        weight does not divide; the path is named.
    """
    if isinstance(model, GptShapes):
        params, adapter = _gpt(model, config, method, dtype)
        rules = {**partition_rules(_AS_DECODER), "*": PartitionSpec()}
    else:
        params = plan_params(model, Format() if method == "qlora" else None, dtype)
        adapter = None if method == "full" else _adapter(model, config, params)
        rules = partition_rules(model)
    shardings = params_shardings(params, mesh, rules)
    tx = optax.adamw(1e-4)
    if adapter is None:
        trained, places, params = params, shardings, {}
    else:
        trained, places = adapter, adapter_shardings(shardings, adapter)
        params = placed(params, shardings)
    opt_state = jax.eval_shape(tx.init, trained)
    return State(
        params,
        placed(trained, places),
        placed(opt_state, optimizer_shardings(tx, trained, places)),
        tx,
    )


def placed(tree: Any, shardings: Any) -> Any:
    """Abstract arrays with a sharding each."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree, shardings,
    )  # fmt: skip


def device_bytes(tree: Any) -> int:
    """Bytes that placed arrays take on each device, which holds a part of the same size of each.

    Example:
      >>> from jax.sharding import NamedSharding
      >>> mesh = AbstractMesh((4,), ("fsdp",))
      >>> split = NamedSharding(mesh, PartitionSpec("fsdp"))
      >>> device_bytes(jax.ShapeDtypeStruct((8, 3), jnp.bfloat16, sharding=split))
      12
    """
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def default_config(model: DecoderConfig | GptShapes, rank: int) -> LoraConfig:
    """All linear layers but the output head, as `lora-jax finetune` has it."""
    head = isinstance(model, DecoderConfig) and not model.tied_head
    return LoraConfig(rank=rank, exclude=("lm_head/*",) if head else ())


def _adapter(model: DecoderConfig, config: LoraConfig, params: Any) -> dict[str, Update]:
    fn = functools.partial(decoder.apply, model)
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda key: init(key, config, fn, params, tokens), key)


# For its rules: a GPT's kernels have the names of a stacked decoder's.
_AS_DECODER = DecoderConfig(
    vocab_size=2, hidden_size=2, intermediate_size=2, num_layers=1, num_heads=1, num_kv_heads=1,
    head_dim=2, scan_layers=True,
)  # fmt: skip


def _gpt(
    model: GptShapes, config: LoraConfig, method: Method, dtype: str
) -> tuple[Any, dict[str, Update] | None]:
    """Parameters and adapter of a model that has no function to trace."""
    if method == "qlora":
        raise ValueError(
            "method: qlora: expected lora or full for a model that is known by its shapes alone; "
            "its weights cannot be quantized. Plan a decoder instead."
        )
    params = model.abstract_params(dtype)
    if method == "full":
        return params, None
    kernels = {
        "/".join(str(key.key) for key in path): leaf
        for path, leaf in jax.tree.leaves_with_path(params)
        if path[-1].key == "kernel"
    }
    if callable(config.targets):
        chosen = [path for path, leaf in kernels.items() if config.targets(path, leaf)]
    else:
        targets = kernels if config.targets == ALL_LINEAR else config.targets
        chosen = select(kernels, tuple(targets), field="LoraConfig.targets")
    excluded = select(kernels, config.exclude, field="LoraConfig.exclude")
    axes, adapter = Axes(batch=(0,), inputs=(1,), outputs=(2,)), {}
    for path in chosen:
        settings = config.settings(path)
        factors: Any = [
            jax.ShapeDtypeStruct(shape, jnp.dtype(settings.dtype or "float32"))
            for shape in factor_shapes(kernels[path].shape, axes, settings.rank)
        ]
        if path not in excluded:
            adapter[path] = Lora(factors[0], factors[1], axes, settings.scale)
    return params, adapter
