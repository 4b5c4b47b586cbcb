"""What users import: by the short names, without loading what they do not use."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def loaded(code: str) -> set[str]:
    """Return the modules that are loaded after `code`, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_kernels_run_without_torch() -> None:
    code = """
import sys
sys.modules["torch"] = None
import numpy as np
from pagedkv.kernels import paged_attention_decode, reshape_and_cache
keys, values = np.zeros((2, 3, 4, 1, 16), np.float32)
reshape_and_cache(np.ones((2, 1, 16), np.float32), np.full((2, 1, 16), 5, np.float32), keys, values, np.array([4, 5]))
out = paged_attention_decode(np.ones((1, 2, 16), np.float32), keys, values, np.array([[1]]), np.array([2]), backend="reference")
assert np.allclose(out, 5)
"""
    assert "triton" not in loaded(code)


def test_importing_the_packages_loads_nothing_heavy() -> None:
    assert loaded("import pagedkv.kernels, pagedkv.runtime").isdisjoint({"torch", "transformers", "triton", "numba"})


@pytest.mark.parametrize("package", ["pagedkv.kernels", "pagedkv.runtime"])
def test_public_names_are_there(package: str) -> None:
    if package == "pagedkv.runtime":
        pytest.importorskip("torch", reason="the runtime needs torch")
        pytest.importorskip("pagedkv.runtime")
        pytest.importorskip("transformers", reason="the runtime's models are transformers'")
    module = import_module(package)
    for name in module.__all__:
        assert getattr(module, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = module.nonsense


def test_transformers_loads_where_the_checkouts_folders_are_on_the_path() -> None:
    pytest.importorskip("torch", reason="the runtime needs torch")
    pytest.importorskip("pagedkv.runtime")
    pytest.importorskip("transformers", reason="the runtime's models are transformers'")
    assert "transformers.models.llama.modeling_llama" in loaded("import pagedkv.runtime; from transformers import LlamaForCausalLM")
