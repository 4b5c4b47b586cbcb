"""`simulate from-vllm` reads the server commands that people really have, and hides nothing that it leaves out."""

import contextlib
import io
import re
import shlex
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pagedkv.errors import ConfigError
from pagedkv.sims.cli import main
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.from_vllm import VllmCommand, parse_vllm_command, with_vllm_defaults
from pagedkv.sims.serve_command import serve_command

BASE = ServingConfig(hardware="h100", other_programs="1GiB")


def read(command: str) -> VllmCommand:
    return parse_vllm_command(command, base=BASE)


class Case(NamedTuple):
    settings: dict[str, Any]
    without_effect: tuple[str, ...] = ()
    not_modelled: tuple[str, ...] = ()


QWEN = "Qwen/Qwen3-8B"
CASES = {
    "vllm serve Qwen/Qwen3-8B": Case({}),
    "VLLM_USE_V1=1 CUDA_VISIBLE_DEVICES=0 vllm serve Qwen/Qwen3-8B --max-model-len 16k": Case({"max_model_len": 16_000}),
    "vllm serve --model Qwen/Qwen3-8B --max-model-len=32K": Case({"max_model_len": 32_768}),
    "vllm serve Qwen/Qwen3-8B --max_model_len=25.6k --max_num_seqs 64": Case({"max_model_len": 25_600, "max_num_seqs": 64}),
    "/opt/venv/bin/vllm serve Qwen/Qwen3-8B --gpu-memory-utilization=.9": Case({"gpu_memory_utilization": 0.9}),
    "source .venv/bin/activate && uv run vllm serve Qwen/Qwen3-8B --max-num-batched-tokens 8K": Case(
        {"max_num_batched_tokens": 8192}
    ),
    "python -m vllm.entrypoints.openai.api_server --model Qwen/Qwen3-8B -tp 1 --block-size 32": Case(
        {"tensor_parallel_size": 1, "block_size": 32}
    ),
    "python3 vllm/entrypoints/openai/api_server.py --model=Qwen/Qwen3-8B -tp=1": Case({"tensor_parallel_size": 1}),
    # scripts
    "vllm serve Qwen/Qwen3-8B \\\n    --max-num-seqs 8 \\\n    --enforce-eager  # no graphs\n": Case(
        {"max_num_seqs": 8, "enforce_eager": True}
    ),
    "vllm serve Qwen/Qwen3-8B \\\r\n --max-num-seqs 8 \\ \n --watermark 0.01": Case({"max_num_seqs": 8, "watermark": 0.01}),
    "vllm serve Qwen/Qwen3-8B\n  --max-num-seqs 8\n  --block-size 8\ncurl -H x localhost:8000": Case(
        {"max_num_seqs": 8, "block_size": 8}
    ),
    "# the server\nexport HF_TOKEN=x\n\nvllm serve Qwen/Qwen3-8B --max-num-seqs 8\n": Case({"max_num_seqs": 8}),
    "nohup vllm serve Qwen/Qwen3-8B --max-num-seqs 8 > vllm.log 2>&1 &": Case({"max_num_seqs": 8}),
    "vllm serve Qwen/Qwen3-8B --enforce-eager 2>&1 | tee -a vllm.log": Case({"enforce_eager": True}),
    "python -m vllm.entrypoints.openai.api_server --model Qwen/Qwen3-8B &> log; echo --max-num-seqs 5": Case({}),
    # containers
    "docker run --runtime nvidia --gpus all -v ~/.cache/huggingface:/root/.cache/huggingface --env HF_TOKEN=$HF_TOKEN "
    "-p 8000:8000 --ipc=host vllm/vllm-openai:latest --model Qwen/Qwen3-8B --max-model-len 16k": Case({"max_model_len": 16_000}),
    "sudo podman run --name vllm -v vllm-cache:/root docker.io/vllm/vllm-openai:v0.11.0 Qwen/Qwen3-8B --block-size 32": Case(
        {"block_size": 32}
    ),
    "docker pull vllm/vllm-openai\ndocker run --gpus all vllm/vllm-openai@sha256:0a1b --model Qwen/Qwen3-8B": Case({}),
    "docker run -it --gpus all nvcr.io/nvidia/vllm:25.09-py3 vllm serve Qwen/Qwen3-8B --max-num-seqs 8": Case({"max_num_seqs": 8}),
    "docker run --entrypoint vllm -e NAME=serve registry:5000/team/vllm-arm64:1 serve Qwen/Qwen3-8B --seed -1": Case(
        {}, ("--seed -1",)
    ),
    "docker run vllm/vllm-openai:nightly --model Qwen/Qwen3-8B --served-model-name a serve": Case(
        {}, ("--served-model-name a serve",)
    ),
    "docker exec -it $C /bin/bash -c '\n  vllm serve Qwen/Qwen3-8B --max_model_len 2048 > log'": Case({"max_model_len": 2048}),
    # values
    "vllm serve Qwen/Qwen3-8B --no-enable-chunked-prefill --max-model-len 1m": Case(
        {"enable_chunked_prefill": False, "max_model_len": 10**6}
    ),
    "vllm serve Qwen/Qwen3-8B --enable-chunked-prefill False --enforce-eager=True": Case(
        {"enable_chunked_prefill": False, "enforce_eager": True}
    ),
    "vllm serve --enforce-eager Qwen/Qwen3-8B --enable-chunked-prefill": Case(
        {"enforce_eager": True, "enable_chunked_prefill": True}
    ),
    "vllm serve --trust-remote-code Qwen/Qwen3-8B": Case({}, ("--trust-remote-code",)),
    "vllm serve --enable-prefix-caching --port 1 Qwen/Qwen3-8B": Case({"enable_prefix_caching": True}, ("--port 1",)),
    "vllm serve Qwen/Qwen3-8B --no-enable-prefix-caching --no-enable-log-requests": Case(
        {"enable_prefix_caching": False}, ("--no-enable-log-requests",)
    ),
    "vllm serve Qwen/Qwen3-8B --no_enable_prefix_caching": Case({"enable_prefix_caching": False}),
    "vllm serve --enable-prefix-caching=false Qwen/Qwen3-8B": Case({"enable_prefix_caching": False}),
    "vllm serve Qwen/Qwen3-8B -q awq --kv-cache-dtype fp8_e4m3": Case({"quantization": "awq", "kv_cache_dtype": "fp8_e4m3"}),
    "vllm serve Qwen/Qwen3-8B --kv-cache-memory-bytes 16G": Case({"kv_cache_memory_bytes": str(16 << 30)}),
    "vllm serve Qwen/Qwen3-8B --kv-cache-memory-bytes 16GiB": Case({"kv_cache_memory_bytes": "16GiB"}),
    "vllm serve Qwen/Qwen3-8B --num-gpu-blocks-override 9000 --long-prefill-token-threshold 512": Case(
        {"num_gpu_blocks_override": 9000, "long_prefill_token_threshold": 512}
    ),
    "vllm serve Qwen/Qwen3-8B --max-model-len auto": Case({}, (), ("--max-model-len auto",)),
    "vllm serve Qwen/Qwen3-8B --max-model-len -1": Case({}, (), ("--max-model-len -1",)),
    "vllm serve Qwen/Qwen3-8B --dtype float": Case({"quantization": "fp32"}, (), ("--dtype float (of the KV cache)",)),
    "vllm serve Qwen/Qwen3-8B --dtype auto --api-key a#1": Case({}, ("--dtype auto", "--api-key a#1")),
    'vllm serve Qwen/Qwen3-8B --speculative-config \'{"model": "x", "num_speculative_tokens": 5}\' -O3 -pp 2': Case(
        {}, (), ("-O3", "-pp 2", '--speculative-config {"model": "x", "num_speculative_tokens": 5}')
    ),
    # drafts
    'vllm serve Qwen/Qwen3-8B -sc \'{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}\'': Case(
        {"speculative_method": "ngram", "num_speculative_tokens": 4}, (), ("--speculative-config prompt_lookup_max 3",)
    ),
    'vllm serve Qwen/Qwen3-8B -sc \'{"model": "Qwen/Qwen3-0.6B", "num_speculative_tokens": 5}\'': Case(
        {"speculative_model": "Qwen/Qwen3-0.6B", "num_speculative_tokens": 5}
    ),
    'vllm serve Qwen/Qwen3-8B -sc=\'{"method":"draft_model","model":"qwen3-0.6b","num_speculative_tokens":2}\'': Case(
        {"speculative_model": "qwen3-0.6b", "num_speculative_tokens": 2}
    ),
    "vllm serve Qwen/Qwen3-8B --speculative-config.method eagle3 --speculative-config.num_speculative_tokens 3 "
    "--speculative-config.model AngelSlim/Qwen3-8B_eagle3": Case(
        {"speculative_method": "eagle", "num_speculative_tokens": 3},
        (),
        ("--speculative-config model AngelSlim/Qwen3-8B_eagle3 (counts as one more layer of the target)",),
    ),
    'vllm serve Qwen/Qwen3-8B --speculative-config \'{"model": "a/EAGLE-Qwen3", "num_speculative_tokens": 1}\'': Case(
        {"speculative_method": "eagle", "num_speculative_tokens": 1},
        (),
        ("--speculative-config model a/EAGLE-Qwen3 (counts as one more layer of the target)",),
    ),
    'vllm serve Qwen/Qwen3-8B --speculative-config \'{"method": "mtp", "num_speculative_tokens": 1}\'': Case(
        {},
        (),
        ('--speculative-config {"method": "mtp", "num_speculative_tokens": 1} (no layer for drafting is known of Qwen/Qwen3-8B)',),
    ),
    'vllm serve Qwen/Qwen3-8B --speculative-config \'{"method": "suffix", "num_speculative_tokens": 8}\'': Case(
        {}, (), ('--speculative-config {"method": "suffix", "num_speculative_tokens": 8}',)
    ),
    "vllm serve Qwen/Qwen3-8B --speculative-config oops": Case({}, (), ("--speculative-config oops",)),
    "vllm serve Qwen/Qwen3-8B --enable-lora --lora-modules a=/a b=/b --compilation-config.level 3": Case(
        {}, (), ("--enable-lora", "--lora-modules a=/a b=/b", "--compilation-config.level 3")
    ),
    "python -m vllm.entrypoints.openai.api_server --model Qwen/Qwen3-8B --served-model-name a b --response-role '<|x|>'": Case(
        {}, ("--served-model-name a b", "--response-role <|x|>")
    ),
    "vllm serve Qwen/Qwen3-8B --unknown one two --max-num-seqs 3 --max-num-seqs 4": Case(
        {"max_num_seqs": 4}, (), ("--unknown one", "two")
    ),
}


@pytest.mark.parametrize("command", CASES)
def test_commands_of_real_life(command: str) -> None:
    case, seen = CASES[command], read(command)
    assert seen.serving == replace(BASE, model=QWEN, **case.settings)
    assert (seen.without_effect, seen.not_modelled) == (case.without_effect, case.not_modelled)


# --- nothing is lost ------------------------------------------------------------------------------------------------

SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "max-model-len": st.integers(1, 99_999),
    "max-num-seqs": st.integers(1, 999),
    "block-size": st.sampled_from([8, 16, 32]),
    "gpu-memory-utilization": st.sampled_from([0.5, 0.85, 0.9]),
    "quantization": st.sampled_from(["fp8", "awq"]),
    "kv-cache-dtype": st.sampled_from(["auto", "fp8"]),
    "tensor-parallel-size": st.just(1),
}
VALUE = st.text(st.characters(codec="utf-8", categories=["L", "N"]), min_size=1, max_size=6) | st.sampled_from(
    ["-1", '{"a": [1, 2]}', "it's", "a b", "0.0.0.0", "x=y", "auto", "/m", "$HOME", "\\", "#", "a;b", "{{ x | y }}"]
)
OTHERS = [
    "host",
    "port",
    "api-key",
    "seed",
    "tokenizer",
    "dtype",
    "swap-space",
    "pipeline-parallel-size",
    "rope-scaling",
    "x.y",
    "zzz",
]
BARE = [
    "trust-remote-code",
    "disable-log-stats",
    "enable-lora",
    "enable-auto-tool-choice",
    "async-scheduling",
]


@st.composite
def flags(draw: st.DrawFn) -> tuple[list[str], str, Any]:
    """A flag as somebody would type it: its words, its name, and its value."""
    kind = draw(st.sampled_from(["setting", "other", "bare"]))
    if kind == "bare":
        name = draw(st.sampled_from(BARE))
        return [f"--{name}"], name, None
    name = draw(st.sampled_from(sorted(SETTINGS) if kind == "setting" else OTHERS))
    value = draw(SETTINGS.get(name, VALUE))
    typed = f"--{name.replace('-', '_') if draw(st.booleans()) else name}"
    return [f"{typed}={value}"] if draw(st.booleans()) else [typed, str(value)], name, value


@given(given_flags=st.lists(flags(), max_size=8, unique_by=lambda flag: flag[1]), place=st.integers(0, 8), model_flag=st.booleans())
@settings(max_examples=200)
def test_every_flag_is_a_setting_or_is_named_in_one_list(given_flags: list[Any], place: int, model_flag: bool) -> None:
    words = [words for words, _, _ in given_flags]
    words.insert(place, ["--model", QWEN] if model_flag else [QWEN])
    seen = read(shlex.join(["vllm", "serve", *(word for each in words for word in each)]))
    assert seen.serving.model == QWEN
    expected = {name.replace("-", "_"): value for _, name, value in given_flags if name in SETTINGS}
    assert seen.serving == replace(BASE, model=QWEN, **expected)
    left_out = []
    for typed, name, value in given_flags:
        if name not in SETTINGS:
            left_out.append(typed[0].partition("=")[0] + (f" {value}" if value is not None else ""))
    assert sorted([*seen.without_effect, *seen.not_modelled]) == sorted(left_out)
    assert not set(seen.without_effect) & {
        flag for flag in left_out if re.match("--(swap|pipeline|rope|x.y|zzz|enable-lora)", flag)
    }
    assert not set(seen.not_modelled) & {
        flag for flag in left_out if re.match("--(host|port|api.key|seed|trust|disable-log)", flag)
    }


@example("vllm serve")
@example("vllm serve X --max-model-len")
@example("vllm serve 'X")
@example("vllm serve X --max-model-len infk")
@example("vllm serve X --kv-cache-memory-bytes fooG")
@given(
    st.lists(
        st.sampled_from(["vllm", "serve", "X", "--model", "--max-model-len", "-tp", "infk", "=", "-", "--", "'", "\\", "#", "|"])
    ).map(" ".join)
)
@settings(max_examples=200)
def test_anything_is_read_or_refused(command: str) -> None:
    with contextlib.suppress(ConfigError):
        assert read(command).serving.model is not None


# --- on the command line --------------------------------------------------------------------------------------------


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit:
        main(["from-vllm", *arguments])
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    return err


REFUSALS = {
    "vllm serve Qwen/Qwen3-8B --tensor-parallel-size 2": ("--tensor-parallel-size 2", "one device", "use 1"),
    "vllm serve Qwen/Qwen3-8B -tp 4": ("--tensor-parallel-size 4",),
    "vllm serve Qwen/Qwen4-8B": ("unknown model 'Qwen/Qwen4-8B'", "did you mean", "qwen3-8b"),
    "vllm serve Qwen/Qwen3-8B -q fp9": ("unknown --quantization 'fp9'", "fp8"),
    "vllm serve Qwen/Qwen3-8B --max-model-len many": ("--max-model-len 'many'", "not a number"),
    "vllm serve Qwen/Qwen3-8B --max-model-len 1e999k": ("--max-model-len '1e999k'",),
    "vllm serve Qwen/Qwen3-8B --max-model-len": ("--max-model-len has no value",),
    "vllm serve Qwen/Qwen3-8B --max-model-len 0": ("max-model-len", "0"),
    "vllm serve Qwen/Qwen3-8B --gpu-memory-utilization nan": ("nan",),
    "vllm serve Qwen/Qwen3-8B --kv-cache-memory-bytes fooG": ("kv-cache-memory-bytes 'fooG' is not a size",),
    "vllm serve --port 8000": ("names no model", "vllm serve MODEL"),
    "docker run vllm/vllm-openai:latest --model <model>": ("--model has no value",),
    "docker pull vllm/vllm-openai:latest": ("is no vLLM server command",),
    "vllm serve 'Qwen": ("No closing quotation",),
    "ollama serve llama3": ("is no vLLM server command", "vllm serve MODEL"),
    "ls -la": ("is no vLLM server command",),
    "": ("is no vLLM server command",),
}


@pytest.mark.parametrize("command", REFUSALS)
def test_what_cannot_be_meant_exits_with_2(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal([command], capsys)
    assert all(part in message for part in REFUSALS[command])
    assert message.count("\n") == 1


def shown(out: str) -> list[str]:
    """Return the words of the pagedkv command that the answer begins with."""
    line = re.match(r"In pagedkv:  (.*)\n", out)
    assert line
    return shlex.split(line[1])


def deployed(arguments: list[str]) -> ServingConfig:
    """Return what `arguments` would deploy."""
    stop = mock.patch("pagedkv.sims.deployment.deploy", side_effect=ConfigError("seen"))
    with stop as deploy, contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit):
        main(arguments)
    assert err.getvalue() == "error: seen\n"
    serving: ServingConfig = deploy.call_args[0][0]
    return serving


OWN = ["--hardware", "h100", "--other-programs", "1GiB"]  # BASE


@pytest.mark.parametrize("command", CASES)
def test_the_command_that_is_printed_is_the_same_deployment(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert deployed(["from-vllm", command, *OWN]) == with_vllm_defaults(read(command).serving)[0]
    program, sub, *arguments = shown(capsys.readouterr().out)
    assert (program, sub) == ("simulate", "fit")
    assert deployed(["fit", *arguments]) == with_vllm_defaults(read(command).serving)[0]


def test_what_the_command_leaves_open_is_as_vllm_has_it() -> None:
    open_serving, flags = with_vllm_defaults(read("vllm serve Qwen/Qwen3-8B").serving)
    assert open_serving == replace(BASE, model=QWEN, gpu_memory_utilization=0.92, max_model_len=40_960)
    assert flags == ("--gpu-memory-utilization 0.92", "--max-model-len 40960")
    said = read("vllm serve Qwen/Qwen3-8B --max-model-len 2k --gpu-memory-utilization 0.5").serving
    assert with_vllm_defaults(said) == (said, ())
    sized = read("vllm serve Qwen/Qwen3-8B --max-model-len 2k --kv-cache-memory-bytes 8G").serving
    assert with_vllm_defaults(sized) == (sized, ())


@pytest.mark.parametrize(
    ("model", "catalogued", "quantization"),
    [
        ("RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8", "llama-3.1-8b", "fp8"),
        ("nvidia/Llama-3.1-8B-Instruct-NVFP4", "llama-3.1-8b", "nvfp4"),
        ("Qwen/Qwen3-8B-AWQ", "qwen3-8b", "int4"),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B", None),
        ("me/nothing-known-FP8", "me/nothing-known-FP8", None),
    ],
)
def test_a_repository_of_quantized_weights_is_its_model_and_their_format(
    model: str, catalogued: str, quantization: str | None
) -> None:
    assert read(f"vllm serve {model}").serving == replace(BASE, model=catalogued, quantization=quantization)
    assert read(f"vllm serve {model} -q bitsandbytes").serving.quantization == "bitsandbytes"


def test_without_users_it_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    main(["from-vllm", "docker run vllm/vllm-openai --model openai/gpt-oss-20b --port 1 --swap-space 4", "--hardware", "rtx-4090"])
    text = capsys.readouterr().out
    main(shown(text)[1:])
    assert text == (
        "In pagedkv:  simulate fit --hardware rtx-4090 --model openai/gpt-oss-20b --max-model-len 131072 "
        "--gpu-memory-utilization 0.92\n"
        "vLLM's own defaults, which the command leaves open: --gpu-memory-utilization\n0.92, --max-model-len 131072\n"
        "Left out, no effect on memory or scheduling: --port 1\n"
        "Not modelled, the answer may differ: --swap-space 4\n\n" + capsys.readouterr().out
    )


def test_with_users_it_simulates(capsys: pytest.CaptureFixture[str]) -> None:
    main(["from-vllm", "vllm serve Qwen/Qwen3-8B --max-model-len 4k --host ::1", "--users", "1", "--hardware", "h100"])
    out = capsys.readouterr().out
    program, *arguments = shown(out)
    assert program == "simulate"
    with contextlib.redirect_stdout(io.StringIO()) as again:
        main(arguments)
    assert out.endswith("\n\n" + again.getvalue())
    assert "1 user on NVIDIA H100" in out
    assert "no effect on memory or scheduling: --host ::1\n" in out


@pytest.mark.parametrize("method", ["mtp", "qwen3_next_mtp"])
def test_a_layer_that_the_weights_bring_drafts_as_many_tokens_as_it_is(method: str) -> None:
    seen = read(f'vllm serve Qwen/Qwen3-Next-80B-A3B-Instruct --speculative-config \'{{"method": "{method}"}}\'').serving
    assert (seen.speculative_method, seen.num_speculative_tokens) == ("mtp", 1)


@pytest.mark.parametrize(
    "drafts",
    [
        {"speculative_method": "ngram"},
        {"speculative_method": "eagle"},
        {"speculative_method": "medusa"},
        {"speculative_model": "Qwen/Qwen3-0.6B"},
    ],
)
def test_drafts_survive_the_way_to_a_serve_command_and_back(drafts: dict[str, Any]) -> None:
    serving = ServingConfig(hardware="h100-80gb", model=QWEN, num_speculative_tokens=3, **drafts)
    seen = read(serve_command(serving))
    names = ("speculative_method", "speculative_model", "num_speculative_tokens")
    assert [getattr(seen.serving, name) for name in names] == [getattr(serving, name) for name in names]
    assert seen.not_modelled == ()
