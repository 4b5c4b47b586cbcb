"""The result of `vllm bench serve --save-result`. Source: vLLM, vllm/benchmarks/serve.py."""

from pathlib import Path
from typing import ClassVar

from pagedkv.errors import ConfigError
from pagedkv.sims.measurements import MEASUREMENT_FORMATS, Claims, MeasuredRate, Measurements
from pagedkv.sims.measurements._serving_run import serving_rates
from pagedkv.sims.traces._head import Head
from pagedkv.sims.traces._json_text import json_documents

_SUMMARY = frozenset(("request_throughput", "total_input_tokens"))


@MEASUREMENT_FORMATS.register("vllm-bench-result")
class VllmBenchResult:
    """One result, or several that --append-result wrote one behind the other."""

    looks_like: ClassVar[str] = (
        'vllm bench serve --save-result: {"completed": 200, "max_concurrency": 8, "median_itl_ms": ..., ...}'
    )

    @staticmethod
    def matches(text: str) -> bool:
        """Return whether the object is such a result."""
        head = Head.of(text)
        return head.is_object and head.keys >= _SUMMARY

    @staticmethod
    def read(path: Path, text: str) -> Measurements:
        """Return the rates of all runs in the file."""
        rates: list[MeasuredRate] = []
        notes: list[str] = []
        models = set()
        for line, run in json_documents(path, text):
            where = f"{path}, line {line}" if line > 1 else str(path)
            if not isinstance(run, dict):
                raise ConfigError(f"{where}: needs an object, as vllm bench serve --save-result writes it")
            models.add(str(run.get("model_id") or ""))
            rates += serving_rates(where, run, notes)
        if len(models) > 1:
            raise ConfigError(f"{path}: runs of {' and '.join(sorted(models))}; give one model at a time, with its --model")
        return Measurements(
            path=path,
            format="vllm-bench-result",
            rates=tuple(rates),
            claims=Claims(model=next(iter(models)) or None),
            notes=tuple(notes),
        )
