"""The command that really runs a model: part of the composition root, and the only one that loads torch."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from cyclopts import Parameter

from pagedkv.errors import ConfigError
from pagedkv.sims.cli_output import INTERRUPTED, OUTPUT, check_json, output_path, print_view, write_json
from pagedkv.sims.generate_config import DEFAULT_KV_CACHE, GenerateConfig
from pagedkv.units import parse_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from pagedkv.sims.prompt_file import Prompt
    from pagedkv.sims.real_load import Answer
    from pagedkv.sims.real_results import Served
    from pagedkv.sims.simulation import Run


def generate(
    *,
    asked: Annotated[GenerateConfig, Parameter(name="*")],
    json: Annotated[str | None, Parameter(group=OUTPUT, allow_leading_hyphen=True)] = None,
    out: Annotated[str | None, Parameter(group=OUTPUT)] = None,
) -> None:
    """Really run a model for users in a closed loop, by the scheduler and allocator of `simulate`, and report the same figures.

    Ctrl-C ends after the step that runs, and reports what was done until then. Needs torch: pip install 'pagedkv[runtime]'.

    Args:
        json: Write the result document to this file; - prints it, and nothing else, to stdout.
        out: Write summary.json, requests.csv, timeline.csv and answers.jsonl to this folder.
    """
    from pagedkv.sims.export import prepare_folder
    from pagedkv.sims.prompt_file import read_prompts
    from pagedkv.sims.real_results import real_document, write_real

    check_json(json)
    if asked.stream and json == "-":
        raise ConfigError("--stream and --json - both print to stdout: give --json a file")
    if (folder := output_path(out, "--out")) is not None:
        prepare_folder(folder)
    prompts = read_prompts(asked.prompts)
    check_libraries("generate")
    loaded = _load(asked, prompts)
    with _interruptible() as stopped:
        run, answers = _serve(asked, loaded, stopped)
        interrupted = stopped()
    document, decode = real_document(asked, _served(loaded), run), loaded.decode
    if folder is not None:
        write_real(folder, document, run, [(answer, None if decode is None else decode(answer.tokens)) for answer in answers])
    if json is not None:
        write_json(document, json)
    if json != "-":
        from pagedkv.sims.console_generate import show_real

        print_view(lambda console: show_real(document, console))
    if why := _rejection(asked, loaded, answers):
        sys.stdout.flush()
        print(why, file=sys.stderr)  # noqa: T201
    if interrupted:
        sys.stdout.flush()
        print("interrupted: these are the figures until then", file=sys.stderr)  # noqa: T201
        sys.exit(INTERRUPTED)


def check_libraries(command: str) -> None:
    """Raise ConfigError unless torch and transformers, which `command` needs, can be imported."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{command} needs torch and transformers ({error}): pip install 'pagedkv[runtime]'") from error


class _Loaded(NamedTuple):
    """A model that can serve, and what it is asked."""

    model: Any
    """Of transformers."""
    draft: Any
    """What drafts for it; None if nothing does."""
    engine: Any
    """A `pagedkv.runtime.LLMEngine`."""
    decode: Callable[[list[int]], str] | None
    """From token ids to text; None without a tokenizer."""
    tokens: list[list[int]]
    """By prompt."""
    max_tokens: list[int]
    """By prompt: most new ones."""


def _load(asked: GenerateConfig, prompts: "list[Prompt]") -> _Loaded:
    from pagedkv.runtime.engine import LLMEngine
    from pagedkv.runtime.load_model import load_tokenizer
    from pagedkv.sims.prompt_tokens import prompt_tokens

    source = asked.random_weights if asked.model is None else asked.model
    assert source is not None
    model = _model(asked, source, asked.dtype)
    draft = None
    if asked.speculative_model is not None:
        draft = _model(asked, asked.speculative_model, str(model.dtype).removeprefix("torch."))
    tokenizer = load_tokenizer(source)
    chat = asked.apply_chat_template
    tokens = [prompt_tokens(prompt, tokenizer, number=number, as_chat=chat) for number, prompt in enumerate(prompts)]
    blocks, size = asked.num_gpu_blocks_override, asked.kv_cache_memory_bytes or DEFAULT_KV_CACHE
    engine = LLMEngine(
        model,
        num_blocks=blocks,
        budget_bytes=None if blocks is not None else parse_bytes(size, name="--kv-cache-memory-bytes"),
        block_size=asked.block_size,
        max_num_seqs=asked.max_num_seqs,
        max_num_batched_tokens=asked.max_num_batched_tokens,
        max_model_len=asked.max_model_len,
        enable_prefix_caching=asked.enable_prefix_caching,
        disable_hybrid_kv_cache_manager=asked.disable_hybrid_kv_cache_manager,
        speculative_model=draft,
        num_speculative_tokens=asked.num_speculative_tokens or 0,
    )
    _check_ids(tokens, engine.models.vocab_size)
    decode = None if tokenizer is None else lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))
    return _Loaded(model, draft, engine, decode, tokens, [prompt.max_tokens or asked.max_tokens for prompt in prompts])


def _check_ids(tokens: list[list[int]], vocab_size: int) -> None:
    """Refuse prompts that are none to this model, before any is served: the answers so far would be lost."""
    for number, ids in enumerate(tokens):
        if not ids:
            raise ConfigError(f"prompt {number} has no tokens: the tokenizer makes none of its text")
        if max(ids) >= vocab_size:
            raise ConfigError(f"prompt {number}: token id {max(ids)}: the model has 0 to {vocab_size - 1}")


def _model(asked: GenerateConfig, source: "Path", dtype: str) -> Any:
    """Return a model from a folder, or with random weights, as is asked."""
    from pagedkv.runtime.load_model import load_model, random_model

    if asked.random_weights is None:
        return load_model(source, dtype=dtype, device=asked.device)
    return random_model(source, dtype=dtype, device=asked.device, seed=asked.seed)


def _serve(asked: GenerateConfig, loaded: _Loaded, stopped: Callable[[], bool]) -> "tuple[Run, list[Answer]]":
    from pagedkv.runtime.beam_search import BeamParams
    from pagedkv.runtime.load_model import end_tokens
    from pagedkv.runtime.sampling import SamplingParams
    from pagedkv.sims.answer_stream import AnswerStream
    from pagedkv.sims.progress import ProgressOnStderr
    from pagedkv.sims.real_load import serve_prompts, warm_up

    engine, stream, done = loaded.engine, AnswerStream(loaded.decode, sys.stdout) if asked.stream else None, 0
    ends = () if asked.ignore_eos else end_tokens(loaded.model)
    beams = None
    if asked.beam_width is not None:
        beams = BeamParams(width=asked.beam_width, length_penalty=1.0 if asked.length_penalty is None else asked.length_penalty)

    def submit(number: int) -> int | None:
        seed = asked.seed + number * asked.n  # text i of a prompt is drawn by seed + i
        request: int | None = engine.add_request(
            loaded.tokens[number],
            max_tokens=loaded.max_tokens[number],
            eos_token_id=ends,
            sampling=SamplingParams(temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p, seed=seed),
            n=asked.n,
            beams=beams,
        )
        return request

    with ProgressOnStderr(["generate"], repeats=1) as progress:

        def told(answer: "Answer") -> None:
            nonlocal done
            if stream is not None:
                stream.told(answer)
            done += answer.finish_reason is not None
            progress("generate", 0, done / len(loaded.tokens) / asked.n)

        filler = [0] * (2 * asked.block_size - 1)  # two blocks are filled, one of them by what is generated
        warm_up(engine, lambda: engine.add_request(filler, max_tokens=3, salt="warm-up"), time.perf_counter)
        progress("generate", 0, 0.0)
        began_s = time.perf_counter()
        return serve_prompts(
            engine,
            submit,
            list(zip(map(len, loaded.tokens), loaded.max_tokens, strict=True)),
            users=asked.users,
            num_texts=asked.n,
            now=lambda: time.perf_counter() - began_s,
            told=told,
            stopped=stopped,
        )


def _rejection(asked: GenerateConfig, loaded: _Loaded, answers: "list[Answer]") -> str | None:
    """Return why prompts were rejected, by the first of them; None if none was."""
    rejected = [answer.prompt for answer in answers if answer.finish_reason == "rejected" and not answer.index]
    if not rejected:
        return None
    first = rejected[0]
    why: str = loaded.engine.too_long(
        len(loaded.tokens[first]), loaded.max_tokens[first], f"prompt {first}", num_beams=asked.beam_width or 1
    )
    return f"{len(rejected)} prompt{'s' if len(rejected) > 1 else ''} rejected: {why}"


def _served(loaded: _Loaded) -> "Served":
    from pagedkv.sims.real_results import Served

    config, storage = loaded.model.config, loaded.engine.storage
    models = [loaded.model] if loaded.draft is None else [loaded.model, loaded.draft]
    return Served(
        model=config.name_or_path or config.model_type,
        hardware=_device_name(storage.device),
        num_blocks=storage.num_blocks,
        block_bytes=storage.block_bytes,
        kv_bytes_per_token=storage.layout.token_elements * storage.dtype.itemsize,
        scheduler=loaded.engine.scheduler.settings,
        weight_bytes=sum(each.numel() * each.element_size() for model in models for each in model.parameters()),
    )


def _device_name(device: Any) -> str:
    import platform

    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Give a function that tells whether Ctrl-C was pressed; pressed again, it interrupts at once."""
    pressed = False

    def press(number: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
