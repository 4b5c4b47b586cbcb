"""The table that `vllm bench serve` and SGLang's `bench_serving` print at their end, alone or in what a terminal showed.

Source: vLLM, vllm/benchmarks/serve.py; SGLang, python/sglang/bench_serving.py. Both descend from one script.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from pagedkv.errors import ConfigError
from pagedkv.sims.measurements import MEASUREMENT_FORMATS, Claims, MeasuredRate, Measurements
from pagedkv.sims.measurements._serving_run import serving_rates

_TITLE = re.compile(r"^\s*=+ Serving Benchmark Result =+", re.MULTILINE)
_ROW = re.compile(r"\s*(\S.*?):\s+(\S.*?)\s*")
_MODEL = re.compile(r"\bNamespace\(.*?\bmodel='([^']+)'")
_NAMES = {
    "Traffic request rate": "request_rate",
    "Request rate configured (RPS)": "request_rate",
    "Max request concurrency": "max_concurrency",
    "Maximum request concurrency": "max_concurrency",
    "Successful requests": "completed",
    "Benchmark duration (s)": "duration",
    "Total input tokens": "total_input_tokens",
    "Total generated tokens": "total_output_tokens",
    "Request throughput (req/s)": "request_throughput",
    "Output token throughput (tok/s)": "output_throughput",
} | {f"{kind} {what} (ms)": f"{kind}_{what}_ms".lower() for kind in ("Mean", "Median") for what in ("TTFT", "TPOT", "ITL")}
"""The table's words for the figures, and the names that vLLM's result file has for them."""
_UNSET = ("not set", "None")
_FEWEST_AT_ONCE = 0.4
"""Least share of a burst's requests that are there on average: half, if one after the other is done; with room for the tail."""


@MEASUREMENT_FORMATS.register("serving-benchmark-table")
class ServingBenchmarkTable:
    """One table, or several with whatever a terminal showed around them."""

    looks_like: ClassVar[str] = (
        "vllm bench serve, or sglang.bench_serving, on the terminal: ==== Serving Benchmark Result ====, Successful requests: 200"
    )

    @staticmethod
    def matches(text: str) -> bool:
        """Return whether such a table is in the text."""
        return _TITLE.search(text) is not None

    @staticmethod
    def read(path: Path, text: str) -> Measurements:
        """Return the rates of all tables in the file."""
        rates: list[MeasuredRate] = []
        notes: list[str] = []
        for line, run in _tables(text):
            where = f"{path}, line {line}"
            if not run:
                raise ConfigError(f"{where}: the table has no rows such as 'Successful requests:  200'")
            if not {"max_concurrency", "request_rate"} & run.keys() and not _is_burst(run):
                notes.append(f"{where}: it says no rate and no concurrency, and too few requests were there at once for one burst")
                run["request_rate"] = "unknown"
            rates += serving_rates(where, run, notes)
        models = sorted(set(_MODEL.findall(text)))
        if len(models) > 1:
            raise ConfigError(f"{path}: runs of {' and '.join(models)}; give one model at a time, with its --model")
        claims = Claims(model=models[0] if models else None)
        return Measurements(path=path, format="serving-benchmark-table", rates=tuple(rates), claims=claims, notes=tuple(notes))


def _tables(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line of each table's title and its figures by the names of vLLM's result file."""
    run: dict[str, Any] | None = None
    title = 0
    for number, line in enumerate(text.splitlines(), start=1):
        if _TITLE.search(line):
            if run is not None:
                yield title, run
            run, title = {}, number
        elif run is not None and (row := _ROW.fullmatch(line)) and row[1] in _NAMES and row[2] not in _UNSET:
            run.setdefault(_NAMES[row[1]], row[2].replace(",", ""))
    if run is not None:
        yield title, run


def _is_burst(run: dict[str, Any]) -> bool:
    """Return whether all requests may have come at once: as many were there on average as then would have been.

    By Little's law they are those that end per second, times how long each takes.
    """
    try:
        completed, duration_s, output = (float(run[name]) for name in ("completed", "duration", "total_output_tokens"))
        request_s = (float(run["mean_ttft_ms"]) + float(run["mean_tpot_ms"]) * (output / completed - 1)) / 1e3
        return request_s / duration_s >= _FEWEST_AT_ONCE
    except (KeyError, ValueError, ZeroDivisionError):  # what is missing is said where it is needed
        return True
