"""Batches of one shape with little padding: several examples packed into each row.

Every batch has the same shape, so that a training step compiles once. Rows are filled with whole
examples by grain's best-fit packing; the model keeps them apart by `segment_ids`.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import grain
import grain.experimental
import numpy as np

from lora_jax.training.examples import Example


class Batch(NamedTuple):
    """R rows of L tokens, and the K positions of each row at which a next token is learned.

    Attributes:
        tokens: int32 `[R, L]`, 0 in the padding.
        positions: int32 `[R, L]`, counted from 0 within each example.
        segment_ids: int32 `[R, L]`, 1, 2, ... for the examples of a row, 0 for padding.
        select: int32 `[R, K]`, positions in the row whose next token is learned. The model computes
            logits there only.
        select_targets: int32 `[R, K]`, that next token.
        select_weights: float32 `[R, K]`, 1, or 0 where a row has fewer than K such positions.
        select_examples: int32 `[R, K]`, index of the example each belongs to, -1 where the weight
            is 0.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    select: np.ndarray
    select_targets: np.ndarray
    select_weights: np.ndarray
    select_examples: np.ndarray


def training_batches(
    examples: Sequence[Example],
    *,
    row_length: int,
    rows: int,
    seed: int = 0,
    epochs: int | None = None,
) -> grain.DatasetIterator[Batch]:
    """Batches of shuffled examples, the same for the same arguments.

    Each epoch has its own order and has every example once. Rows left over at the very end are
    filled up with empty ones.

    Args:
        examples: what to learn from, none longer than `row_length`.
        row_length: L, tokens in a row.
        rows: R, rows in a batch.
        seed: of the shuffling.
        epochs: how often each example is seen; `None` is without end.

    Returns:
        An iterator with `get_state()`, a dictionary that JSON can hold, and `set_state(state)`,
        after which the batches are those that followed when the state was taken.

    Raises:
        ValueError: no examples, an example that is too long, or a number below 1.
    """
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs must be at least 1, or None for no end, got {epochs}.")
    elements = _elements(examples, row_length, rows)
    # 256 rows open at a time leave few gaps; more would gain less than 1 %, and take longer to fill
    # again after `set_state`. But no more than one epoch fills, or epochs would mix.
    epoch_rows = sum(len(element["tokens"]) for element in elements) // row_length
    open_rows = max(1, min(256, epoch_rows))
    stream = grain.MapDataset.source(elements).seed(seed).shuffle().repeat(epochs)
    return iter(_pack(stream, examples, row_length=row_length, rows=rows, open_rows=open_rows))


def evaluation_batches(examples: Sequence[Example], *, row_length: int, rows: int) -> list[Batch]:
    """Every example exactly once, in batches of one shape; the last is filled up with empty rows.

    Args:
        examples: what to measure on, none longer than `row_length`.
        row_length: L, tokens in a row.
        rows: R, rows in a batch.

    Returns:
        The batches; `select_examples` says which example each prediction belongs to.

    Raises:
        ValueError: as in `training_batches`.
    """
    elements = _elements(examples, row_length, rows)
    # Best fit of decreasing lengths, with room for all, wastes least. The order does not matter.
    elements.sort(key=lambda element: -len(element["tokens"]))
    stream = grain.MapDataset.source(elements)
    return list(_pack(stream, examples, row_length=row_length, rows=rows, open_rows=len(elements)))


def first_predictions(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Where the answer of each example in the batch starts.

    Returns:
        `(examples, flat)`, both int `[m]`: the indices of the examples in the batch, ascending, and
        for each the index of its first learned position in `select_targets.reshape(-1)`.
    """
    flat_examples = batch.select_examples.reshape(-1)
    examples, flat = np.unique(flat_examples, return_index=True)
    return examples[examples >= 0], flat[examples >= 0]


def fill(batch: Batch) -> float:
    """The share of the tokens that is not padding."""
    return float((batch.segment_ids > 0).mean())


def _elements(
    examples: Sequence[Example], row_length: int, rows: int
) -> list[dict[str, np.ndarray]]:
    """What grain packs: the tokens to read, and (position, target, example) of each to learn."""
    if row_length < 1 or rows < 1:
        raise ValueError(f"row_length and rows must be at least 1, got {row_length} and {rows}.")
    if not examples:
        raise ValueError("There are no examples to make batches of.")
    elements = []
    for index, example in enumerate(examples):
        # What follows the last learned token, and that token itself, need not be read.
        length = example.length
        if length > row_length:
            raise ValueError(
                f"{example.where}: {length} tokens do not fit in a row of {row_length}. Take "
                "longer rows, or leave it out with split_by_length."
            )
        learned = np.flatnonzero(example.loss)
        select = [learned - 1, example.tokens[learned], np.full_like(learned, index)]
        elements.append(
            {
                "tokens": example.tokens[:length].astype(np.int32),
                "select": np.stack(select, axis=1).astype(np.int32),
            }
        )
    return elements


def select_size(examples: Sequence[Example], row_length: int) -> int:
    """K: how many learned positions a row has room for.

    Enough for the largest example, and for half as many again as an average row has, so that the
    limit seldom keeps an example out of a row; a multiple of 8 up to `row_length`.
    """
    learned = [int(example.loss.sum()) for example in examples]
    average = row_length * sum(learned) / sum(example.length for example in examples)
    size = max(max(learned), 1.5 * average)
    return min(row_length, -(-int(np.ceil(size)) // 8) * 8)


def _pack(
    stream: grain.MapDataset,
    examples: Sequence[Example],
    *,
    row_length: int,
    rows: int,
    open_rows: int,
) -> grain.IterDataset[Batch]:
    """Packs elements into rows and rows into batches."""
    packed = grain.experimental.BestFitPackIterDataset(
        stream.to_iter_dataset(),
        length_struct={"tokens": row_length, "select": select_size(examples, row_length)},
        num_packing_bins=open_rows,
    )
    pad = functools.partial(grain.experimental.batch_and_pad, batch_size=rows)
    return packed.batch(rows, drop_remainder=False, batch_fn=pad).map(_assemble)


def _assemble(packed: dict[str, np.ndarray]) -> Batch:
    """A batch from grain's packed rows, in which positions are still counted from the example."""
    segment_ids, positions = packed["tokens_segment_ids"], packed["tokens_positions"]
    owner = packed["select_segment_ids"]
    real = owner > 0
    # starts[row, s] = where segment s + 1 starts; a segment never has more learned positions than
    # tokens, so every row has room for as many starts as it has select slots.
    starts = np.zeros_like(owner)
    row, column = np.nonzero((segment_ids > 0) & (positions == 0))
    starts[row, segment_ids[row, column] - 1] = column
    local, targets, index = np.moveaxis(packed["select"], -1, 0)
    select = local + np.take_along_axis(starts, np.maximum(owner - 1, 0), axis=1)
    return Batch(
        tokens=packed["tokens"],
        positions=positions,
        segment_ids=segment_ids,
        select=np.where(real, select, 0),
        select_targets=targets,
        select_weights=real.astype(np.float32),
        select_examples=np.where(real, index, -1),
    )
