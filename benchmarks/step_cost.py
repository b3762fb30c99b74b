"""What one training step costs: FLOPs and bytes of the compiled program, by XLA's own count.

Deterministic: no clock is read. Run with `python benchmarks/step_cost.py`.
"""

from __future__ import annotations

from programs import BATCH, LAYERS, RANK, WIDTH, dense_stack_steps


def main() -> None:
    """Prints the table."""
    steps = dense_stack_steps()
    unit = steps["forward"].cost_analysis()["flops"]
    hand = steps["by hand"]
    print(f"value_and_grad of {LAYERS} dense layers of {WIDTH}, rank {RANK}, batch {BATCH}")
    print(f"{'step':10} {'FLOPs':>14} {'/ forward':>10} {'/ by hand':>10}"
          f" {'temporaries':>14} {'/ by hand':>10} {'outputs':>12}")  # fmt: skip
    for name, step in steps.items():
        flops = step.cost_analysis()["flops"]
        memory = step.memory_analysis()
        print(
            f"{name:10} {flops:14,.0f} {flops / unit:10.4f} "
            f"{flops / hand.cost_analysis()['flops']:10.4f} {memory.temp_size_in_bytes:14,} "
            f"{memory.temp_size_in_bytes / hand.memory_analysis().temp_size_in_bytes:10.4f} "
            f"{memory.output_size_in_bytes:12,}"
        )
    bound = 2 - 1 / LAYERS + 6 * RANK / WIDTH
    print(f"bound on the lifted step, 2 - 1/L + 6r/d: {bound:.4f} forwards")


if __name__ == "__main__":
    main()
