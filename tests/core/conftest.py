"""Settings for tests that compile many small programs."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compilation():
    """Hundreds of programs of a few numbers each: compiling them well takes longer than running."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
