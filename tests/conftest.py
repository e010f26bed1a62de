"""Set before jax is imported: 8 CPU devices, so that every test can make any mesh, and caches of their own."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile more than they run: without LLVM's optimisations ten of test_step take 65 s, with them 80.
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8",
                                    "--xla_backend_optimization_level=0"])
os.environ["ORPO_JAX_CACHE"] = tempfile.mkdtemp(prefix="orpo_jax_test_cache_")
# What one test compiled another need not: all take 1,450 s, without this 1,640. Set where pytest starts, its workers
# have it too.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": tempfile.mkdtemp(prefix="orpo_jax_test_xla_"),
                   "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest

atexit.register(shutil.rmtree, os.environ["ORPO_JAX_CACHE"], ignore_errors=True)

# In CI the same change gives the same answer; elsewhere every run looks at new examples.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny random Llama with a chat template, in Hugging Face format."""
    import tiny

    return tiny.write_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def one_device(monkeypatch):
    """A run on one of the eight devices, whatever the config's mesh."""
    import jax

    from orpo_jax import sharding

    devices = jax.devices()[:1]
    monkeypatch.setattr(sharding.jax, "devices", lambda *_: devices)
