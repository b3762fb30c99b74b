"""What a run saves while it trains, into its folder, and how it goes on from there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from lora_jax import checkpoint
from lora_jax.config import LoraConfig
from lora_jax.training.evaluation import Evaluation
from lora_jax.training.folder import RunFolder
from lora_jax.training.loop import Interrupted, NonFiniteLoss
from lora_jax.training.step import TrainState


class Saves:
    """A run's checkpoints, and its adapter for others to take away.

    Leave it as a context manager: that waits for the last save, and copies the adapter of the last
    checkpoint to the folder's `adapter`, also after an error, unless nothing was saved before it.
    """

    def __init__(self, folder: RunFolder, config: LoraConfig, params: Any, *, keep: int):
        """Opens a run's folder and changes nothing in it.

        Args:
            folder: of the run.
            config: the adapter's.
            params: the base, for its fingerprint.
            keep: how many of the last checkpoints to keep. The one with the lowest held-out loss
                is kept too.

        Raises:
            CheckpointError: the folder's checkpoints are something else.
        """
        self._folder = folder
        self._checkpoints = checkpoint.Checkpoints(
            folder.checkpoints, config, params, keep=keep, best="loss"
        )
        self._step: int | None = None  # Saved last, or gone on from.
        self._saved = False

    def __enter__(self) -> Saves:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        planned = kind is None or issubclass(kind, (Interrupted, NonFiniteLoss))
        if jax.process_count() > 1 and not planned:
            return  # The other hosts know nothing of it: waiting for them would never end.
        with self._room():
            self._checkpoints.close()
        last = self.latest()
        if last is not None and (self._saved or planned):
            with self._folder.room("adapter/"):
                checkpoint.export(self._folder.checkpoints / str(last), self._folder.adapter)

    def save(
        self,
        step: int,
        state: TrainState,
        *,
        place: Mapping[str, Any],
        evaluation: Evaluation | None = None,
    ) -> None:
        """Saves in the background; the state may be donated when this returns.

        What was saved already, or is what the run went on from, is not saved again.

        Args:
            step: how many updates were made.
            state: of the training.
            place: the data iterator's state and what else must be known to go on; JSON values.
            evaluation: of this state, if there was one.

        Raises:
            DiskFull: there is no room for this or for the save before it; what was complete is
                still there.
        """
        if step == self._step:
            return
        with self._room():
            self._checkpoints.wait()
        self._step = step
        metrics = {} if evaluation is None else {"loss": evaluation.loss}
        with self._room():
            self._checkpoints.save(step, state.adapter, _rest(state), place=place, metrics=metrics)
        self._saved = True

    def restore(
        self, like: TrainState, step: int | None = None
    ) -> tuple[int, TrainState, dict[str, Any]]:
        """Reads what `save` saved; changes nothing.

        Args:
            like: a state of the same structure, shapes and dtypes. Leaves are put where its leaves
                are.
            step: which; None for the last.

        Returns:
            `(step, state, place)`.

        Raises:
            CheckpointError: as in `Checkpoints.restore`.
        """
        found = self._checkpoints.restore((like.adapter, _rest(like)), step)
        self._step, adapter, rest, place = found
        return self._step, dataclasses.replace(like, adapter=adapter, **rest), place

    def latest(self) -> int | None:
        """The last step that was saved; `None` if there is none."""
        return self._checkpoints.latest()

    def forget_after(self, step: int) -> None:
        """Removes the checkpoints of later steps, which a run that goes on from it does again."""
        self._checkpoints.forget_after(step)

    def _room(self) -> Any:
        return self._folder.room(f"step {self._step}")


def _rest(state: TrainState) -> dict[str, Any]:
    """All but the adapter."""
    return {"opt_state": state.opt_state, "step": state.step, "key": state.key}
