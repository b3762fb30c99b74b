"""The TPU compiler's own answer: the training step, compiled for chips that need not be there."""

from __future__ import annotations

import dataclasses
import functools
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax.models import decoder
from lora_jax.models.config import DecoderConfig
from lora_jax.models.partition import row_axes
from lora_jax.planning.chips import CompilerError
from lora_jax.planning.program import Traffic, read_program
from lora_jax.planning.state import State
from lora_jax.training.batching import Batch
from lora_jax.training.mesh import spell_mesh
from lora_jax.training.objective import next_token_loss
from lora_jax.training.step import LossFn, TrainState, make_step
from lora_jax.transform.lift import lift

# Before it has placed the arrays and after, in these words: "the total memory required for HLO
# temporaries (34.35G) exceeds available HBM (15.75G)", which counts arguments too, and "Used 20.50G
# of 15.75G hbm".
_TOO_LARGE = re.compile(
    r"(?:required for HLO temporaries \(|Used )([\d.]+)([KMGT]?)\)?"
    r" (?:exceeds available HBM \(|of )([\d.]+)([KMGT]?)"
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What XLA:TPU says of one step.

    Attributes:
      fits: whether the program fits the chip's memory.
      peak: bytes on each chip: arguments and results, of which those that share memory count once,
        and temporaries. Where it does not fit, what the compiler says it would take.
      available: what the compiler has to give, where it says so: that is when it does not fit.
      flops: of each chip in one step, loops counted by their turns; None where it does not fit.
      collectives: kind -> what each chip sends in one step; empty where it does not fit.
    """

    fits: bool
    peak: int
    available: int | None = None
    flops: int | None = None
    collectives: dict[str, Traffic] = dataclasses.field(default_factory=dict)


def compile_step(
    model: DecoderConfig, state: State, mesh: Mesh, *, batch_size: int, seq_len: int
) -> Compiled:
    """Compiles the step as `lora-jax finetune` trains it, without a device.

    Args:
      model: the decoder as it is run.
      state: its abstract arrays, placed on `mesh`.
      mesh: of devices of `jax.experimental.topologies`.
      batch_size: rows in all.
      seq_len: tokens in a row; the token after each is learned.

    Raises:
      CompilerError: the compiler fails, and not for want of memory.
    """
    step, arguments = training_step(model, state, mesh, batch_size=batch_size, seq_len=seq_len)
    results = jax.tree.map(lambda leaf: leaf.sharding, arguments[0]), None
    with jax.set_mesh(mesh):
        lowered = jax.jit(step, donate_argnums=0, out_shardings=results).lower(*arguments)
    with tempfile.TemporaryDirectory() as folder:
        # The compiler itself writes the program down: `as_text` of JAX 0.10 fails on those for v5p,
        # whose asynchronous instructions it does not know.
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            return from_error(error, mesh)
        (written,) = Path(folder).glob("*.after_optimizations.txt")
        work = read_program(written.read_text())
    memory: Any = compiled.memory_analysis()
    counted: Any = compiled.cost_analysis()
    return Compiled(
        fits=True,
        peak=(
            memory.argument_size_in_bytes + memory.temp_size_in_bytes
            + memory.output_size_in_bytes - memory.alias_size_in_bytes
        ),
        # It counts the bodies of loops once.
        flops=int(counted["flops"]) + work.repeated_flops,
        collectives=work.collectives,
    )  # fmt: skip


def training_step(
    model: DecoderConfig, state: State, mesh: Mesh, *, batch_size: int, seq_len: int
) -> tuple[Any, tuple[TrainState, Any, Batch]]:
    """The step of `make_step`, and its abstract arguments."""
    apply = functools.partial(decoder.apply, model)
    loss_fn = next_token_loss(lift(apply) if state.params else apply)
    if not state.params:  # All of them are trained: nothing is put onto a base.
        loss_fn = _of_all(loss_fn)

    def array(shape: tuple[int, ...], dtype: Any, *axes: Any) -> Any:
        return jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes))
        )

    rows = row_axes(mesh.shape)
    integers = array((batch_size, seq_len), jnp.int32, rows)
    weights = array((batch_size, seq_len), jnp.float32, rows)
    batch = Batch(
        tokens=integers, positions=integers, segment_ids=integers, select=integers,
        select_targets=integers, select_weights=weights, select_examples=integers,
    )  # fmt: skip
    key = jax.eval_shape(lambda: jax.random.key(0))
    train_state = TrainState(
        state.trained, state.opt_state, array((), jnp.int32), array((), key.dtype)
    )
    return make_step(loss_fn, state.tx, max_grad_norm=1.0), (train_state, state.params, batch)


def _of_all(loss_fn: LossFn) -> LossFn:
    return lambda trained, _, batch, key: loss_fn({}, trained, batch, key)


def from_error(error: Exception, mesh: Mesh) -> Compiled:
    """The answer that is in an error of the compiler: that it does not fit, and by how much.

    Raises:
      CompilerError: it is about something else.
    """
    text = str(error)
    found = _TOO_LARGE.search(text)
    if not text.startswith("RESOURCE_EXHAUSTED") or found is None:
        spelled = spell_mesh(mesh.shape)
        raise CompilerError(
            f"XLA:TPU did not compile the step for {mesh.devices.size} x "
            f"{mesh.devices.flat[0].device_kind} as {spelled}: {text}"
        ) from error
    needed, available = (
        int(float(size) * _UNITS[unit]) for size, unit in (found.group(1, 2), found.group(3, 4))
    )
    return Compiled(fits=False, peak=needed, available=available)
