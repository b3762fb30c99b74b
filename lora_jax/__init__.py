"""Low-rank adapters for any JAX function."""

from lora_jax.checkpoint import restore as restore
from lora_jax.checkpoint import save as save
from lora_jax.config import LoraConfig as LoraConfig
from lora_jax.initialization import init as init
from lora_jax.merging import merge as merge
from lora_jax.merging import switch as switch
from lora_jax.merging import unmerge as unmerge
from lora_jax.optim import adapter_only as adapter_only
from lora_jax.summaries import Summary as Summary
from lora_jax.summaries import summary as summary
from lora_jax.transform.lift import lift as lift
from lora_jax.tree import combine as combine
from lora_jax.tree import split as split
from lora_jax.tree import trainable_mask as trainable_mask
