"""Formats of measurements: recognised by their content, read value by value, and refused with place and need."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pagedkv.errors import ConfigError
from pagedkv.sims.measurements import MEASUREMENT_FORMATS, Measurements, StartUp, read_measurements
from pagedkv.sims.measurements._llama_cpp import weights_of
from pagedkv.units import GIB

BENCH_TABLE = """ggml_cuda_init: found 1 CUDA devices:
  Device 0: NVIDIA GB10, compute capability 12.1, VMM: yes
| model                          |       size |     params | backend    | n_ubatch | fa |            test |                  t/s |
| ------------------------------ | ---------: | ---------: | ---------- | -------: | -: | --------------: | -------------------: |
| qwen2 7B Q8_0                  |   7.54 GiB |     7.62 B | CUDA       |     2048 |  1 |          pp2048 |       2267.08 ± 6.38 |
| qwen2 7B Q8_0                  |   7.54 GiB |     7.62 B | CUDA       |     2048 |  1 |            tg32 |         29.43 ± 0.02 |
| qwen2 7B Q8_0                  |   7.54 GiB |     7.62 B | CUDA       |     2048 |  1 |  pp2048 @ d4096 |       2094.87 ± 11.6 |
| qwen2 7B Q8_0                  |   7.54 GiB |     7.62 B | CUDA       |     2048 |  1 |    tg32 @ d4096 |         28.31 ± 0.10 |

build: 11fb327bf (7941)
"""
RECORD = {
    "build_commit": "11fb327b",
    "model_filename": "qwen.gguf",
    "model_type": "qwen2 7B Q4_K - Medium",
    "model_size": 8098525184,
    "model_n_params": 7615616512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "type_k": "f16",
    "type_v": "f16",
    "n_prompt": 512,
    "n_gen": 0,
    "n_depth": 0,
    "avg_ts": 2250.5,
    "stddev_ts": 3.2,
}
BATCHED = """main: n_kv_max = 8192, n_batch = 2048, n_ubatch = 1024, flash_attn = 1, is_pp_shared = 0, n_threads = 10

|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |
|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|
|   512 |     32 |    1 |    544 |    0.212 |  2420.09 |    1.100 |    29.10 |    1.311 |   414.89 |
|   512 |     32 |    8 |   4352 |    1.758 |  2330.36 |    1.319 |   194.15 |    3.076 |  1414.68 |
"""
VLLM_BENCH = {
    "date": "20261120-101112",
    "backend": "vllm",
    "model_id": "meta-llama/Llama-3.1-8B",
    "num_prompts": 64,
    "request_rate": "inf",
    "burstiness": 1.0,
    "max_concurrency": 8,
    "duration": 91.0,
    "completed": 64,
    "total_input_tokens": 65536,
    "total_output_tokens": 16384,
    "request_throughput": 0.703,
    "output_throughput": 180.0,
    "mean_ttft_ms": 900.0,
    "median_ttft_ms": 650.0,
    "mean_tpot_ms": 41.0,
    "median_itl_ms": 40.0,
}
VLLM_TABLE = """\
Namespace(subparser='bench', model='meta-llama/Llama-3.1-8B', num_prompts=64, max_concurrency=8)
100%|##########| 64/64 [01:31<00:00,  1.42s/it]
============ Serving Benchmark Result ============
Successful requests:                     64
Failed requests:                         0
Maximum request concurrency:             8
Benchmark duration (s):                  91.00
Total input tokens:                      65536
Total generated tokens:                  16384
Request throughput (req/s):              0.70
Output token throughput (tok/s):         180.00
Peak output token throughput (tok/s):    208.00
Peak concurrent requests:                16.00
Total token throughput (tok/s):          900.22
---------------Time to First Token----------------
Mean TTFT (ms):                          900.00
Median TTFT (ms):                        650.00
P99 TTFT (ms):                           2100.00
-----Time per Output Token (excl. 1st token)------
Mean TPOT (ms):                          41.00
Median TPOT (ms):                        40.50
P99 TPOT (ms):                           45.00
---------------Inter-token Latency----------------
Mean ITL (ms):                           41.00
Median ITL (ms):                         40.00
P99 ITL (ms):                            90.00
==================================================
"""
SGLANG_TABLE = """\
============ Serving Benchmark Result ============
Backend:                                 sglang
Traffic request rate:                    inf
Max request concurrency:                 not set
Successful requests:                     64
Benchmark duration (s):                  20.00
Total input tokens:                      65,536
Total input text tokens:                 65536
Total generated tokens:                  16384
Total generated tokens (retokenized):    16001
Request throughput (req/s):              3.20
Input token throughput (tok/s):          3276.80
Output token throughput (tok/s):         819.20
Concurrency:                             58.10
----------------End-to-End Latency----------------
Mean E2E Latency (ms):                   18155.00
---------------Time to First Token----------------
Mean TTFT (ms):                          5000.00
Median TTFT (ms):                        5100.00
---------------Inter-Token Latency----------------
Mean ITL (ms):                           51.60
Median ITL (ms):                         50.00
Max ITL (ms):                            900.00
==================================================
"""
STARTUP = """\
(APIServer pid=11) INFO 11-20 09:12:01 [api_server.py:1201] vLLM API server version 0.33.0
(APIServer pid=11) INFO 11-20 09:12:01 [utils.py:233] non-default args: {'model_tag': 'Qwen/Qwen2.5-7B', \
'model': 'Qwen/Qwen2.5-7B', 'max_model_len': 16384, 'gpu_memory_utilization': 0.8, 'max_num_seqs': 64}
(APIServer pid=11) INFO 11-20 09:12:09 [scheduler.py:216] Chunked prefill is enabled with max_num_batched_tokens=2048.
(EngineCore pid=87) INFO 11-20 09:12:20 [core.py:93] Initializing a V1 LLM engine (v0.33.0) with config: model='Qwen/Qwen2.5-7B', \
speculative_config=None, tokenizer='Qwen/Qwen2.5-7B', dtype=torch.bfloat16, max_seq_len=16384, tensor_parallel_size=1, \
quantization=None, enforce_eager=False, kv_cache_dtype=auto, device_config=cuda, seed=0, enable_prefix_caching=True
(EngineCore pid=87) INFO 11-20 09:12:41 [gpu_model_runner.py:4879] Model loading took 14.25 GiB memory and 17.657031 seconds
(EngineCore pid=87) INFO 11-20 09:13:09 [gpu_model_runner.py:5993] Estimated CUDA graph memory: 0.73 GiB total
(EngineCore pid=87) INFO 11-20 09:13:10 [gpu_worker.py:440] Available KV cache memory: 76.91 GiB
(EngineCore pid=87) INFO 11-20 09:13:10 [kv_cache_utils.py:1305] GPU KV cache size: 1,440,096 tokens
(EngineCore pid=87) INFO 11-20 09:13:10 [kv_cache_utils.py:1310] Maximum concurrency for 16,384 tokens per request: 87.90x
(EngineCore pid=87) INFO 11-20 09:13:31 [gpu_model_runner.py:5512] Graph capturing finished in 9 secs, took 0.61 GiB
(APIServer pid=11) INFO:     Application startup complete.
"""
OLDER = """\
INFO 03-21 20:15:00 [llm_engine.py:240] Initializing a V0 LLM engine (v0.8.1) with config: \
model='meta-llama/Llama-3.1-8B', dtype=torch.bfloat16
INFO 03-21 20:15:45 [worker.py:267] the current vLLM instance can use total_gpu_memory \
(79.19GiB) x gpu_memory_utilization (0.90) = 71.27GiB
INFO 03-21 20:15:45 [worker.py:267] model weights take 14.99GiB; non_torch_memory takes 0.16GiB; PyTorch activation peak memory \
takes 2.38GiB; the rest of the memory reserved for KV Cache is 53.74GiB.
INFO 03-21 20:15:46 [executor_base.py:111] # cuda blocks: 27515, # CPU blocks: 2048
"""


def read(tmp_path: Path, text: str, name: str = "file.txt") -> Measurements:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return read_measurements(path)


EXAMPLES: dict[str, tuple[str, ...]] = {
    "llama-bench-table": (BENCH_TABLE,),
    "llama-bench-records": (json.dumps([RECORD]), json.dumps(RECORD), "n_prompt,n_gen,n_depth,avg_ts\n512,0,0,2250.5\n"),
    "llama-batched-bench": (
        BATCHED,
        json.dumps({"n_ubatch": 512, "is_pp_shared": 0, "pp": 512, "tg": 32, "pl": 4, "speed_pp": 2300.0, "speed_tg": 104.0}),
    ),
    "vllm-bench-result": (json.dumps(VLLM_BENCH),),
    "serving-benchmark-table": (VLLM_TABLE, SGLANG_TABLE),
    "vllm-meta-json": (json.dumps({"model": "m", "vllm_version": "0.19.0", "kv_cache": {"num_gpu_blocks": 9, "block_size": 16}}),),
    "vllm-startup-log": (STARTUP, OLDER),
    "benchmark-csv": (
        "source,engine,model,weight_dtype,batch,prompt_tokens,context_depth,prefill_tok_s,decode_tok_s,note,verified\n"
        "me,vLLM,llama-3.1-8b,fp8,1,512,512,,22.5,,yes\n",
    ),
}


def test_every_format_has_an_example_that_no_other_claims(tmp_path: Path) -> None:
    assert set(EXAMPLES) == set(MEASUREMENT_FORMATS.names())
    for name, texts in EXAMPLES.items():
        for text in texts:
            claimed = [other for other in MEASUREMENT_FORMATS.names() if MEASUREMENT_FORMATS.load(other).matches(text)]
            assert claimed == [name]
            assert read(tmp_path, text).format == name


def works(found: Measurements) -> list[tuple[Any, ...]]:
    return [(r.kind, r.batch, r.prompt_tokens, r.depth, r.output_tokens, r.tokens_per_s, r.chunk_tokens) for r in found.rates]


def test_llama_bench_tells_tests_by_their_names(tmp_path: Path) -> None:
    found = read(tmp_path, BENCH_TABLE)
    assert works(found) == [
        ("prefill", 1, 2048, 0, 0, 2267.08, 2048),
        ("decode", 1, 0, 16, 0, 29.43, None),
        ("prefill", 1, 2048, 4096, 0, 2094.87, 2048),
        ("decode", 1, 0, 4112, 0, 28.31, None),
    ]
    assert (found.claims.engine, found.claims.num_params, found.claims.weights) == ("llama-cpp", 7.62e9, "q8_0")
    assert found.rates[1].where.endswith("file.txt, line 6")


def test_llama_bench_records_are_the_same_in_json_jsonl_and_csv(tmp_path: Path) -> None:
    records = [RECORD, RECORD | {"n_prompt": 0, "n_gen": 128, "n_depth": 1024, "avg_ts": 41.25}]
    header = list(RECORD)
    forms = (
        json.dumps(records),
        "\n".join(map(json.dumps, records)),
        "\n".join([",".join(header), *(",".join(str(record[name]) for name in header) for record in records)]),
    )
    expected = [("prefill", 1, 512, 0, 0, 2250.5, 512), ("decode", 1, 0, 1088, 0, 41.25, None)]
    for form in forms:
        found = read(tmp_path, form)
        assert works(found) == expected
        assert (found.claims.weights, found.claims.num_params) == ("q4_k_m", 7615616512)


def test_prompt_and_generation_in_one_test_are_a_run(tmp_path: Path) -> None:
    (rate,) = read(tmp_path, json.dumps([RECORD | {"n_prompt": 512, "n_gen": 128, "avg_ts": 100.0}])).rates
    assert (rate.kind, rate.prompt_tokens, rate.output_tokens) == ("run", 512, 128)
    assert rate.tokens_per_s == pytest.approx(20.0)  # of 640 tokens in 6.4 s, 128 are made


def test_batched_bench_prefills_and_decodes_behind_the_prompt(tmp_path: Path) -> None:
    assert works(read(tmp_path, BATCHED)) == [
        ("prefill", 1, 512, 0, 0, 2420.09, 1024),
        ("decode", 1, 0, 528, 0, 29.10, None),
        ("prefill", 8, 512, 0, 0, 2330.36, 1024),
        ("decode", 8, 0, 528, 0, 194.15, None),
    ]
    shared = read(tmp_path, BATCHED.replace("is_pp_shared = 0", "is_pp_shared = 1"))
    assert [rate.batch for rate in shared.rates] == [1, 1, 1, 8]  # one prompt for all


@pytest.mark.parametrize(
    ("model_type", "weights"),
    [
        ("llama 8B Q8_0", "q8_0"),
        ("gpt-oss 20B MXFP4 MoE", "mxfp4+q8_0"),
        ("qwen2 7B Q4_K - Medium", "q4_k_m"),
        ("llama 8B F16", "fp16"),
        ("llama 8B BF16", "bf16"),
        ("llama 8B IQ4_XS - 4.25 bpw", None),
        ("", None),
    ],
)
def test_model_types_name_weights(model_type: str, weights: str | None) -> None:
    assert weights_of(model_type) == weights


def test_a_result_of_vllm_bench_gives_a_step_and_a_run(tmp_path: Path) -> None:
    found = read(tmp_path, json.dumps(VLLM_BENCH))
    step, run = found.rates
    assert (step.kind, step.batch, step.depth) == ("decode", 8, 1024 + 128)
    assert step.tokens_per_s == pytest.approx(8 / 0.040)
    assert (run.kind, run.batch, run.prompt_tokens, run.output_tokens) == ("run", 8, 1024, 255)
    assert run.tokens_per_s == pytest.approx(180.0 * 255 / 256)
    assert found.claims.model == "meta-llama/Llama-3.1-8B"


def test_one_request_at_a_time_gives_its_prefill(tmp_path: Path) -> None:
    alone = VLLM_BENCH | {"max_concurrency": 1, "median_itl_ms": None}
    step, first = read(tmp_path, json.dumps(alone)).rates
    assert step.tokens_per_s == pytest.approx(1 / 0.041)  # alone, the time per token will do
    assert (first.kind, first.prompt_tokens) == ("prefill", 1024)
    assert first.tokens_per_s == pytest.approx(1024 / 0.650)


def test_requests_at_a_rate_give_the_steps_that_little_counts(tmp_path: Path) -> None:
    found = read(tmp_path, json.dumps(VLLM_BENCH | {"request_rate": 0.7, "max_concurrency": None}))
    (step,) = found.rates
    assert step.batch == round(64 * 0.041 * 255 / 91)
    assert any("on average" in note for note in found.notes)
    assert any("queueing" in note for note in found.notes)


def test_several_appended_results_are_read_each(tmp_path: Path) -> None:
    found = read(tmp_path, json.dumps(VLLM_BENCH) + "\n" + json.dumps(VLLM_BENCH | {"max_concurrency": 1}))
    assert [rate.kind for rate in found.rates] == ["decode", "run", "decode", "prefill"]


def test_the_table_on_the_terminal_says_what_the_saved_result_does(tmp_path: Path) -> None:
    saved, shown = read(tmp_path, json.dumps(VLLM_BENCH)), read(tmp_path, VLLM_TABLE)
    assert [replace(rate, where="") for rate in shown.rates] == [replace(rate, where="") for rate in saved.rates]
    assert (shown.claims, shown.notes) == (saved.claims, saved.notes)
    assert shown.rates[0].where.endswith("file.txt, line 3, median_itl_ms")
    elsewhere = read(tmp_path, VLLM_TABLE.replace("\n", "\r\n"))
    assert elsewhere.rates == shown.rates


def test_the_table_of_sglang_is_a_burst_where_no_limit_is_set(tmp_path: Path) -> None:
    found = read(tmp_path, SGLANG_TABLE)
    (decode,) = found.rates
    assert (decode.kind, decode.batch, decode.depth, decode.tokens_per_s) == ("decode", 64, 1024 + 128, 64 / 0.050)
    at_a_rate = SGLANG_TABLE.replace("rate:                    inf", "rate:                    3.5").replace(
        "Median ITL", "Mean TPOT (ms):                          50.00\nMedian ITL"
    )
    assert read(tmp_path, at_a_rate).rates[0].batch == round(64 * 0.050 * 255 / 20)


def test_several_tables_are_read_each_and_nothing_between_them(tmp_path: Path) -> None:
    alone = VLLM_TABLE.replace("concurrency:             8", "concurrency:             1")
    found = read(tmp_path, VLLM_TABLE + "$ vllm bench serve --max-concurrency 1\nSuccessful requests: 3\n" + alone)
    assert [rate.batch for rate in found.rates] == [8, 8, 1, 1]
    assert [rate.kind for rate in found.rates] == ["decode", "run", "decode", "prefill"]


def test_a_table_that_states_no_limit_counts_as_a_burst_only_if_it_was_one(tmp_path: Path) -> None:
    older = VLLM_TABLE.replace("Maximum request concurrency:             8\n", "")
    found = read(tmp_path, older)  # 8 of 64 at once on average: there was a limit, or a rate
    assert [rate.batch for rate in found.rates] == [round(64 * 0.041 * 255 / 91)]
    assert any("says no rate and no concurrency" in note for note in found.notes)
    burst = older.replace("91.00", "15.00").replace("180.00", "1092.27")
    assert [rate.batch for rate in read(tmp_path, burst).rates] == [64]


def test_a_start_up_log_gives_memory_and_settings(tmp_path: Path) -> None:
    found = read(tmp_path, STARTUP)
    assert found.rates == ()
    log = found.start_up
    assert log is not None
    assert (log.kv_tokens, log.num_blocks, log.visible_bytes) == (1_440_096, None, None)
    assert log.kv_bytes == round(76.91 * GIB)
    assert log.kv_bytes_digit == GIB // 100
    assert log.weight_bytes == round(14.25 * GIB)
    assert log.graph_bytes == round(0.73 * GIB)  # what was set aside, not what it took later
    assert dict(log.settings) == {
        "gpu_memory_utilization": "0.8",
        "max_model_len": "16384",
        "max_num_seqs": "64",
        "max_num_batched_tokens": "2048",
        "kv_cache_dtype": "auto",
        "enforce_eager": "False",
        "tensor_parallel_size": "1",
    }
    assert (found.claims.version, found.claims.model, found.claims.weights) == ("0.33.0", "Qwen/Qwen2.5-7B", None)


def test_an_older_log_says_it_in_other_words(tmp_path: Path) -> None:
    found = read(tmp_path, OLDER)
    log = found.start_up
    assert log is not None
    assert (log.num_blocks, log.weight_bytes, log.visible_bytes) == (27515, round(14.99 * GIB), round(79.19 * GIB))
    assert dict(log.settings)["gpu_memory_utilization"] == "0.90"
    assert found.claims.version == "0.8.1"


def test_of_several_starts_the_last_counts(tmp_path: Path) -> None:
    log = read(tmp_path, STARTUP + STARTUP.replace("1,440,096", "1,340,096")).start_up
    assert log is not None
    assert log.kv_tokens == 1_340_096


def test_a_draft_model_and_what_is_not_set_do_not_confuse(tmp_path: Path) -> None:
    more = "INFO args: Namespace(max_num_seqs=None, page_block_size=64, speculative_config={'model': 'small'})\n"
    assert read(tmp_path, STARTUP + more).claims == read(tmp_path, STARTUP).claims
    assert read(tmp_path, STARTUP + more).start_up == read(tmp_path, STARTUP).start_up


def test_colours_of_a_terminal_do_not_matter(tmp_path: Path) -> None:
    coloured = "\n".join(f"\x1b[0;36m{line}\x1b[0;0m" for line in STARTUP.splitlines())
    plain = read(tmp_path, STARTUP).start_up
    assert isinstance(plain, StartUp)
    assert read(tmp_path, coloured).start_up == plain


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("hello\n", "no measurements that are understood; it begins with 'hello'"),
        ("", "no measurements that are understood"),
        (BENCH_TABLE.replace("2267.08 ± 6.38", "fast"), r"line 5: t/s is 'fast'; needs tokens a second"),
        (BENCH_TABLE.replace("29.43", "-29.43"), r"line 6: t/s is '-29.43'"),
        (BENCH_TABLE.replace("pp2048 @", "xx2048 @"), r"line 7: test is 'xx2048 @ d4096'; needs one such as pp512"),
        (BENCH_TABLE.replace("|         28.31 ± 0.10 |", "|"), "line 8: another number of cells"),
        (
            BENCH_TABLE.replace(
                "qwen2 7B Q8_0                  |   7.54 GiB |     7.62 B | CUDA       |     2048 |  1 |    tg32 @",
                "llama 8B Q8_0 | 8 GiB | 8.03 B | CUDA | 2048 | 1 | tg32 @",
            ),
            "give one model at a time",
        ),
        ("\n".join(BENCH_TABLE.splitlines()[:4]), "has no rows"),
        (json.dumps([{k: v for k, v in RECORD.items() if k != "n_gen"}]), "record 1: no n_gen"),
        (json.dumps([RECORD | {"avg_ts": "x"}]), "avg_ts is 'x'"),
        (json.dumps([RECORD | {"n_prompt": 0}]), "neither prompt nor generated"),
        (json.dumps([RECORD | {"n_prompt": 5.5}]), "n_prompt is 5.5; needs a whole number"),
        (json.dumps([RECORD | {"type_k": "q8_0"}]), "type_k is 'q8_0'"),
        (json.dumps([RECORD, RECORD | {"model_type": "llama 8B Q8_0"}]), "give one model at a time"),
        ('[{"n_prompt": 1, "avg_ts": 3}', "not JSON"),
        (BATCHED.replace("2420.09", "0.00"), r"S_PP t/s is '0.00'; needs tokens a second"),
        (BATCHED.replace("|    8 |", "|    x |"), "line 6: B is 'x'; needs a whole number of 1"),
        (json.dumps(VLLM_BENCH | {"completed": 0}), "completed is 0; needs a whole number of 1 or more"),
        (json.dumps({k: v for k, v in VLLM_BENCH.items() if k != "duration"}), "duration is missing; needs the seconds"),
        (json.dumps(VLLM_BENCH | {"median_itl_ms": None}), "no median_itl_ms"),
        (json.dumps(VLLM_BENCH | {"median_itl_ms": -1}), "median_itl_ms is -1"),
        (json.dumps(VLLM_BENCH | {"total_output_tokens": 64}), "1 output tokens per request"),
        (json.dumps(VLLM_BENCH) + json.dumps(VLLM_BENCH | {"model_id": "other"}), "give one model at a time"),
        (VLLM_TABLE.replace("Successful requests:                     64", ""), "line 3: completed is missing"),
        (VLLM_TABLE.replace("Median ITL", "Half of ITL"), "line 3: no median_itl_ms; the benchmark writes them"),
        (VLLM_TABLE.replace("65536", "[result]"), r"total_input_tokens is '\[result\]'"),
        ("====== Serving Benchmark Result ======\n", "line 1: the table has no rows such as"),
        (VLLM_TABLE + VLLM_TABLE.replace("Llama-3.1-8B", "Llama-3.2-1B"), "give one model at a time"),
        (STARTUP.splitlines()[0], "without the size of the KV cache"),
        (STARTUP.replace("76.91", "-3.20"), "is -3.20 GiB: vLLM had no room"),
        (json.dumps({"vllm_version": "0.19.0", "kv_cache": {}}), "kv_cache.num_gpu_blocks is missing"),
        (json.dumps({"vllm_version": "0.19.0", "kv_cache": 3}), "must be objects"),
        ("engine,model,decode_tok_s\nvLLM,x,3\n", "no column source and no column weight_dtype"),
    ],
)
def test_what_is_wrong_is_named_with_its_place_and_what_is_needed(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read(tmp_path, text)


def test_a_folder_is_its_meta_json(tmp_path: Path, shared_data: Path) -> None:
    found = read_measurements(shared_data / "vllm_rtx4090_llama31_8b")
    assert (found.format, found.claims.version, found.claims.device) == ("vllm-meta-json", "0.19.0", "NVIDIA GeForce RTX 4090")
    assert found.start_up is not None
    assert (found.start_up.num_blocks, found.start_up.visible_bytes) == (2588, 25_250_627_584)
    with pytest.raises(ConfigError, match=r"a folder without a meta\.json"):
        read_measurements(tmp_path)
