"""Memory budgets under vLLM's ledger: what tests of them ask with."""

import json
import re
from dataclasses import fields
from typing import Any

from pagedkv.catalogue import load_hardware, load_model
from pagedkv.errors import ConfigError
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.kv_spec import LayerGroup
from pagedkv.ledgers.vllm import VLLMLedger
from pagedkv.memory_budget import MemoryBudget
from pagedkv.memory_plan import plan as plan_request
from pagedkv.memory_request import MemoryRequest
from pagedkv.model_spec import ModelSpec
from pagedkv.weight_format import load_weight_format

GIB = 2**30

SPARK_VISIBLE = load_hardware("dgx-spark").visible_bytes

OF_THE_LEDGER = {field.name for field in fields(VLLMLedger)}


def plan_memory(model: ModelSpec, hardware: HardwareSpec, **settings: Any) -> MemoryBudget:
    """Plan under vLLM's ledger: `settings` are its fields and those of a request."""
    ledger = VLLMLedger(**{name: value for name, value in settings.items() if name in OF_THE_LEDGER})
    others = {name: value for name, value in settings.items() if name not in OF_THE_LEDGER}
    return plan_request(MemoryRequest(model=model, hardware=hardware, engine="vllm", ledger=ledger, **others))


def plan(model: str = "llama-3.1-8b", hardware: str = "dgx-spark", **settings: Any) -> MemoryBudget:
    """Plan with the defaults of the machine, unless `settings` says otherwise; names as on the command line."""
    spec, machine = load_model(model), load_hardware(hardware)
    quantization = settings.pop("quantization", None)
    defaults: dict[str, Any] = {
        "weight_format": load_weight_format(quantization) if quantization else spec.native_format,
        "kv_cache_dtype": "auto",
        "block_size": 16,
        "max_model_len": 2048,
        "max_num_seqs": machine.default_max_num_seqs,
        "max_num_batched_tokens": machine.default_max_num_batched_tokens,
        "gpu_memory_utilization": machine.default_utilization.value,
    }
    return plan_memory(spec, machine, **{**defaults, **settings})


def suggestions(error: ConfigError) -> list[dict[str, Any]]:
    """Return the settings that a message proposes, as arguments of `plan`."""
    _, _, listed = str(error).partition("What fits: ")
    listed = re.sub(r" \(at its start: [^)]*\)", "", listed)
    if listed in ("", "nothing in the catalogue"):
        return []
    return [
        {
            flag.replace("-", "_"): json.loads(value) if re.fullmatch(r"[0-9.]+", value) else value or True
            for flag, value in re.findall(r"--([a-z-]+)(?: (?!--)(\S+))?", alternative)
        }
        for alternative in listed.split("; or ")
    ]


NEMOTRON_3_5_LIGHTNING = ModelSpec(
    name="nemotron-3.5-lightning",
    title="Nemotron 3.5 Lightning 30B-A3B",
    hf_id="",
    source="the published shape of Nemotron-3-Nano-30B-A3B: 6 attention layers, the others keep states",
    hidden_size=2688,
    num_layers=52,
    num_attention_heads=32,
    vocab_size=131_072,
    max_context=262_144,
    layer_groups=(LayerGroup(kind="full", num_layers=6, num_kv_heads=2, key_dim=128, value_dim=128),),
    params_total=31_580_000_000,
    params_active=3_500_000_000,
    embedding_params=131_072 * 2688,
    head_params=131_072 * 2688,
    tied_embeddings=False,
    wide_params=0,
    num_experts=128,
    experts_per_token=6,
    expert_params=29_000_000_000,
    native_format=load_weight_format("nvfp4"),
)
