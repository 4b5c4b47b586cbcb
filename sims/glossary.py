"""The words of an answer, each with its formula: what `simulate explain` prints and the report's glossary shows.

The tables of docs/metrics.md are written from here (glossary_page); a test holds that every field of the result schema is here.
"""

import re
from dataclasses import dataclass

from pagedkv.errors import unknown_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One word."""

    name: str
    """Field of the result schema, or the word itself."""
    title: str
    """What tables call it."""
    formula: str
    """How it is computed; E is the end of the run, W the end of the warm-up."""
    meaning: str
    """What it tells."""


def _entry(name: str, title: str, formula: str, meaning: str) -> Entry:
    return Entry(name=name, title=title, formula=formula, meaning=meaning)


_ENTRIES = (
    _entry("ttft_s", "TTFT", "first token − arrival", "Time to first token: how long a person stares at an empty answer."),
    _entry(
        "tpot_s", "TPOT", "(last token − first token) / (output tokens − 1)", "Time per output token of one request, on average."
    ),
    _entry(
        "itl_s", "ITL", "token i+1 − token i, over all tokens", "Inter-token latency: every single pause, so its P99 shows stalls."
    ),
    _entry("e2e_s", "E2E", "last token − arrival", "End-to-end latency of a request."),
    _entry(
        "lower_bounds",
        "lower bounds",
        "TTFT or E2E percentiles that unfinished requests may raise by over 1 %",
        "Marked with ≥: requests cut off by the end count with the time that they have spent so far.",
    ),
    _entry("mean", "mean", "Σ samples / their number", "Of a latency: over all measured requests, or all gaps."),
    _entry("p50", "P50", "half of the samples are at most this", "The median: what the usual request sees."),
    _entry("p90", "P90", "90 % of the samples are at most this", "What one request in ten exceeds."),
    _entry("p99", "P99", "99 % of the samples are at most this", "What one request in a hundred exceeds."),
    _entry("ci95", "95 % interval", "mean ± t × s / √n over n repeats", "Where the mean lies, with --repeats from 2 on."),
    _entry(
        "error_interval",
        "error interval",
        "figure / f to figure × f",
        "How far off output tokens/s, mean TPOT and TTFT may be because step times are. f: the mean of the decode and the prefill "
        "factor's logarithms, weighted with the time that steps were bound by reading or by arithmetic; for TTFT at least the "
        "prefill factor.",
    ),
    _entry("goodput_per_s", "goodput, requests/s", "requests that finish within every goal / (E − W)", "Throughput that counts."),
    _entry(
        "goodput_share",
        "goodput, of all requests",
        "requests that finish within every goal / requests",
        "Requests that the end of the run cuts off count as misses, so that this is at most the share that meets the goals.",
    ),
    _entry(
        "attained",
        "meet the goals",
        "requests that finish within every goal / (requests − those cut off while within every goal)",
        "What the verdict judges by. A request that the end of the run cuts off is left out while nobody knows whether it would "
        "have met the goals.",
    ),
    _entry(
        "output_tokens_per_s",
        "output tokens/s",
        "output tokens in the window / (E − W)",
        "What the machine generates for all together, without what requests got that failed: nobody has their answers.",
    ),
    _entry("request_throughput_per_s", "requests/s", "requests finished in the window / (E − W)", "How fast requests leave."),
    _entry("error_rate", "error rate", "(rejected + failed) / requests", "What a client sees as errors, not as slow answers."),
    _entry("num_injected", "requests", "requests that arrive after the warm-up", "Finished + unfinished + rejected + failed."),
    _entry(
        "num_finished", "finished", "measured requests with all their tokens by E", "The others are unfinished, rejected or failed."
    ),
    _entry(
        "num_unfinished",
        "unfinished",
        "measured requests without all their tokens at E",
        "In percentiles: lower bounds. For goals: misses.",
    ),
    _entry(
        "num_rejected", "rejected", "refused at arrival", "They could never run here: too long for max-model-len or for the pool."
    ),
    _entry(
        "num_failed",
        "failed",
        "accepted, then given up; lost with a replica; or sent while none was up",
        "What the service could not keep its promise to.",
    ),
    _entry(
        "num_preemptions",
        "preemptions",
        "preemptions in steps that end within the window",
        "A running request is put back into the queue: its KV memory is given up and computed again.",
    ),
    _entry(
        "num_queried_tokens",
        "tokens queried",
        "prompt tokens of requests admitted for the first time, in steps that end within the window",
        "Looked up in the prefix cache. None without one.",
    ),
    _entry("num_hit_tokens", "tokens found", "those of them that were in the prefix cache", "Prefill that is spared."),
    _entry(
        "prefix_hit_rate",
        "prefix hit rate",
        "tokens found / tokens queried",
        "As vLLM reports it. Only prompts that begin alike hit: with --prefix-len, or a trace with hash_ids.",
    ),
    _entry(
        "resumed_hit_rate",
        "found on resumption",
        "tokens found / tokens known, over preempted requests that came back",
        "What of their own work (prompt and outputs so far) they need not do again; none if none came back.",
    ),
    _entry(
        "num_loaded_tokens",
        "tokens loaded",
        "tokens copied from the second tier, in steps that end within the window",
        "Part of the tokens found. None without a second tier.",
    ),
    _entry(
        "num_offloaded_tokens",
        "tokens offloaded",
        "tokens copied to the second tier, in steps that end within the window",
        "What left the prefix cache and was not in the tier yet.",
    ),
    _entry(
        "num_draft_tokens", "drafted tokens", "drafts that steps have verified, in all of the run", "None where nothing drafts."
    ),
    _entry("num_accepted_tokens", "accepted tokens", "those of them that became output", "Each is a step less for its request."),
    _entry(
        "draft_acceptance_rate",
        "drafts accepted",
        "accepted tokens / drafted tokens",
        "As vLLM reports it. Of k drafts, each accepted with chance a if those before it are: (a + a² + … + aᵏ) / k.",
    ),
    _entry("running_mean", "running, mean", "∫ running dt / (E − W)", "Requests in the running batch, weighted by time."),
    _entry("running_max", "running, max", "max of running", "The fullest batch."),
    _entry(
        "waiting_mean",
        "waiting, mean",
        "∫ waiting dt / (E − W)",
        "Requests that the scheduler left in the queue, weighted by time.",
    ),
    _entry("waiting_time_share", "time with requests waiting", "time with waiting > 0 / (E − W)", "Above 5 % the load saturates."),
    _entry(
        "busy_share",
        "time with a step running",
        "time in steps / time watched",
        "GPU utilization as monitors show it: it says nothing about how hard the GPU works.",
    ),
    _entry(
        "memory_bandwidth_share",
        "memory bandwidth used",
        "bytes moved / (time watched × the datasheet's bandwidth)",
        "Weights and KV of all steps. Near what a kernel can reach, about 0.7 to 0.9, decoding is as fast as it gets.",
    ),
    _entry(
        "compute_share",
        "compute used",
        "operations / (time watched × the datasheet's dense rate)",
        "Known as MFU. High while prompts are computed, low while tokens are generated.",
    ),
    _entry("kv", "share of KV memory", "∫ slots of a kind dt / (slots × (E − W))", "Where the KV memory goes; the kinds sum to 1."),
    _entry(
        "kv_when_waiting", "while requests wait", "the same over the time with waiting > 0", "Waste matters when somebody waits."
    ),
    _entry(
        "tokens",
        "tokens",
        "t, the tokens computed; a slot that several share counts once",
        "Memory at work: slots that hold a token's keys and values, this step's included.",
    ),
    _entry(
        "reserved",
        "reserved",
        "min(h, f) − t",
        "Taken early: of h slots held, those that the request, f = prompt + output − 1 tokens in the end, will still fill.",
    ),
    _entry(
        "internal",
        "internal",
        "max(h − f, 0)",
        "Slots held that will never be filled: the unused tail of a reservation or of a last block.",
    ),
    _entry(
        "external",
        "external",
        "a heap's rounding, and, while its head waits for memory, every free slot",
        "Free, and yet of no use: each free extent is too small for who waits. Zero with paging.",
    ),
    _entry(
        "cached",
        "cached",
        "free blocks that keep what was computed",
        "For reuse by the same prefix; given up as soon as somebody needs them.",
    ),
    _entry(
        "state",
        "state",
        "whole blocks taken for state of fixed size",
        "Per-sequence state of linear or Mamba layers: it does not grow with the context.",
    ),
    _entry("free", "free", "the rest", "Room for more."),
    _entry("iterations", "steps", "scheduler steps in the whole run", "One forward pass each."),
    _entry("request_steps", "request-steps", "Σ over steps of the requests in it", "The size of the simulation."),
    _entry("simulated_s", "simulated time", "E", "The virtual clock at the end, warm-up included."),
    _entry(
        "replicas",
        "replicas",
        "one row per replica, with --replicas from 2 on or --fault",
        "Deployments alike behind one router; every other figure is about all of them together.",
    ),
    _entry("num_replicas", "number of replicas", "--replicas", "Each has a machine of its own."),
    _entry("replica", "replica", "0 to number of replicas − 1", "Which one; --fault AT:FOR:REPLICA names it so."),
    _entry("up_s", "time up", "seconds of the window in which its process ran", "E − W without a fault."),
    _entry("verdict", "verdict", "status, fits, binding", "Whether the load fits, and which limit binds."),
    _entry("status", "status", "failed > rejecting > saturated > unmeasured > stable", "The first of them that holds."),
    _entry(
        "stable",
        "stable",
        "not saturated, nothing rejected, nothing failed",
        "The machine keeps up. It says nothing about goals.",
    ),
    _entry(
        "saturated",
        "saturated",
        "closed loop: requests wait over 5 % of the time, or throughput < 90 % of an unloaded machine's; open: the queue rises",
        "Users slow each other down. With --goodput a saturated load can still fit: then only the goals count, and the queue of an "
        "open loop. Without, it does not.",
    ),
    _entry("rejecting", "rejecting", "num_rejected > 0", "Some requests can never run here."),
    _entry(
        "unmeasured",
        "unmeasured",
        "num_injected = 0, and none waits",
        "No request arrived between the warm-up and the end: nothing is said about the load, and no limit is named.",
    ),
    _entry(
        "fits",
        "fits",
        "with goals: 99 % of the requests whose fate is known meet them, nobody is turned away, no queue rises; without: stable",
        "Whether the machine serves this load.",
    ),
    _entry("binding", "limit", "what costs the mean request the most time", "What is reached, or would be reached first."),
    _entry("next_command", "try next", "more load if it fits, else a remedy that starts", "A command to copy."),
    _entry(
        "engine",
        "engine",
        "vllm (0.33), or vllm@0.19",
        "Whose rules and defaults. 0.19: full-prompt gate off unless asked for, freed blocks all to the back, no watermark, "
        "utilization 0.9 with CUDA graphs on top, a GB10 counts as large.",
    ),
    _entry("allocator", "allocator", "paged or contiguous-*", "Who hands out KV memory; all of them serve the same requests."),
    _entry("placement", "placement", "block, or the name of a heap", "How an allocator finds room."),
    _entry(
        "block",
        "block",
        "block_size tokens' keys and values in all layers",
        "The unit of paged allocation; a block table lists a request's blocks.",
    ),
    _entry(
        "preemption",
        "preemption",
        "by recompute",
        "Without room for its next block, the last running request gives all up and starts over.",
    ),
    _entry("watermark", "watermark", "share of blocks an admission leaves free", "Fewer preemptions for a little queueing."),
)

GLOSSARY: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}
"""By name."""

_PERCENTILE_AND_UNIT = re.compile(r"(_p[0-9]+)?(_per_s|_m?s)?$")


def explain(word: str) -> Entry:
    """Return the entry for a field name, a title or a label of the comparison, in any case, with or without its unit.

    Raises:
        ConfigError: If there is none; near ones are named.
    """
    key = _key(word)
    for wanted in (key, _PERCENTILE_AND_UNIT.sub("", key)):  # "TTFT P50, ms" is about TTFT
        for entry in _ENTRIES:
            bare = _PERCENTILE_AND_UNIT.sub("", entry.name)
            if wanted in (entry.name, _key(entry.title), bare, entry.name.removeprefix("num_")):
                return entry
    raise unknown_name("word", word, GLOSSARY)


def _key(text: str) -> str:
    """Return `text` as a field name is written, without what it says in brackets."""
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"\(.*\)", "", text.lower())).strip("_")
