"""The command that serves: part of the composition root, as `cli_generate` is. It loads torch only for a real model."""

import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from pagedkv.errors import ConfigError
from pagedkv.sims.cli_output import SERVING
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.generate_config import DEFAULT_KV_CACHE
from pagedkv.sims.serve_config import DEFAULT_MAX_QUEUE, ServeConfig
from pagedkv.units import parse_bytes

if TYPE_CHECKING:
    from pagedkv.sims.serve.served_engine import ServedEngine

SERVER = Group("Server", sort_key=0)
REAL_SETTINGS = (
    *("model", "max_model_len", "block_size", "max_num_seqs", "max_num_batched_tokens", "enable_chunked_prefill"),
    *("enable_prefix_caching", "watermark", "kv_cache_memory_bytes", "num_gpu_blocks_override", "max_queue"),
    *("speculative_model", "num_speculative_tokens", "disable_hybrid_kv_cache_manager"),
)
"""Fields of `ServingConfig` that mean something to a model that is really there."""


def serve(
    *,
    asked: Annotated[ServeConfig, Parameter(name="*", group=SERVER)] = ServeConfig(),  # noqa: B008
    serving: Annotated[ServingConfig, Parameter(name="*", group=SERVING)] = ServingConfig(),  # noqa: B008
) -> None:
    """Serve OpenAI's API: with --simulated as a model and machine would that are not there, else by a model that really runs.

    POST /v1/completions and /v1/chat/completions, GET /v1/models, /health and /metrics. Ctrl-C ends it. Needs starlette and
    uvicorn: pip install 'pagedkv[serve]'; a real model needs 'pagedkv[serve,runtime]'.
    """
    _check_libraries()
    grace_s, max_queue = asked.grace_s, DEFAULT_MAX_QUEUE if serving.max_queue is None else serving.max_queue
    if max_queue < 1:
        raise ConfigError(f"--max-queue is {max_queue}: needs 1 or more")
    serving = replace(serving, max_queue=None)
    from pagedkv.sims.serve.server import Server, bound_socket

    listening = bound_socket(asked.host, asked.port)
    engine, name, what = _simulated(asked, serving) if asked.simulated else _real(asked, serving)

    import asyncio

    from pagedkv.sims.serve.app import ServeApp
    from pagedkv.sims.serve.serve_loop import ServeLoop

    def told(url: str) -> None:
        print(f"Serving {what} as {name!r} on {url}; Ctrl-C ends it", file=sys.stderr, flush=True)  # noqa: T201

    async def until_it_ends() -> ServeLoop:
        loop = ServeLoop(engine, max_queue=max_queue)
        app = ServeApp(
            loop,
            model_name=name,
            created=int(time.time()),
            max_body_bytes=asked.max_body_bytes,
            on_failure=lambda: server.end(),  # noqa: PLW0108  # it is made below
        )
        server = Server(app.asgi(), loop, grace_s=grace_s, told=told)
        await server.serve([listening])
        return loop

    loop = asyncio.run(until_it_ends())
    if loop.failure is not None:
        raise loop.failure


def _check_libraries() -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"serve needs starlette and uvicorn ({error}): pip install 'pagedkv[serve]'") from error


def _simulated(asked: ServeConfig, serving: ServingConfig) -> "tuple[ServedEngine, str, str]":
    """Return the engine, the model's name, and what is served in words."""
    import numpy as np

    from pagedkv.sims.deployment import deploy
    from pagedkv.sims.length_names import load_lengths
    from pagedkv.sims.lengths import draws
    from pagedkv.sims.load_flags import DEFAULT_LENGTHS
    from pagedkv.sims.serve.simulated import SimulatedEngine, compile_steps
    from pagedkv.sims.serve.wall_clock import WallClock

    if serving.replicas != 1 or serving.fault:
        raise ConfigError("--replicas and --fault are for simulate: a server is one process; start several behind your router")
    if serving.engine.partition("@")[0] != "vllm":
        raise ConfigError(f"--engine {serving.engine} cannot be served yet: use --engine vllm")
    deployment, lengths = deploy(serving), load_lengths(asked.lengths or DEFAULT_LENGTHS)
    for warning in deployment.budget.warnings:
        print(f"warning: {warning}", file=sys.stderr)  # noqa: T201
    drawn = (output for _, output in draws(lengths, np.random.default_rng(asked.seed)))
    clock = WallClock(1.0 if asked.speed is None else asked.speed)
    engine = SimulatedEngine(deployment, clock, drawn_lengths=drawn, draws_all=asked.lengths is not None, seed=asked.seed)
    compile_steps(deployment)
    what = f"a simulated {deployment.model.title} on {deployment.hardware.title}"
    return engine, asked.served_model_name or serving.model, what


def _check_real(asked: ServeConfig, serving: ServingConfig) -> None:
    """Refuse what says nothing to a model that is really there."""
    usual = ServingConfig()
    if (asked.random_weights is None) == (serving.model == usual.model):
        raise ConfigError("give one of --simulated, --model FOLDER and --random-weights CONFIG")
    if (serving.speculative_model is None) != (serving.num_speculative_tokens is None):
        raise ConfigError("speculation needs --speculative-model and --num-speculative-tokens, e.g. 3: give both, or none")
    for field in fields(serving):
        if field.name not in REAL_SETTINGS and getattr(serving, field.name) != getattr(usual, field.name):
            flag = f"--{field.name.replace('_', '-')} {getattr(serving, field.name)}"
            raise ConfigError(f"{flag} says nothing to a model that really runs: leave it out, or add --simulated")


def _real(asked: ServeConfig, serving: ServingConfig) -> "tuple[ServedEngine, str, str]":
    """Return the engine, the model's name, and what is served in words."""
    _check_real(asked, serving)
    try:
        from pagedkv.runtime.engine import LLMEngine
        from pagedkv.runtime.load_model import end_tokens, load_model, load_tokenizer, random_model
        from pagedkv.runtime.sampling import SamplingParams
    except ImportError as error:
        raise ConfigError(f"a real model needs torch and transformers ({error}): pip install 'pagedkv[serve,runtime]'") from error
    from pagedkv.sims.serve.model_text import model_tokenizer
    from pagedkv.sims.serve.real import RealEngine, warm_up

    device, source = asked.device or "auto", asked.random_weights or Path(serving.model)

    def loaded(path: Path, dtype: str) -> Any:
        if asked.random_weights is None:
            return load_model(path, dtype=dtype, device=device)
        return random_model(path, dtype=dtype, device=device, seed=asked.seed)

    model, draft = loaded(source, asked.dtype or "auto"), None
    if serving.speculative_model is not None:  # of the same type, since both share blocks
        draft = loaded(Path(serving.speculative_model), str(model.dtype).removeprefix("torch."))
    tokenizer = load_tokenizer(source)
    blocks, size = serving.num_gpu_blocks_override, serving.kv_cache_memory_bytes or DEFAULT_KV_CACHE
    llm = LLMEngine(
        model,
        num_blocks=blocks,
        budget_bytes=None if blocks is not None else parse_bytes(size, name="--kv-cache-memory-bytes"),
        block_size=serving.block_size,
        max_num_seqs=256 if serving.max_num_seqs is None else serving.max_num_seqs,
        max_num_batched_tokens=2048 if serving.max_num_batched_tokens is None else serving.max_num_batched_tokens,
        max_model_len=serving.max_model_len,
        enable_prefix_caching=serving.enable_prefix_caching,
        disable_hybrid_kv_cache_manager=serving.disable_hybrid_kv_cache_manager,
        enable_chunked_prefill=serving.enable_chunked_prefill is not False,
        watermark=serving.watermark,
        speculative_model=draft,
        num_speculative_tokens=serving.num_speculative_tokens or 0,
    )
    warm_up(llm, block_size=serving.block_size)
    engine = RealEngine(
        llm,
        model_tokenizer(tokenizer, max_model_len=llm.scheduler.settings.max_model_len),
        sampling=SamplingParams,
        end_tokens=end_tokens(model),
        vocab_size=int(model.get_input_embeddings().weight.shape[0]),
    )
    weights = "random weights of " if asked.random_weights is not None else ""
    return engine, asked.served_model_name or str(source), f"{weights}{model.config.model_type} on {model.device}"
