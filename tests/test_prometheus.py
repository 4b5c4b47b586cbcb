"""metrics.prom: text that a strict reader of the format takes, with vLLM's names, and the numbers of the run."""

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.sims.cli import main
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.exposition import Family, Histogram, exposition
from pagedkv.sims.recorder import Recorder
from pagedkv.sims.records import Outcome
from pagedkv.sims.results import AllocatorResult, Results, simulate
from pagedkv.sims.scenario import resolve
from pagedkv.sims.simulation import Run, run
from pagedkv.sims.vllm_metrics import REQUEST_BOUNDS_S, TOKEN_BOUNDS_S, TTFT_BOUNDS_S, length_bounds, metrics_text

NAMES = {
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
    *("prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total"),
    *("prompt_tokens_total", "generation_tokens_total", "request_success_total"),
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds"),
    *("e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds"),
    *("request_decode_time_seconds", "request_inference_time_seconds", "request_prompt_tokens", "request_generation_tokens"),
}
LABELS = {"model_name", "engine", "allocator", "repeat"}

_COMMENT = re.compile(r"# (HELP|TYPE) ([a-zA-Z_:][a-zA-Z0-9_:]*) (.*)")
_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\{(.*)\} (\S+)")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"(?:,|$)')

Key = frozenset[tuple[str, str]]


class Parsed(NamedTuple):
    kinds: dict[str, str]
    helps: dict[str, str]
    samples: dict[str, dict[Key, float]]
    """By sample name (a histogram's with _bucket, _sum, _count) and labels."""


def unescaped(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: "\n" if match[1] == "n" else match[1], text)


def parse(text: str) -> Parsed:
    """Read the format as its specification says, and refuse what it does not allow."""
    assert text.endswith("\n")
    parsed = Parsed({}, {}, defaultdict(dict))
    family = ""
    for line in text.split("\n")[:-1]:
        if comment := _COMMENT.fullmatch(line):
            kind, name, rest = comment.groups()
            into = parsed.helps if kind == "HELP" else parsed.kinds
            assert name not in into, f"{name} has two {kind} lines"
            assert name == family or name not in parsed.samples, "a family is one group"
            into[name], family = unescaped(rest), name
            continue
        if line.startswith("# "):
            continue
        match = _SAMPLE.fullmatch(line)
        assert match, line
        name, inside, value = match.groups()
        endings = ("_bucket", "_sum", "_count") if parsed.kinds[family] == "histogram" else ("",)
        assert name in {family + ending for ending in endings}, f"{name} lies in the group of {family}"
        labels = _LABEL.findall(inside)
        assert "".join(f'{label}="{text}",' for label, text in labels)[:-1] == inside
        key = frozenset((label, unescaped(text)) for label, text in labels)
        assert len(key) == len(labels)
        assert key not in parsed.samples[name], f"{line} comes twice"
        parsed.samples[name][key] = float(value)
    assert parsed.kinds.keys() == parsed.helps.keys()
    return parsed


def without_le(key: Key) -> tuple[Key, str]:
    le = dict(key)["le"]
    return key - {("le", le)}, le


def buckets(parsed: Parsed, name: str) -> dict[Key, list[tuple[float, float]]]:
    """Return (bound, observations at most that) of a histogram, by labels, after checking what holds of any histogram."""
    found: dict[Key, list[tuple[float, float]]] = defaultdict(list)
    for key, number in parsed.samples[f"{name}_bucket"].items():
        labels, le = without_le(key)
        found[labels].append((float(le), number))
    for labels, rows in found.items():
        bounds, numbers = zip(*rows, strict=True)
        assert list(bounds) == sorted(set(bounds))
        assert bounds[-1] == math.inf
        assert list(numbers) == sorted(numbers)
        assert numbers[-1] == parsed.samples[f"{name}_count"][labels]
    assert found.keys() == parsed.samples[f"{name}_sum"].keys() == parsed.samples[f"{name}_count"].keys()
    return found


def answer(load: dict[str, Any], serving: dict[str, Any] | None = None, **measurement: Any) -> Results:
    return simulate(
        resolve(
            SimulationConfig(
                load=LoadConfig(**load), serving=ServingConfig(**(serving or {})), measurement=MeasurementConfig(**measurement)
            )
        )
    )


SMALL: dict[str, Any] = {"num_gpu_blocks_override": 300, "max_model_len": 4096}


@pytest.fixture(scope="module")
def closed() -> Results:
    """Requests are preempted, wait, and are cut off by the end; two columns, two repeats, a warm-up."""
    return answer(
        {"users": 30, "think_time": "1s"}, SMALL, warmup="10s", duration="60s", repeats=2, allocator=("paged", "contiguous-max")
    )


@pytest.fixture(scope="module")
def drained() -> Results:
    return answer({"request_rate": 3.0, "num_prompts": 150}, SMALL, warmup="0", allocator=("paged",))


def runs(results: Results) -> list[tuple[dict[str, str], Run]]:
    return [
        ({"allocator": name, "repeat": str(repeat)}, each)
        for name, result in results.by_allocator.items()
        for repeat, each in enumerate(result.runs)
    ]


def one(parsed: Parsed, name: str, labels: dict[str, str]) -> float:
    (value,) = [value for key, value in parsed.samples[f"vllm:{name}"].items() if labels.items() <= dict(key).items()]
    return value


def test_every_metric_has_vllms_name_and_every_series_its_column(closed: Results) -> None:
    parsed = parse(metrics_text([closed]))
    assert set(parsed.kinds) == {f"vllm:{name}" for name in NAMES}
    for name, kind in parsed.kinds.items():
        samples = parsed.samples[f"{name}_count" if kind == "histogram" else name]
        more = {"finished_reason"} if name == "vllm:request_success_total" else set()
        assert {frozenset(dict(key)) for key in samples} == {frozenset(LABELS | more)}
        columns = {(dict(key)["allocator"], dict(key)["repeat"]) for key in samples}
        assert columns == {(labels["allocator"], labels["repeat"]) for labels, _ in runs(closed)}
    assert {dict(key)["engine"] for key in parsed.samples["vllm:num_requests_running"]} == {"vllm"}


def test_every_histogram_counts_what_the_log_says(closed: Results) -> None:
    parsed = parse(metrics_text([closed]))
    lengths = length_bounds(4096)
    for labels, each in runs(closed):
        log = each.log
        started = log.where(log.first_token_s >= each.warmup_s)
        done = log.where((log.outcome == Outcome.FINISHED) & (log.last_token_s >= each.warmup_s))
        assert 0 < len(done) < len(log)
        expected: dict[str, tuple[Any, Any]] = {
            "time_to_first_token_seconds": (started.first_token_s - started.arrival_s, TTFT_BOUNDS_S),
            "request_time_per_output_token_seconds": (
                np.where(done.output_tokens > 1, done.last_token_s - done.first_token_s, 0) / np.maximum(done.output_tokens - 1, 1),
                TOKEN_BOUNDS_S,
            ),
            "e2e_request_latency_seconds": (done.last_token_s - done.arrival_s, REQUEST_BOUNDS_S),
            "request_queue_time_seconds": (done.scheduled_s - done.arrival_s, REQUEST_BOUNDS_S),
            "request_prefill_time_seconds": (done.first_token_s - done.scheduled_s, REQUEST_BOUNDS_S),
            "request_decode_time_seconds": (done.last_token_s - done.first_token_s, REQUEST_BOUNDS_S),
            "request_inference_time_seconds": (done.last_token_s - done.scheduled_s, REQUEST_BOUNDS_S),
            "request_prompt_tokens": (done.prompt_tokens, lengths),
            "request_generation_tokens": (done.output_tokens, lengths),
        }
        for name, (samples, bounds) in expected.items():
            (rows,) = [rows for key, rows in buckets(parsed, f"vllm:{name}").items() if labels.items() <= dict(key).items()]
            assert rows == [(bound, sum(float(x) <= bound for x in samples)) for bound in (*bounds, math.inf)]
            assert one(parsed, f"{name}_sum", labels) == pytest.approx(math.fsum(map(float, samples)))


def test_counters_are_the_figures_of_the_summary(closed: Results) -> None:
    parsed, window_s = parse(metrics_text([closed])), 60.0
    for result in closed.document()["results"]:
        mine = [labels for labels, _ in runs(closed) if labels["allocator"] == result["allocator"]]

        def total(name: str, mine: list[dict[str, str]] = mine, **more: str) -> float:
            return sum(one(parsed, name, {**labels, **more}) for labels in mine)

        assert total("num_preemptions_total") == result["num_preemptions"]
        assert total("generation_tokens_total") == pytest.approx(2 * window_s * result["output_tokens_per_s"])
        ended = total("request_success_total", finished_reason="length")
        assert ended == pytest.approx(2 * window_s * result["request_throughput_per_s"])
        assert total("request_success_total", finished_reason="error") == result["num_failed"]
        assert total("prefix_cache_queries_total") == (result["num_queried_tokens"] or 0)
        assert total("prefix_cache_hits_total") == (result["num_hit_tokens"] or 0)
    assert closed.document()["results"][0]["num_preemptions"] > 0


def test_means_are_those_of_the_summary_if_everybody_was_answered(drained: Results) -> None:
    parsed, (result,) = parse(metrics_text([drained])), drained.document()["results"]
    for name, figure in (
        ("time_to_first_token_seconds", "ttft_s"),
        ("inter_token_latency_seconds", "itl_s"),
        ("e2e_request_latency_seconds", "e2e_s"),
    ):
        assert one(parsed, f"{name}_sum", {}) / one(parsed, f"{name}_count", {}) == pytest.approx(result[figure]["mean"])
    assert one(parsed, "e2e_request_latency_seconds_count", {}) == result["num_finished"] == 150 - result["num_rejected"] > 100
    phases = [one(parsed, f"request_{phase}_time_seconds_sum", {}) for phase in ("queue", "prefill", "decode", "inference")]
    assert sum(phases[:3]) == pytest.approx(one(parsed, "e2e_request_latency_seconds_sum", {}))
    assert phases[3] == pytest.approx(phases[1] + phases[2])
    log = drained.by_allocator["paged"].runs[0].log.of(Outcome.FINISHED)
    assert one(parsed, "prompt_tokens_total", {}) == one(parsed, "request_prompt_tokens_sum", {}) == log.prompt_tokens.sum()
    assert one(parsed, "generation_tokens_total", {}) == log.output_tokens.sum()
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert one(parsed, gauge, {}) == 0.0


def gaps_and_run(monkeypatch: pytest.MonkeyPatch, warmup: str) -> tuple[list[float], Results]:
    """Return every gap between tokens of measured requests, noted as the tokens come, and the answer."""
    newest: dict[int, float] = {}
    gaps_s: list[float] = []
    noted = Recorder.tokens

    def tokens(self: Recorder, now_s: float) -> None:
        noted(self, now_s)
        for request in self._scheduler.sampled.tolist():
            if request in newest and self.arrays.times["arrival_s"][request] >= self.warmup_s:
                gaps_s.append(now_s - newest[request])
            newest[request] = now_s

    monkeypatch.setattr(Recorder, "tokens", tokens)
    scenario = resolve(
        SimulationConfig(
            load=LoadConfig(users=30, think_time="1s"),
            serving=ServingConfig(**SMALL),
            measurement=MeasurementConfig(warmup=warmup, duration="40s", allocator=("paged",)),
        )
    )
    slow = run(scenario, "paged", seed=0, step_by_step=True)
    assert (slow.log.outcome == Outcome.UNFINISHED).sum() > 10
    results = simulate(scenario)
    result = results.by_allocator["paged"]
    again = AllocatorResult(runs=[slow], figures=result.figures, verdict=result.verdict)
    return gaps_s, Results(scenario=scenario, by_allocator={"paged": again})


@pytest.mark.parametrize("warmup", ["0", "15s"])
def test_token_gaps_lie_in_their_buckets_but_for_a_bin(monkeypatch: pytest.MonkeyPatch, warmup: str) -> None:
    gaps_s, results = gaps_and_run(monkeypatch, warmup)
    parsed = parse(metrics_text([results]))
    ((_, rows),) = buckets(parsed, "vllm:inter_token_latency_seconds").items()
    gaps = np.array(gaps_s)
    assert rows[-1] == (math.inf, len(gaps))
    for bound, number in rows[:-1]:
        assert (gaps <= bound / 1.001).sum() <= number <= (gaps <= bound * 1.001).sum()
    assert one(parsed, "inter_token_latency_seconds_sum", {}) == pytest.approx(math.fsum(gaps_s))


def test_gauges_are_the_state_at_the_end(closed: Results) -> None:
    parsed = parse(metrics_text([closed]))
    for labels, each in runs(closed):
        assert isinstance(each.recorder, Recorder)
        assert one(parsed, "num_requests_running", labels) == each.recorder._scheduler.num_running > 0
        if labels["allocator"] == "paged":
            used = 1 - each.allocator.free_slots / each.allocator.usable_slots
            assert one(parsed, "kv_cache_usage_perc", labels) == pytest.approx(used)
    paged = {"allocator": "paged", "repeat": "0"}
    assert 0.5 < one(parsed, "kv_cache_usage_perc", paged) <= 1
    assert one(parsed, "num_requests_waiting", paged) > 0


def test_gauges_of_replicas_are_those_of_the_ones_that_are_up() -> None:
    results = answer(
        {"users": 30, "think_time": "1s"},
        {**SMALL, "replicas": 3, "fault": ("15s:1h:1",)},
        warmup="5s",
        duration="20s",
        allocator=("paged",),
    )
    parsed, done = parse(metrics_text([results])), results.by_allocator["paged"].runs[0]
    up = [replica.now.scheduler for replica in done.replicas if replica.up]
    assert len(up) == 2
    assert one(parsed, "num_requests_running", {}) == sum(scheduler.num_running for scheduler in up) > 0
    free, slots = (sum(getattr(scheduler.allocator, name) for scheduler in up) for name in ("free_slots", "usable_slots"))
    assert one(parsed, "kv_cache_usage_perc", {}) == pytest.approx(1 - free / slots)
    (result,) = results.document()["results"]
    assert one(parsed, "request_success_total", {"finished_reason": "error"}) == result["num_failed"] > 0
    assert 0.5 < result["busy_share"] <= 1 + 1e-12
    log = done.log.where((done.log.arrival_s >= 5.0) & (done.log.outcome != Outcome.REJECTED) & (done.log.num_output_tokens > 0))
    gaps_s = one(parsed, "inter_token_latency_seconds_sum", {})
    assert gaps_s == pytest.approx((log.last_token_s - log.first_token_s).sum())
    assert one(parsed, "inter_token_latency_seconds_count", {}) == (log.num_output_tokens - 1).sum()


def test_the_comment_says_what_time_the_scrape_is_of(closed: Results) -> None:
    assert "# Simulated time: counted from 10 s, scraped at 70 s.\n" in metrics_text([closed])


def test_a_comparison_of_engines_has_one_file_with_all_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main("--users 4 --think-time 1s --duration 5s --warmup 0 --engine vllm@0.19,sglang --out r".split())
    together = parse(Path("r/metrics.prom").read_text("utf-8"))
    assert {dict(key)["engine"] for key in together.samples["vllm:num_requests_running"]} == {"vllm@0.19", "sglang"}
    for engine in ("vllm@0.19", "sglang"):
        alone = parse(Path("r", engine, "metrics.prom").read_text("utf-8"))
        assert all(samples.items() <= together.samples[name].items() for name, samples in alone.samples.items())
    tokens = sum(together.samples["vllm:generation_tokens_total"].values())
    columns = json.loads(Path("r/comparison.json").read_text("utf-8"))["results"]
    assert tokens == pytest.approx(5 * sum(column["output_tokens_per_s"] for column in columns))


# --- the format -----------------------------------------------------------------------------------------------------


@given(text=st.text(), meaning=st.text(alphabet=st.characters(exclude_characters="\r\x85\u2028\u2029", exclude_categories=["Cs"])))
def test_any_text_can_be_a_label_or_a_meaning(text: str, meaning: str) -> None:
    family = Family(name="a:b_total", kind="counter", help=meaning, samples=[({"label": text, "other": "x"}, 1.5)])
    parsed = parse(exposition([family], comments=["no sample"]))
    assert parsed.samples["a:b_total"] == {frozenset({("label", text), ("other", "x")}): 1.5}
    assert parsed.helps["a:b_total"] == meaning


@given(samples=st.lists(st.floats(0, 1e4) | st.sampled_from(TTFT_BOUNDS_S), max_size=60))
def test_a_histogram_counts_each_observation_at_its_bound_or_below(samples: list[float]) -> None:
    family = Family(name="h", kind="histogram", help="", samples=[({}, Histogram.of(np.array(samples), TTFT_BOUNDS_S))])
    parsed = parse(exposition([family]).replace("# HELP h \n", "# HELP h x\n"))
    ((_, rows),) = buckets(parsed, "h").items()
    assert rows == [(bound, sum(x <= bound for x in samples)) for bound in (*TTFT_BOUNDS_S, math.inf)]


@pytest.mark.parametrize(("max_model_len", "last"), [(1, 1), (4, 2), (5, 5), (4096, 2000), (131_072, 100_000), (10**6, 10**6)])
def test_bounds_of_lengths_end_where_lengths_do(max_model_len: int, last: float) -> None:
    bounds = length_bounds(max_model_len)
    assert bounds[-1] == last
    assert all(b / a in (2, 2.5) for a, b in zip(bounds, bounds[1:], strict=False))


def test_bounds_are_written_as_client_libraries_do() -> None:
    bounds = (0.001, 1.0, 2500.0, 1e6, 5e6)
    text = exposition([Family(name="h", kind="histogram", help="x", samples=[({}, Histogram.of(np.zeros(1), bounds))])])
    assert re.findall('le="(.*?)"', text) == ["0.001", "1.0", "2500.0", "1e+06", "5e+06", "+Inf"]
