"""Four simulated devices, so that pmap and shard_map have something to run on."""

import jax

jax.config.update("jax_num_cpu_devices", 4)
