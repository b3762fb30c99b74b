"""Eight simulated CPU devices, so that meshes, pmap and shard_map have something to run on."""

import os

# Also for the processes that tests start: with libtpu installed, JAX would look for a TPU.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax

jax.config.update("jax_num_cpu_devices", 8)
