"""Budgets as tests of ledgers ask for them, and what each engine can be asked."""

import json
import re
from dataclasses import fields
from typing import Any

from hypothesis import strategies as st

from pagedkv.catalogue import load_hardware, load_model
from pagedkv.errors import ConfigError
from pagedkv.ledgers import LEDGERS
from pagedkv.memory_budget import MemoryBudget
from pagedkv.memory_plan import plan
from pagedkv.memory_request import MemoryRequest
from pagedkv.weight_format import load_weight_format

GIB, MIB = 2**30, 2**20
HUNDREDTHS = st.integers(5, 99).map(lambda hundredths: hundredths / 100)
DTYPES = st.sampled_from(["auto", "fp8"])
OWN = {
    "vllm": st.fixed_dictionaries({}, optional={"kv_cache_dtype": DTYPES, "kv_cache_memory_bytes": st.integers(0, 20 * GIB)}),
    "sglang": st.fixed_dictionaries(
        {},
        optional={
            "kv_cache_dtype": DTYPES,
            "mem_fraction_static": HUNDREDTHS,
            "page_size": st.sampled_from([1, 16, 64]),
            "max_total_tokens": st.integers(1, 100_000),
        },
    ),
    "tensorrt-llm": st.fixed_dictionaries(
        {},
        optional={
            "kv_cache_dtype": DTYPES,
            "free_gpu_memory_fraction": HUNDREDTHS,
            "tokens_per_block": st.sampled_from([2, 32, 128]),
            "max_tokens": st.integers(1, 100_000),
        },
    ),
    "transformers": st.fixed_dictionaries({}, optional={"kv_cache_dtype": st.sampled_from(["auto", "float16"])}),
    "llama-cpp": st.fixed_dictionaries(
        {},
        optional={
            "kv_cache_dtype": st.sampled_from(["auto", "q8_0", "q8_0/q4_0", "q4_0"]),
            "ctx_size": st.integers(0, 200_000),
            "parallel": st.integers(1, 9),
            "kv_unified": st.booleans(),
            "ubatch_size": st.sampled_from([64, 512, 2048]),
            "swa_full": st.booleans(),
        },
    ),
}


def ask(engine: str, model: str = "llama-3.1-8b", hardware: str = "dgx-spark", **settings: Any) -> MemoryRequest:
    """Ask for a budget with the machine's defaults, unless `settings` says otherwise; names as on the command line."""
    spec, machine, ledger_type = load_model(model), load_hardware(hardware), LEDGERS.load(engine)
    quantization = settings.pop("quantization", None)
    own = {f.name: settings.pop(f.name) for f in fields(ledger_type) if f.name in settings}  # type: ignore[arg-type]
    if engine == "vllm":
        own.setdefault("gpu_memory_utilization", machine.default_utilization.value)
    defaults: dict[str, Any] = {
        "max_model_len": 2048,
        "max_num_seqs": machine.default_max_num_seqs,
        "max_num_batched_tokens": machine.default_max_num_batched_tokens,
        "weight_format": load_weight_format(quantization) if quantization else spec.native_format,
    }
    return MemoryRequest(model=spec, hardware=machine, engine=engine, ledger=ledger_type(**own), **{**defaults, **settings})


def budget(engine: str, *names: str, **settings: Any) -> MemoryBudget:
    return plan(ask(engine, *names, **settings))


def suggestions(error: ConfigError) -> list[dict[str, Any]]:
    """Return the settings that a message proposes, as arguments of `ask`."""
    _, _, listed = str(error).partition("What fits: ")
    listed = re.sub(r" \(at its start: [^)]*\)", "", listed)
    if listed in ("", "nothing in the catalogue"):
        return []
    pairs = (re.findall(r"--([a-z-]+)(?: (?!--)(\S+))?", alternative) for alternative in listed.split("; or "))
    return [dict(_setting(name, value) for name, value in each) for each in pairs]


def _setting(flag: str, value: str) -> tuple[str, Any]:
    if flag.startswith("no-"):
        return flag.removeprefix("no-").replace("-", "_"), False
    return flag.replace("-", "_"), json.loads(value) if re.fullmatch(r"[0-9.]+", value) else value or True
