"""The examples in docstrings are true."""

import doctest
import importlib
from pathlib import Path

import pytest

import pagedkv
import pagedkv.sims


def modules() -> list[str]:
    """Every module of the core and of the simulator. (`pagedkv.__path__` would also find what lies beside them in a checkout.)"""
    found = []
    for package in (pagedkv, pagedkv.sims):
        root = Path(str(package.__file__)).parent
        files = [f for f in sorted(root.rglob("*.py")) if package is not pagedkv or f.relative_to(root).parts[0] not in OTHERS]
        found += [".".join((package.__name__, *file.relative_to(root).with_suffix("").parts)) for file in files]
    return [name.removesuffix(".__init__") for name in found]


OTHERS = ("sims", "kernels", "runtime")
"""In an installed package these lie inside the core's folder."""
OF_AN_EXTRA = {
    "pagedkv.sims.serve.answer_response": "starlette",
    "pagedkv.sims.serve.app": "starlette",
    "pagedkv.sims.serve.server": "uvicorn",
}
"""By module: what it is made of, which need not be there."""


@pytest.mark.parametrize("name", modules())
def test_examples(name: str) -> None:
    if name in OF_AN_EXTRA:
        pytest.importorskip(OF_AN_EXTRA[name], reason="it is for those who serve: pip install 'pagedkv[serve]'")
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_examples_are_found() -> None:
    examples = [len(test.examples) for test in doctest.DocTestFinder().find(importlib.import_module("pagedkv.block_pool"))]
    assert sum(examples) >= 4
    assert {"pagedkv", "pagedkv.heaps.buddy", "pagedkv.sims.cli", "pagedkv.sims.traces"} <= set(modules())
