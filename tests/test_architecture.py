"""Imports point one way, the command line starts light, and choices are files."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pagedkv.allocators import ALLOCATORS
from pagedkv.heaps import HEAPS
from pagedkv.registry import Registry
from pagedkv.sims.engines import ENGINES
from pagedkv.sims.measurements import MEASUREMENT_FORMATS
from pagedkv.sims.routing import ROUTING
from pagedkv.sims.traces import TRACE_FORMATS

ROOT = Path(__file__).parents[1]
CLI = "pagedkv.sims.cli"
COMPOSITION_ROOTS = (
    CLI,
    "pagedkv.sims.cli_calibrate",
    "pagedkv.sims.cli_generate",
    "pagedkv.sims.cli_reality",
    "pagedkv.sims.cli_serve",
)
"""What may load every part, once it is used."""

# Which parts a part may import; any other library is fine unless the part is the core.
ARROWS = {
    "core": {"core"},
    "kernels": {"core", "kernels"},
    "runtime": {"core", "kernels", "runtime"},
    "sims": {"core", "sims"},
}
CORE_LIBRARIES = {"numpy", "numba", "llvmlite"}  # the last is part of what numba is
CLOCKS_AND_DICE = ("time", "datetime", "random", "secrets", "uuid", "numpy.random")


class Import(NamedTuple):
    target: str
    lazy: bool
    """Within a function."""


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "pagedkv" else ("pagedkv", *parts)).removesuffix(".__init__")


def part(module: str) -> str | None:
    """Return the part of the project that `module` belongs to; None if it is somebody else's."""
    first, _, rest = module.partition(".")
    if first != "pagedkv":
        return None
    second = rest.partition(".")[0]
    return second if second in ARROWS else "core"


def imports(module: str, tree: ast.AST, *, is_package: bool = False) -> Iterator[Import]:
    """Yield what `module` imports, submodules under their own names: `from pagedkv import sims` is an import of pagedkv.sims."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
    lazy = {id(inner) for function in functions for inner in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, id(node) in lazy)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")
            base = base[: len(base) - node.level + is_package] if node.level else []
            target = ".".join((*base, *([node.module] if node.module else [])))
            for alias in node.names:
                yield Import(f"{target}.{alias.name}", id(node) in lazy)


def wrong_arrows(module: str, source: str, *, is_package: bool = False) -> list[str]:
    tree, here = ast.parse(source), part(module)
    assert here is not None
    wrong = []
    for target, lazy in imports(module, tree, is_package=is_package):
        library, there = target.partition(".")[0], part(target)
        if there is None:
            allowed = here != "core" or library in CORE_LIBRARIES or library in sys.stdlib_module_names
        else:
            allowed = there in ARROWS[here] or (module in COMPOSITION_ROOTS and lazy)
        forbidden = (CLI, *CLOCKS_AND_DICE) if here == "core" else (CLI,)
        if not allowed or any(f"{target}.".startswith(f"{name}.") for name in forbidden):
            wrong.append(target)
    uses = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return wrong + sorted(uses & {"np.random", "numpy.random"} if here == "core" else [])


def sources() -> list[Path]:
    return [file for part in ("pagedkv", "sims", "kernels") for file in sorted((ROOT / part).rglob("*.py"))]


@pytest.mark.parametrize("file", sources(), ids=module_name)
def test_imports_point_one_way(file: Path) -> None:
    assert wrong_arrows(module_name(file), file.read_text(encoding="utf-8"), is_package=file.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("pagedkv.heaps.buddy", "import pagedkv.sims.engine", ["pagedkv.sims.engine"]),
        ("pagedkv.heaps.buddy", "from pagedkv import sims", ["pagedkv.sims"]),
        ("pagedkv.heaps.buddy", "from ..kernels import cpu", ["pagedkv.kernels.cpu"]),
        ("pagedkv.heaps.buddy", "def f():\n    import torch", ["torch"]),
        ("pagedkv.heaps.buddy", "from numpy import random", ["numpy.random"]),
        ("pagedkv.heaps.buddy", "rng = np.random.default_rng(0)", ["np.random"]),
        ("pagedkv.jit", "from time import monotonic", ["time.monotonic"]),
        ("pagedkv.jit", "import random", ["random"]),
        ("pagedkv.runtime.model", "import torch\nfrom pagedkv.kernels import cpu", []),
        ("pagedkv.runtime.model", "from pagedkv.sims import engine", ["pagedkv.sims.engine"]),
        ("pagedkv.kernels.cpu", "import pagedkv.runtime.model", ["pagedkv.runtime.model"]),
        ("pagedkv.sims.engine", "import simpy\nfrom pagedkv.kernels import cpu", ["pagedkv.kernels.cpu"]),
        ("pagedkv.sims.engine", "def f():\n    import pagedkv.runtime", ["pagedkv.runtime"]),
        ("pagedkv.sims.cli", "def f():\n    import pagedkv.runtime", []),
        ("pagedkv.sims.cli", "import pagedkv.runtime", ["pagedkv.runtime"]),
        ("pagedkv.sims.console", "from pagedkv.sims.cli import main", ["pagedkv.sims.cli.main"]),
        ("pagedkv.sims.console", "def f():\n    from . import cli", ["pagedkv.sims.cli"]),
    ],
)
def test_a_wrong_arrow_would_be_found(module: str, source: str, wrong: list[str]) -> None:
    assert wrong_arrows(module, source) == wrong


def test_all_parts_are_read() -> None:
    names = {module_name(file) for file in sources()}
    assert {"pagedkv", "pagedkv.heaps.buddy", CLI, "pagedkv.sims.traces", "pagedkv.kernels"} <= names
    assert len(names) > 40


def python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_line_starts_without_heavy_modules() -> None:
    done = python(f"import sys, {CLI}; print(*sys.modules)")
    loaded = set(done.stdout.split())
    assert CLI in loaded, done.stderr
    assert loaded.isdisjoint({"numba", "plotly", "torch", "simpy", "triton"})


@pytest.mark.parametrize("name", ["sims", "kernels"])
def test_folders_cannot_be_imported_under_their_bare_names(name: str) -> None:
    done = python(f"import {name}")
    assert done.returncode == 1
    assert f"ImportError: import this package as 'pagedkv.{name}'" in done.stderr


@pytest.mark.parametrize(
    "registry",
    [ALLOCATORS, HEAPS, ENGINES, ROUTING, TRACE_FORMATS, MEASUREMENT_FORMATS],
    ids=["allocators", "heaps", "engines", "routing", "traces", "measurements"],
)
def test_choices_are_what_the_files_register(registry: Registry[Any]) -> None:
    for name in registry.names():
        registry.load(name)
    assert sorted(registry._registered) == list(registry.names())
    assert registry.names()
