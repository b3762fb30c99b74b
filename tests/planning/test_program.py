"""What is read from the text of compiled programs, against counts written out by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax.planning.program import Traffic, read_program

# Two all-gathers in each of 5 turns (up to 9, in steps of 2), one of them spread over two fusions;
# an all-reduce outside; a batch of 3 products as a TPU writes it, [4, 8] x [8, 16].
PROGRAM = """
HloModule step

%fused.1 (p.0: bf16[4,8]) -> bf16[16,8] {
  %p.0 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[16,8]{1,0} all-gather(%p.0), channel_id=1, replica_groups=mesh['x'=4] {'x'}, dimensions={0}
}

%fused.2 (p.1: bf16[4,8]) -> bf16[16,8] {
  %p.1 = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[16,8]{1,0} all-gather(%p.1), channel_id=1, replica_groups=mesh['x'=4] {'x'}, dimensions={0}
}

%body (state: (u32[], bf16[4,8])) -> (u32[], bf16[4,8]) {
  %state = (u32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %part = bf16[4,8]{1,0} get-tuple-element(%state), index=1
  %first = bf16[16,8]{1,0} fusion(%part), kind=kLoop, calls=%fused.1
  %second = bf16[16,8]{1,0} fusion(%part), kind=kLoop, calls=%fused.2
  %gathered = (f32[2]{0}, f32[8]{0}) all-gather-start(%part), channel_id=2, replica_groups=[1,4]<=[4], dimensions={0}
  %left = f32[3,4,8]{2,1,0} constant({...})
  %right = f32[3,8,16]{2,1,0} constant({...})
  %product = f32[3,4,16]{2,1,0} convolution(%left, %right), window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf
  %turn.1 = u32[] get-tuple-element(%state), index=0
  %two = u32[] constant(2)
  %advanced = u32[] add(%turn.1, %two)
  ROOT %next = (u32[], bf16[4,8]{1,0}) tuple(%advanced, %part)
}

%condition (state.1: (u32[], bf16[4,8])) -> pred[] {
  %limit = u32[]{:T(128)} constant(9)
  %state.1 = (u32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %turn = u32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%turn, %limit), direction=LT
}

ENTRY %main (arg: bf16[4,8]) -> bf16[4,8] {
  %arg = bf16[4,8]{1,0} parameter(0)
  %loop = (u32[]{:T(128)}, /*index=1*/bf16[4,8]{1,0:T(8,128)(2,1)}) while(%arg), condition=%condition, body=%body
  %sum = f32[10]{0} all-reduce(%arg), channel_id=3, replica_groups={{0,1},{2,3}}, to_apply=%add
  %sent = (s8[7]{0}, s8[7]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%arg), channel_id=4, source_target_pairs={{0,1}}
  ROOT %out = bf16[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_loops_count_by_their_turns_and_spread_collectives_once():
    work = read_program(PROGRAM)
    one = 2 * 3 * 4 * 8 * 16
    assert (work.product_flops, work.repeated_flops) == (5 * one, 4 * one)
    assert work.collectives == {
        # Three quarters of 256 and of 32 bytes, 5 times; half of 40 bytes twice; 7 bytes.
        "all-gather": Traffic(10, 5 * (192 + 24)),
        "all-reduce": Traffic(1, 40),
        "collective-permute": Traffic(1, 7),
    }


def test_a_loop_without_an_end_that_can_be_read():
    endless = PROGRAM.replace("constant(9)", "parameter(1)")
    with pytest.raises(
        ValueError, match="loop: expected a loop of one counter up to one constant, got 1 and 0"
    ):
        read_program(endless)


def test_a_compiled_scan_of_products_on_four_devices():
    """What XLA itself writes for CPUs: 6 turns of [8, 32] x [32, 32], rows split in 4."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())

    def program(x, kernels):
        y, _ = lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)
        return y.sum(0)

    x = jax.ShapeDtypeStruct((8, 32), jnp.float32, sharding=split)
    kernels = jax.ShapeDtypeStruct((6, 32, 32), jnp.float32, sharding=whole)
    compiled = jax.jit(program, out_shardings=whole).lower(x, kernels).compile()
    work = read_program(compiled.as_text())
    once = 2 * 2 * 32 * 32
    assert (work.product_flops, work.repeated_flops) == (6 * once, 5 * once)
    # In a ring of 4, three quarters of [32] float32 twice.
    assert work.collectives == {"all-reduce": Traffic(1, 192)}
