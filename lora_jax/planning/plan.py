"""`plan`: what fine-tuning a model takes, by arithmetic, and by the TPU's compiler if asked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh

from lora_jax.adapters.lora import parameter_count
from lora_jax.config import LoraConfig
from lora_jax.models.config import DecoderConfig
from lora_jax.models.known import GptShapes, known
from lora_jax.models.partition import DECODER_AXES, row_axes, row_parts
from lora_jax.planning.chips import GIB, HBM, parse_topology, tpu_mesh
from lora_jax.planning.flops import Flops, flops_per_token
from lora_jax.planning.memory import Memory, memory
from lora_jax.planning.state import METHODS, Method, default_config, make_state
from lora_jax.summaries import stored_bytes
from lora_jax.tree import is_virtual


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a fine-tuning step takes; prints as a table.

    Attributes:
      model: its name.
      method: `"lora"`, `"qlora"` or `"full"`.
      parameters: how many the model has.
      trainable: how many of them, or of an adapter's, are trained.
      file_bytes: of what training makes: the adapter, or the model.
      memory: bytes on each device, by arithmetic.
      flops: for each token.
      mesh: name of a mesh axis -> its size.
      batch_size: rows in all.
      seq_len: tokens in a row.
      topology: the chips that it was compiled for, or None.
      compiled: what the TPU's compiler says, a `lora_jax.planning.compiled.Compiled`, or None.
    """

    model: str
    method: Method
    parameters: int
    trainable: int
    file_bytes: int
    memory: Memory
    flops: Flops
    mesh: Mapping[str, int]
    batch_size: int
    seq_len: int
    topology: str | None = None
    compiled: Any = None

    @property
    def share(self) -> float:
        """Trainable parameters over the model's."""
        return self.trainable / self.parameters

    @property
    def devices(self) -> int:
        """How many there are."""
        return math.prod(self.mesh.values())

    def spare(self) -> dict[str, int]:
        """Kind of chip -> bytes of its memory that are left; negative where the step does not fit.

        By arithmetic, for all kinds that are known. Compiled, for the kind that it was compiled
        for, with the memory that the compiler has to give there.
        """
        if self.compiled is None:
            return {chip: hbm - self.memory.total for chip, hbm in HBM.items()}
        chip = parse_topology(str(self.topology)).kind
        return {chip: (self.compiled.available or HBM[chip]) - self.compiled.peak}

    def rows(self) -> list[tuple[str, str]]:
        """Every line of the table: what, and how much."""
        mesh = ", ".join(f"{name}={size}" for name, size in self.mesh.items())
        step = self.flops.step * self.batch_size * self.seq_len
        rows = [
            ("parameters", f"{self.parameters:,}"),
            ("trainable", f"{self.trainable:,} ({self.share:.4%})"),
            ("adapter file" if self.method != "full" else "model file", size(self.file_bytes)),
            ("batch", f"{self.batch_size} rows of {self.seq_len:,} tokens"),
            ("mesh", f"{mesh} ({self.devices} device{'s' * (self.devices > 1)})"),
            *((f"memory: {name}", gib(n)) for name, n in self.memory.parts().items()),
            ("memory: in all, each device", gib(self.memory.total)),
            ("FLOPs a token, forward", f"{self.flops.forward:.4g}"),
            ("FLOPs a token, whole step", f"{self.flops.step:.4g}"),
            ("FLOPs a step, each device", f"{step / self.devices:.4g}"),
        ]
        if self.compiled is not None:
            rows.append((f"compiled for {self.topology}: each chip", gib(self.compiled.peak)))
        if self.compiled is not None and self.compiled.fits:
            rows.append(("compiled: FLOPs a step", f"{self.compiled.flops:.4g}"))
            rows += [
                (f"compiled: {kind}", f"{traffic.count:,} x, {size(traffic.nbytes)} sent")
                for kind, traffic in self.compiled.collectives.items()
            ]
        return rows

    def verdicts(self) -> list[str]:
        """Whether it fits, and by how much; a line for each kind of chip."""
        by = "by arithmetic" if self.compiled is None else "says its compiler"
        if self.memory.activations is None:
            by += ", activations not counted"
        return [
            f"{chip}: {'fits' if spare >= 0 else 'does not fit'}, {by}, "
            f"{gib(abs(spare))} {'to spare' if spare >= 0 else 'too much'}"
            for chip, spare in self.spare().items()
        ]

    def __str__(self) -> str:
        rows = [("model", f"{self.model}, {self.method}"), *self.rows()]
        width = max(len(what) for what, _ in rows)
        lines = [f"{what.ljust(width)}  {how_much}" for what, how_much in rows]
        return "\n".join([*lines, *self.verdicts()])

    __repr__ = __str__


def plan(
    model: str | DecoderConfig | GptShapes,
    config: LoraConfig | None = None,
    *,
    method: Method = "lora",
    mesh: Mapping[str, int] | None = None,
    batch_size: int = 1,
    seq_len: int = 2048,
    dtype: str = "bfloat16",
    topology: str | None = None,
    name: str | None = None,
) -> Plan:
    """Says what fine-tuning takes before anything is loaded or rented.

    The step is that of `lora-jax finetune`: AdamW, each layer recomputed in the backward pass
    (`remat`), layers scanned, scores of attention kept whole. All tokens are taken to be learned,
    for which logits are computed; where only answers are, it takes less.

    Args:
      model: a name, as of `lora_jax.models.known.known`, or the sizes of any decoder.
      config: the adapter's; by default rank 8 on all linear layers but the head. Not used by
        `"full"`.
      method: `"lora"`; `"qlora"`, on a base in `nf4` with double quantization; or `"full"`, all
        parameters trained in `dtype`, in which AdamW's moments are then, too.
      mesh: name of a mesh axis -> its size, of `data`, `fsdp` and `tensor`; by default one device.
      batch_size: rows in all, a multiple of the mesh's `data` times `fsdp`.
      seq_len: tokens in a row.
      dtype: of the base and of the arithmetic. An adapter is float32, unless its config says so.
      topology: also compiles the step for these chips, such as `"v5e:2x4"`, which need not be
        there. This takes libtpu (`pip install 'lora_jax[tpu-aot]'`) and a minute or more.
      name: what the plan calls the model; by default its known name.

    Returns:
      A `Plan`, which prints as a table.

    Raises:
      ValueError: no model has that name; sizes that do not divide, do not multiply to the number of
        chips, or are too long for the model; a topology that there is not; a config that does not
        fit.
      lora_jax.planning.chips.CompilerError: `topology` is given, and libtpu is not installed, or
        the compiler fails for another reason than memory.

    Example:
      >>> config = LoraConfig(
      ...     rank=4, targets=("*/q_proj/kernel", "*/v_proj/kernel"), dtype="float16")
      >>> p = plan("gpt3-175b", config, dtype="float16")
      >>> p.parameters, p.trainable, round(1 / p.share)
      (174604259328, 18874368, 9251)
    """
    named = model if isinstance(model, str) else name or "decoder"
    sizes = dict(mesh or {"data": 1})
    model = known(model) if isinstance(model, str) else model
    if isinstance(model, DecoderConfig):
        model = dataclasses.replace(model, dtype=dtype, scan_layers=True, remat=True)
    _check(model, method, sizes, batch_size, seq_len)
    config = config or default_config(model, rank=8)
    abstract = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    state = make_state(model, config, method, abstract, dtype=dtype)
    whole = state.params or state.trained
    trainable = parameter_count(state.trained)
    made = Plan(
        model=named,
        method=method,
        parameters=sum(
            math.prod(leaf.shape) for leaf in jax.tree.leaves(whole, is_leaf=is_virtual)
        ),
        trainable=trainable,
        file_bytes=stored_bytes(state.trained),
        memory=memory(model, state, abstract, batch_size=batch_size, seq_len=seq_len),
        flops=flops_per_token(
            model, whole, None if method == "full" else trainable, seq_len=seq_len
        ),
        mesh=sizes,
        batch_size=batch_size,
        seq_len=seq_len,
    )
    if topology is None:
        return made
    if isinstance(model, GptShapes):
        raise ValueError(
            f"topology: {named} is known by its shapes alone and cannot be compiled. Leave the "
            "topology out, or plan a decoder."
        )
    chips = parse_topology(topology)
    tpus = tpu_mesh(chips, sizes)
    # Needs the command line's packages, as the arithmetic does not.
    from lora_jax.planning.compiled import compile_step

    compiled = compile_step(
        model,
        make_state(model, config, method, tpus, dtype=dtype),
        tpus,
        batch_size=batch_size,
        seq_len=seq_len,
    )
    return dataclasses.replace(made, topology=str(chips), compiled=compiled)


def size(nbytes: int) -> str:
    """Bytes as people say them.

    >>> size(75_497_472)
    '75.5 MB'
    """
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.4g} {unit}"
    return f"{nbytes} bytes"


def gib(nbytes: int) -> str:
    """Bytes in the unit that memory is sold in.

    >>> gib(3 * 2**29)
    '1.500 GiB'
    """
    return f"{nbytes / GIB:,.3f} GiB"


def _check(
    model: DecoderConfig | GptShapes,
    method: str,
    mesh: Mapping[str, int],
    batch_size: int,
    seq_len: int,
) -> None:
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}.")
    if unknown := [name for name in mesh if name not in DECODER_AXES]:
        raise ValueError(
            f"mesh: expected axes named {', '.join(DECODER_AXES)}, got {unknown[0]!r}: no weight "
            "of the model is split over it."
        )
    for name, value in (*mesh.items(), ("batch_size", batch_size), ("seq_len", seq_len)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}.")
    parts = row_parts(mesh)
    if batch_size % parts:
        spelled = " x ".join(f"{name}={mesh[name]}" for name in row_axes(mesh))
        raise ValueError(
            f"batch_size: its rows are split over {spelled}: expected a multiple of {parts}, got "
            f"{batch_size}."
        )
    if seq_len > model.max_length:
        raise ValueError(
            f"seq_len: expected at most the model's {model.max_length:,}, got {seq_len:,}."
        )
