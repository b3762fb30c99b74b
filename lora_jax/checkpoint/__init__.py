"""Checkpoints, with Orbax: an adapter alone, or the steps of a training run."""

from lora_jax.checkpoint.adapter import export as export
from lora_jax.checkpoint.adapter import read_about as read_about
from lora_jax.checkpoint.adapter import restore as restore
from lora_jax.checkpoint.adapter import save as save
from lora_jax.checkpoint.base import abstract_base as abstract_base
from lora_jax.checkpoint.base import difference as difference
from lora_jax.checkpoint.base import fingerprint as fingerprint
from lora_jax.checkpoint.layout import CheckpointError as CheckpointError
from lora_jax.checkpoint.layout import UnreadableError as UnreadableError
from lora_jax.checkpoint.layout import abstract_adapter as abstract_adapter
from lora_jax.checkpoint.steps import Checkpoints as Checkpoints
from lora_jax.checkpoint.steps import latest_step as latest_step
