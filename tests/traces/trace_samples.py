"""Files of the shape that each format's project writes, and records to make more of."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lines(*objects: object) -> str:
    return "".join(json.dumps(o) + "\n" for o in objects)


def aiperf(number: int, start_ns: int, prompt: int, output: int, **metadata: object) -> dict[str, Any]:
    """Return a record of ai-dynamo/aiperf, docs/tutorials/working-with-profile-exports.md."""
    return {
        "metadata": {
            "session_num": number,
            "x_request_id": f"7609a2e7-aa53-4ab1-98f4-{number:012}",
            "turn_index": 0,
            "request_start_ns": start_ns,
            "request_ack_ns": start_ns + 117_830_613,
            "request_end_ns": start_ns + 305_864_241,
            "worker_id": "worker_359d423a",
            "benchmark_phase": "profiling",
            "was_cancelled": False,
            "cancellation_time_ns": None,
            **metadata,
        },
        "metrics": {
            "input_sequence_length": {"value": prompt, "unit": "tokens"},
            "time_to_first_token": {"value": 255.88, "unit": "ms"},
            "inter_chunk_latency": {"value": [4.8, 5.3], "unit": "ms"},
            "output_sequence_length": {"value": output, "unit": "tokens"},
        },
        "error": None,
    }


T = 1_759_813_207.5329
AIPERF = [aiperf(i, round((T + t) * 1e9), p, o) for i, (t, p, o) in enumerate([(0, 374, 44), (4.314579, 396, 109), (14, 879, 55)])]
AIPERF_FAILED = {  # the same page's failed record
    "metadata": {"session_num": 80, "request_start_ns": 1, "benchmark_phase": "profiling", "was_cancelled": True},
    "metrics": {"error_isl": {"value": 550, "unit": "tokens"}},
    "error": {"code": 499, "type": "RequestCancellationError", "message": "Request was cancelled after 0.000 seconds"},
}
VLLM: dict[str, Any] = {  # vllm-project/vllm, vllm/benchmarks/serve.py: `result_json` and `result`
    "date": "20261101-120000",
    "endpoint_type": "openai",
    "label": "openai",
    "model_id": "meta-llama/Llama-3.1-8B",
    "num_prompts": 3,
    "request_rate": "inf",
    "burstiness": 1.0,
    "max_concurrency": None,
    "duration": 17.2,
    "completed": 3,
    "failed": 0,
    "total_input_tokens": 1649,
    "request_throughput": 0.17,
    "input_lens": [374, 396, 879],
    "output_lens": [44, 109, 55],
    "ttfts": [0.05, 0.06, 0.07],
    "itls": [[0.01] * 43, [0.01] * 108, [0.01] * 54],
    "start_times": [1234.5, 1238.814579, 1248.5],
    "generated_texts": ['{"input_length": 1}', "two", "three"],
    "errors": ["", "", ""],
}


def guidellm(*requests: dict[str, Any], **more: object) -> dict[str, Any]:
    benchmark = {
        "type_": "generative_benchmark",
        "requests": {"successful": list(requests), "errored": [], "incomplete": []},
        **more,
    }
    return {"metadata": {"version": 1}, "args": {"target": "http://localhost:8000"}, "benchmarks": [benchmark]}


def guidellm_request(start_s: float, prompt: int, output: int) -> dict[str, Any]:
    """Return a request of vllm-project/guidellm, src/guidellm/schemas/base/request_stats.py."""
    return {
        "type_": "generative_request_stats",
        "request_id": "a",
        "output": "...",
        "info": {
            "status": "completed",
            "timings": {"targeted_start": start_s - 0.1, "request_start": start_s, "token_iterations": 9},
        },
        "input_metrics": {"text_tokens": prompt, "total_tokens": prompt},
        "output_metrics": {"text_tokens": output, "total_tokens": output},
        "request_start_time": start_s,
        "prompt_tokens": prompt,
        "output_tokens": output,
    }


GUIDELLM = [guidellm_request(T, 374, 44), guidellm_request(T + 4.314579, 396, 109), guidellm_request(T + 14, 879, 55)]
SHAREGPT: list[Any] = [  # anon8231489123/ShareGPT_Vicuna_unfiltered; vllm/benchmarks/datasets/sharegpt.py
    {
        "id": "QWJhYvA_0",
        "conversations": [
            {"from": "human", "value": "x" * 374 * 4},
            {"from": "gpt", "value": "y" * 44 * 4},
            {"from": "human", "value": 'and "then"?'},
        ],
    },
    {"id": "i6IyJda_0", "conversations": [{"from": "human", "value": "ü" * 396 * 4}, {"from": "gpt", "value": "y" * 109 * 4}]},
    {"id": "A5AbcES_0", "conversations": [{"from": "gpt", "value": "x" * 879 * 4}, {"from": "human", "value": "y" * 55 * 4}]},
]
SAMPLES: dict[str, str] = {
    "aiperf-jsonl": lines(*AIPERF),
    "azure-csv": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n"
        "2023-11-16 18:15:50.994579,396,109\n2023-11-16 18:16:00.68,879,55\n"
    ),
    "burstgpt-csv": (  # HPMLL/BurstGPT, README, Schema
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,374,44,418,Conversation log\n9.314579,GPT-4,396,109,505,API log\n19,ChatGPT,879,55,934,Conversation log\n"
    ),
    "generic-csv": "arrival_s,prompt_tokens,output_tokens\n1.5,374,44\n5.814579,396,109\n15.5,879,55\n",
    "generic-jsonl": lines(
        {"arrival_s": 1.5, "prompt_tokens": 374, "output_tokens": 44, "hash_ids": [0]},
        {"arrival_s": 5.814579, "prompt_tokens": 396, "output_tokens": 109, "hash_ids": []},
        {"arrival_s": 15.5, "prompt_tokens": 879, "output_tokens": 55, "hash_ids": [1]},
    ),
    "guidellm-json": json.dumps(guidellm(*GUIDELLM), indent=1),
    "mooncake-jsonl": lines(
        {"timestamp": 100, "input_length": 374, "output_length": 44, "hash_ids": [0]},
        {"timestamp": 4414.579, "input_length": 396, "output_length": 109, "hash_ids": [0, 1]},
        {"timestamp": 14100, "input_length": 879, "output_length": 55, "hash_ids": [2]},
    ),
    "sharegpt-json": json.dumps(SHAREGPT, indent=2, ensure_ascii=False),
    "vllm-bench-json": json.dumps(VLLM),
}
Write = Callable[[str | bytes], Path]
