"""Options: schedules written out, the round trip through JSON, and what is refused."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from lora_jax.training.options import (
    DataOptions,
    FinetuneOptions,
    LoraOptions,
    ModelOptions,
    OptimizerOptions,
)


def rates(steps, **options):
    schedule = OptimizerOptions(**options).learning_rates(steps)
    return [float(schedule(step)) for step in range(steps)]


def test_the_learning_rate_rises_and_falls():
    got = rates(10, learning_rate=0.5, warmup=0.2, schedule="linear")
    # Two steps of warm-up: a third, two thirds, then from the top down to 0 over the other eight.
    wanted = [0.5 / 3, 1 / 3] + [0.5 * (1 - k / 8) for k in range(8)]
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_the_cosine_ends_at_zero():
    got = rates(9, learning_rate=2.0, warmup=0.0)
    np.testing.assert_allclose(
        got, [1 + math.cos(math.pi * k / 9) for k in range(9)], rtol=1e-5, atol=1e-6
    )


def test_a_constant_rate_only_warms_up():
    got = rates(5, learning_rate=1.0, warmup=0.4, schedule="constant")
    np.testing.assert_allclose(got, [1 / 3, 2 / 3, 1, 1, 1], rtol=1e-5)


def test_one_step_is_at_the_full_rate():
    assert rates(1, learning_rate=0.25) == [0.25]


def test_options_come_back_from_json():
    options = FinetuneOptions(
        model=ModelOptions(model="some/model", dtype="bfloat16", unroll=True, remat=True),
        data=DataOptions(data=Path("a/b.jsonl"), held_out=0.25, rows=3, row_length=64),
        lora=LoraOptions(rank=3, targets=("*/q_proj/kernel", "*/v_proj/kernel"), dropout=0.1),
        optimizer=OptimizerOptions(learning_rate=0.1, accumulate=4),
        steps=7,
        out=Path("out"),
    )
    again = FinetuneOptions.from_dict(json.loads(json.dumps(options.to_dict())))
    assert again == options
    assert isinstance(again.data.data, Path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"evaluations": -1}, "evaluations: expected 0 or more, got -1"),
        ({"data": DataOptions(rows=0)}, "rows: expected at least 1, got 0"),
        ({"data": DataOptions(row_length=1)}, "row_length: expected at least 2, got 1"),
        ({"data": DataOptions(held_out=2.5)}, "held_out: expected a whole number, or"),
        ({"data": DataOptions(held_out=0.0)}, "held_out: expected a whole number, or"),
        ({"resume": True, "overwrite": True}, "resume: expected it without --overwrite"),
        ({"optimizer": OptimizerOptions(learning_rate=0.0)}, "learning_rate: expected a positive"),
        (
            {"optimizer": OptimizerOptions(learning_rate=math.inf)},
            "learning_rate: expected a positive number, got inf",
        ),
        ({"optimizer": OptimizerOptions(warmup=1.5)}, "warmup: expected a share from 0 to 1"),
        ({"optimizer": OptimizerOptions(accumulate=0)}, "accumulate: expected at least 1, got 0"),
        ({"optimizer": OptimizerOptions(clip=-1.0)}, "clip: expected 0 or more, got -1.0"),
        ({"optimizer": OptimizerOptions(weight_decay=-1.0)}, "weight_decay: expected 0 or more"),
    ],
)
def test_numbers_out_of_range_are_named(changed, message):
    options = dataclasses.replace(FinetuneOptions(), **changed)
    with pytest.raises(ValueError, match=message):
        options.check()


def test_the_output_folder_is_named_after_model_and_data():
    assert FinetuneOptions().folder() == Path("runs/smollm2-sentiment")
    model, data = ModelOptions(model="/a/tiny.gguf"), DataOptions(data=Path("x/mine.jsonl"))
    assert FinetuneOptions(model=model, data=data).folder() == Path("runs/tiny-mine")
    assert FinetuneOptions(model=model).folder() == Path("runs/tiny-tweets")
    assert FinetuneOptions(out=Path("here")).folder() == Path("here")


def test_the_head_is_no_target_of_all_linear():
    assert LoraOptions().config(tied_head=False).exclude == ("lm_head/*",)
    assert LoraOptions().config(tied_head=True).exclude == ()
    own = LoraOptions(targets=("*/q_proj/kernel",), rank_stabilized=True, rank=4, alpha=8.0)
    config = own.config(tied_head=False)
    assert config.exclude == ()
    assert config.targets == ("*/q_proj/kernel",)
    assert config.scale == 4.0
