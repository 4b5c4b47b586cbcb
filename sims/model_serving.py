"""Several models of one Ollama server, resolved: what each takes and how long it loads, and the server's own settings.

Source: Ollama, August 2026 (fb30760), server/sched.go and what it calls, envconfig and docs/faq: facts only, in our words.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pagedkv.catalogue import load_model
from pagedkv.errors import ConfigError
from pagedkv.memory_budget import MemoryBudget, Shortage
from pagedkv.model_spec import ModelSpec
from pagedkv.quantity import parse_quantity
from pagedkv.scheduling.llama_cpp_scheduler import OLLAMA
from pagedkv.sims.config import ServingConfig, parse_seconds
from pagedkv.sims.deployment import Deployment, deploy, memory_request
from pagedkv.sims.engines.ollama import lower_context

DEFAULT_KEEP_ALIVE_S = 300.0
"""Source: OLLAMA_KEEP_ALIVE; docs/faq: models stay in memory for 5 minutes."""
DEFAULT_MAX_LOADED_MODELS = 3
"""Source: OLLAMA_MAX_LOADED_MODELS, three for each GPU."""
HEADROOM = 0.8
"""Share of the available memory that the estimate of one more model may come to. Source: server/sched.go's load headroom."""
GPU_RECOVERY_S = 1.0
"""Pause after an unload on a discrete GPU, until its driver reports the memory as free; none on unified memory. Estimated: Ollama
looks every 250 ms, for 5 s at most, and its authors saw 0.5 to 1.5 s (waitForVRAMRecovery)."""
_ESTIMATE_BYTES = 2
"""Of a key or value element in the estimate, whatever the type of the cache."""
_NO_LIMIT = 1 << 40
"""Requests that a model's own queue may hold: the server's is the shorter one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelVariant:
    """A model with a context that it may be loaded with."""

    context: int
    """Of a slot, in tokens."""
    estimate_bytes: int
    """What Ollama expects it to take."""
    weight_bytes: int
    """What its weights take: it cannot be read into less."""
    held_bytes: int
    """What it takes when it is loaded."""
    deployment: Deployment | None
    """What runs then; None: it does not fit even alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One of the server's models."""

    name: str
    title: str
    file_bytes: int
    """What is read from disk."""
    load_s: float
    """How long that takes."""
    keep_alive_s: float
    """How long it stays when nobody uses it; inf: for good."""
    variants: tuple[ModelVariant, ...]
    """What it is loaded with, and, behind it, what is tried once if memory runs out: the next lower automatic context."""

    @property
    def usual(self) -> Deployment:
        """What it runs as when it has the machine to itself."""
        return next(variant.deployment for variant in self.variants if variant.deployment is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelServing:
    """What the server is asked for."""

    models: tuple[ServedModel, ...]
    max_loaded_models: int
    max_queue: int
    """Most requests that may wait, for a model or for a slot, over all models."""
    memory_bytes: int
    """What operating system and other programs leave."""
    recovery_s: float
    """Pause after an unload that makes room."""

    @property
    def deployments(self) -> tuple[Deployment, ...]:
        """What each model runs as when it has the machine to itself."""
        return tuple(model.usual for model in self.models)

    @property
    def lower_context(self) -> int | None:
        """The next lower automatic context than the first model has: with less, more models fit together; None below the lowest."""
        return lower_context(self.deployments[0].scheduler.max_model_len)


def model_serving(serving: ServingConfig, names: Sequence[str]) -> ModelServing:
    """Return the server of `names` on the machine of `serving`.

    Raises:
        ConfigError: For what cannot be, with what can: a model that does not fit alone, or a disk rate that nobody knows.
    """
    keep_alive_s = _keep_alives(serving, names)
    most = DEFAULT_MAX_LOADED_MODELS if serving.max_loaded_models is None else serving.max_loaded_models
    if most < 1:
        raise ConfigError(f"--max-loaded-models is {most}: needs 1 or more; Ollama's default is {DEFAULT_MAX_LOADED_MODELS}")
    max_queue = (OLLAMA.max_queue or 0) if serving.max_queue is None else serving.max_queue
    if max_queue < 0:
        raise ConfigError(f"max_queue is {max_queue}: needs 0 or more; Ollama's default is {OLLAMA.max_queue}")
    models = tuple(_served(serving, name, seconds) for name, seconds in zip(names, keep_alive_s, strict=True))
    usual = models[0].usual
    return ModelServing(
        models=models,
        max_loaded_models=most,
        max_queue=max_queue,
        memory_bytes=usual.budget.free_at_start,
        recovery_s=0.0 if usual.hardware.unified else GPU_RECOVERY_S,
    )


def estimate_bytes(model: ModelSpec, file_bytes: int, cells: int) -> int:
    """Return what Ollama expects a model with a cache of `cells` tokens to take, before it has loaded it.

    File size + 2 × layers × the fewest key and value heads of a layer × head size × cells × 2 bytes. The head size is the hidden
    size over the heads; layers without such heads count as one head. Source: PredictServerVRAM.
    """
    fewest = min(group.num_kv_heads for group in model.layer_groups) or 1
    head_dim = model.hidden_size // model.num_attention_heads
    return file_bytes + 2 * model.num_layers * fewest * head_dim * cells * _ESTIMATE_BYTES


def _served(serving: ServingConfig, name: str, keep_alive_s: float) -> ServedModel:
    own = replace(serving, model=name, max_queue=_NO_LIMIT)  # the server counts who waits, over all models
    variants = [_variant(own)]
    lower = lower_context(variants[0].context)
    if serving.ctx_size is None and serving.max_model_len is None and lower is not None:
        variants.append(_variant(replace(own, ctx_size=lower)))
    if all(variant.deployment is None for variant in variants):
        deploy(replace(own, ctx_size=variants[-1].context))  # says why not, and what would fit
    model = load_model(name)
    usual = next(variant.deployment for variant in variants if variant.deployment is not None)
    file_bytes = model.weight_bytes(usual.weight_format)
    return ServedModel(
        name=name,
        title=model.title,
        file_bytes=file_bytes,
        load_s=file_bytes / _disk_bytes_per_s(serving, usual),
        keep_alive_s=keep_alive_s,
        variants=tuple(variants),
    )


def _variant(serving: ServingConfig) -> ModelVariant:
    request = memory_request(serving)
    request.check()
    outcome, cells = request.attempt(), request.max_model_len * request.max_num_seqs
    return ModelVariant(
        context=request.max_model_len,
        estimate_bytes=estimate_bytes(request.model, request.model.weight_bytes(request.weight_format), cells),
        weight_bytes=outcome.weights,
        held_bytes=_held_bytes(outcome),
        deployment=None if isinstance(outcome, Shortage) else deploy(serving),
    )


def _held_bytes(outcome: MemoryBudget | Shortage) -> int:
    if isinstance(outcome, Shortage):
        return outcome.weights + outcome.overheads + outcome.kv_cache
    return outcome.weights + outcome.engine_overhead + outcome.activations + outcome.cuda_graphs + outcome.kv_cache


def _disk_bytes_per_s(serving: ServingConfig, deployment: Deployment) -> float:
    if serving.disk_bandwidth is not None:
        rate = parse_quantity(serving.disk_bandwidth, "bytes/s", name="--disk-bandwidth")
        if rate <= 0:
            raise ConfigError(f"--disk-bandwidth is {serving.disk_bandwidth}: needs more than 0, e.g. 5GB/s")
        return rate
    known = deployment.hardware.disk_read_bandwidth
    if known is None:
        raise ConfigError(
            f"nobody knows the disk of {deployment.hardware.title}, from which models are loaded: say what it reads, "
            "e.g. --disk-bandwidth 5GB/s"
        )
    return known.value


def _keep_alives(serving: ServingConfig, names: Sequence[str]) -> list[float]:
    if serving.keep_alive is None:
        return [DEFAULT_KEEP_ALIVE_S] * len(names)
    texts = [text.strip() for text in serving.keep_alive.split(",")]
    if len(texts) not in (1, len(names)):
        raise ConfigError(
            f"--keep-alive {serving.keep_alive} has {len(texts)} times for {len(names)} models: give one, or one for each of "
            f"{', '.join(names)}"
        )
    seconds = [math.inf if text.startswith("-") else parse_seconds(text, name="--keep-alive") for text in texts]
    return seconds * len(names) if len(seconds) == 1 else seconds
