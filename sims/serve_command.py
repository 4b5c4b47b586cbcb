"""A deployment as a `vllm serve` command that its version of vLLM takes: the way back from `from_vllm`."""

import json
import re
import shlex
from collections.abc import Iterator

from pagedkv.errors import ConfigError
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.deployment import Deployment, deploy
from pagedkv.sims.drafting import Drafting
from pagedkv.sims.vllm_versions import VLLMVersion, vllm_version
from pagedkv.units import parse_bytes

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""By weight format: the `--dtype` that gives it, from weights that are not quantized."""
ONLINE = ("fp8", "mxfp8")
"""Formats that vLLM makes by itself while it reads weights that are not quantized. Source: QuantizationMethods, in 0.19 too."""
CHECKPOINTS = ("nvfp4", "int4")
"""Weight formats that vLLM only reads, from a repository that has them."""
_PLACEHOLDER = re.compile(r"<(\w+) checkpoint of (.+)>")
_KV_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "f16": "float16"}
VLLM_RESERVES_FULL_ISL = True
"""What `vllm serve` does without --scheduler-reserve-full-isl. Source: SchedulerConfig of 0.33, and of the released 0.19.0."""


def serve_command(serving: ServingConfig) -> str:
    """Return the command for `serving`. The machine, and what vLLM has no flag for, are left out.

    What sizes the cache and the steps is always there: vLLM's own defaults differ by version and machine.

    Raises:
        ConfigError: If `serving` cannot work, vLLM cannot serve such weights or such a cache, or there is a second tier.
    """
    deployment = deploy(serving)
    if deployment.tier is not None:
        raise ConfigError("--offload-size: which connector a second tier needs in vLLM is not known here; leave it out")
    model, flags = _weights(deployment, serving)
    flags += [word for flag, value in _values(deployment, serving, vllm_version(serving.engine)) for word in (f"--{flag}", value)]
    flags += _switches(deployment, serving)
    if deployment.drafting is not None:
        flags += ["--speculative-config", _speculative_config(deployment.drafting)]
    return shlex.join(["vllm", "serve", model, *flags])


def checkpoint_note(serving: ServingConfig) -> str | None:
    """Return what to know about the model's name in the command: None if its weights are the model's own."""
    deployment = deploy(serving)
    name = deployment.weight_format.name
    if name not in CHECKPOINTS or deployment.weight_format == deployment.model.native_format:
        return None
    return f"vLLM only reads {name} weights that a repository has: put its name in place of <{name} checkpoint ...>"


def read_placeholder(name: str) -> tuple[str, str] | None:
    """Return the model and the weight format that `serve_command` names in place of a repository; None if `name` is another one."""
    match = _PLACEHOLDER.fullmatch(name)
    return None if match is None else (match[2], match[1])


def _weights(deployment: Deployment, serving: ServingConfig) -> tuple[str, list[str]]:
    """Return the model's name in the command, and the flags that say how its weights are stored."""
    model, native, wanted = deployment.model.hf_id or serving.model, deployment.model.native_format, deployment.weight_format.name
    if serving.quantization is None or wanted == native.name:
        return model, []
    if wanted in CHECKPOINTS:
        return f"<{wanted} checkpoint of {model}>", []
    if native.name in DTYPES:
        if wanted in DTYPES:
            return model, ["--dtype", DTYPES[wanted]]
        if wanted in ONLINE:
            return model, ["--quantization", wanted]
    usable = [native.name, *((*DTYPES, *ONLINE) if native.name in DTYPES else ()), *CHECKPOINTS]
    raise ConfigError(
        f"--quantization {serving.quantization}: vLLM cannot serve {deployment.model.title} in {wanted}; "
        f"advise knows how to with {', '.join(dict.fromkeys(usable))}"
    )


def _values(deployment: Deployment, serving: ServingConfig, version: VLLMVersion) -> Iterator[tuple[str, str]]:
    """Yield (flag, value) of what sizes the cache and the steps."""
    yield "kv-cache-dtype", _kv_cache_dtype(serving.kv_cache_dtype)
    yield "max-model-len", str(deployment.scheduler.max_model_len)
    yield "block-size", str(serving.block_size)
    if serving.kv_cache_memory_bytes is not None:
        yield "kv-cache-memory-bytes", str(parse_bytes(serving.kv_cache_memory_bytes, name="kv-cache-memory-bytes"))
    if serving.kv_cache_memory_bytes is None or serving.gpu_memory_utilization is not None:
        yield "gpu-memory-utilization", str(deployment.budget.utilization)
    if serving.num_gpu_blocks_override is not None:
        yield "num-gpu-blocks-override", str(serving.num_gpu_blocks_override)
    yield "max-num-seqs", str(deployment.scheduler.max_num_seqs)
    yield "max-num-batched-tokens", str(deployment.scheduler.max_num_batched_tokens)
    if serving.long_prefill_token_threshold:
        yield "long-prefill-token-threshold", str(serving.long_prefill_token_threshold)
    if serving.watermark and version.has_watermark:
        yield "watermark", str(serving.watermark)
    if serving.tensor_parallel_size != 1:
        yield "tensor-parallel-size", str(serving.tensor_parallel_size)


def _speculative_config(drafting: Drafting) -> str:
    """Return vLLM's JSON of how tokens are drafted; of an EAGLE layer or heads the repository is the user's to name."""
    settings: dict[str, object] = {"method": drafting.method.replace("-", "_")}
    if drafting.method == "draft-model" and drafting.model is not None:
        settings["model"] = drafting.model.hf_id or drafting.model.name
    return json.dumps(settings | {"num_speculative_tokens": drafting.num_tokens})


def _switches(deployment: Deployment, serving: ServingConfig) -> list[str]:
    gate = deployment.pool.reserve_full_isl
    switches = {
        "--no-enable-prefix-caching": serving.enable_prefix_caching is False,
        "--no-enable-chunked-prefill": serving.enable_chunked_prefill is False,
        "--no-scheduler-reserve-full-isl": VLLM_RESERVES_FULL_ISL and not gate,
        "--scheduler-reserve-full-isl": gate and vllm_version(serving.engine).reserve_full_isl is False,
        "--enforce-eager": serving.enforce_eager,
        "--disable-hybrid-kv-cache-manager": serving.disable_hybrid_kv_cache_manager,
    }
    return [flag for flag, wanted in switches.items() if wanted]


def _kv_cache_dtype(name: str) -> str:
    keys, _, values = name.lower().partition("/")
    if values and values != keys:
        raise ConfigError(f"--kv-cache-dtype {name}: vLLM stores keys and values alike; use {keys} or {values}")
    return _KV_DTYPES.get(keys, keys)
