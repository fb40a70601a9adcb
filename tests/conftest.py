"""Eight CPU devices, strict promotion, full matmul precision, and the folder of real data."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
from tests.compiling import xla_flags

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
# Halves the compilation. Tests of what the compiler makes of a program have the mark `optimized`.
jax.config.update("jax_disable_most_optimizations", True)


def pytest_collection_modifyitems(items: list[pytest.Item]):
    """What takes minutes in processes of its own begins first: last, it would leave a core idle."""
    items.sort(key=lambda item: item.path.name != "test_processes.py")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout; tests that need it skip when it is absent."""
    path = Path(os.environ.get("MINILLM_SHARED", Path(__file__).parents[2] / "shared"))
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; set MINILLM_SHARED to the folder that has it")
    return path


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Let go of what a module has compiled: every program holds some of the 65,530 memory maps that
    Linux gives a process, and those of the whole session together are more."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def optimisations(request: pytest.FixtureRequest):
    """Let the compiler do its best where the mark asks for it."""
    marked = request.node.get_closest_marker("optimized") is not None
    jax.config.update("jax_disable_most_optimizations", not marked)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
