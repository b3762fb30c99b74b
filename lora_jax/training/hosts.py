"""Several hosts as one run: each is started with the same command, and they find one another."""

from __future__ import annotations

import signal
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Stop = Callable[[], signal.Signals | None]

FROM_CLUSTER = "auto"


def join(coordinator: str | None, num_hosts: int | None, host_id: int | None) -> None:
    """Makes this process one of several; before JAX does anything else.

    Args:
        coordinator: `HOST:PORT` of host 0, which the others can reach; `"auto"` takes all three
            from the cluster's environment (Cloud TPU, Kubernetes, Slurm, Open MPI); `None` for one
            process alone.
        num_hosts: How many processes there are.
        host_id: Which of them this is, from 0.

    Raises:
        ValueError: They do not belong together, or the others do not answer.
    """
    given = {"num_hosts": num_hosts, "host_id": host_id}
    if coordinator is None or coordinator == FROM_CLUSTER:
        if extra := [name for name, value in given.items() if value is not None]:
            raise ValueError(
                f"{extra[0]}: expected it together with coordinator=HOST:PORT of host 0, got "
                f"coordinator={coordinator}."
            )
        if coordinator is None:
            return
    else:
        if missing := [name for name, value in given.items() if value is None]:
            raise ValueError(
                f"{missing[0]}: expected a number, since coordinator={coordinator} is given. Give "
                f'all three, or coordinator="{FROM_CLUSTER}" on a cluster that JAX knows.'
            )
        if not (num_hosts and host_id is not None and 0 <= host_id < num_hosts):
            raise ValueError(
                f"host_id: expected a number from 0 to num_hosts - 1, got {host_id} of {num_hosts}."
            )
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"coordinator: expected HOST:PORT, got {coordinator!r}.")
    try:
        if coordinator == FROM_CLUSTER:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(coordinator, num_hosts, host_id)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"coordinator: {coordinator}: the hosts did not come together ({error}). Start the "
            "same command on every host, each with its own host_id, and check that all reach "
            "host 0 at that port."
        ) from error


def is_first() -> bool:
    """Whether this process is the one that writes and prints for all."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns when every process is here.

    Args:
        what: The same in every process; for the error when one does not come.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def agreeing(stop: Stop, mesh: Mesh | None) -> Stop:
    """A function that says in every process what `stop` said in any of them, one call later.

    So that all stop after the same step, whichever of them was told to. The flags are compared on
    the devices, behind the step, and nobody waits for them: what a call returns has been computed
    since the call before.

    Args:
        stop: Which signal came to this process, or `None`.
        mesh: Of the run. Another one might have the devices in another order, which JAX refuses.
    """
    if jax.process_count() == 1 or mesh is None:
        return stop
    count = mesh.devices.size
    each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    everywhere = NamedSharding(mesh, PartitionSpec())
    highest = jax.jit(jnp.max, out_shardings=everywhere)
    asked: list[jax.Array] = []

    def agreed() -> signal.Signals | None:
        own = np.full(1, stop() or 0, np.int32)
        asked.append(highest(jax.make_array_from_callback((count,), each, lambda _: own)))
        found = int(asked.pop(0)) if len(asked) > 1 else 0
        return signal.Signals(found) if found else None

    return agreed
