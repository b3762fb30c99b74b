"""The headlines of the LoRA paper (arXiv:2106.09685) for GPT-3 175B, from `lora_jax.plan`.

Rank 4 on the query and value kernels, in 16 bits as there. Arithmetic alone, so it takes no time,
and no weights. Run with `python benchmarks/paper_headlines.py`.
"""

from __future__ import annotations

import jax

import lora_jax as lora

CONFIG = lora.LoraConfig(rank=4, targets=("*/q_proj/kernel", "*/v_proj/kernel"), dtype="float16")


def main() -> None:
    """Prints the table."""
    jax.config.update("jax_platforms", "cpu")
    adapters = lora.plan("gpt3-175b", CONFIG, dtype="float16")
    full = lora.plan("gpt3-175b", CONFIG, method="full", dtype="float16")

    def kept(plan: lora.Plan) -> float:
        memory = plan.memory
        return (memory.base + memory.adapter + memory.optimizer) / 1e9

    def in_all(plan: lora.Plan) -> float:
        return plan.memory.total / 1e9

    print("| GPT-3 175B | full | LoRA | ratio |\n|---|---|---|---|")
    for what, one, other, unit in (
        ("trainable parameters", full.trainable / 1e6, adapters.trainable / 1e6, "M"),
        ("weights and optimizer", kept(full), kept(adapters), "GB"),
        ("the same and gradients", in_all(full), in_all(adapters), "GB"),
        ("what a task is stored as", full.file_bytes / 1e6, adapters.file_bytes / 1e6, "MB"),
    ):
        print(f"| {what} | {one:,.1f} {unit} | {other:,.1f} {unit} | {one / other:,.2f} |")


if __name__ == "__main__":
    main()
