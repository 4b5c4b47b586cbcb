"""`simulate calibrate` refuses what it cannot be calibrated with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from calibrations import SERVING, decode, fitted, prefill, study

from pagedkv.errors import ConfigError
from pagedkv.sims.config import ServingConfig


def test_a_rate_above_the_peak_is_flagged_and_not_fitted() -> None:
    found = study(decode(22.0), decode(400.0, depth=64), prefill(40_000.0))
    assert len(found.left_out) == 2
    assert all(each.reason.startswith("impossible: ") for each in found.left_out)
    assert fitted(found) == ("weight_read_bytes_per_s",)
    with pytest.raises(
        ConfigError, match=r"no rate to fit: mine: impossible: 400 decode tokens/s would read .* GB/s, more than the 273"
    ):
        study(decode(400.0))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"engine": "vllm,sglang"}, "a measurement is of one engine"),
        ({"clock_derate": 0.5}, "has the clock in it already"),
        ({"cpu_bandwidth": "40GB/s"}, "has what others read in it already"),
        ({"num_speculative_tokens": 3}, "without drafts"),
        ({"tensor_parallel_size": 2}, "one device is supported"),
        ({"model": "nobody/knows"}, "unknown model"),
        ({"hardware": "abacus"}, "unknown hardware"),
        ({"quantization": "int3"}, "unknown"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        study(decode(22.0), serving=replace(SERVING, **change))


BENCH = """\
| model                  |       size |     params | backend | ngl |   test |            t/s |
| ---------------------- | ---------: | ---------: | ------- | --: | -----: | -------------: |
| qwen2 7B Q8_0          |   7.54 GiB |     7.62 B | CUDA    |  99 |   tg32 |   29.43 ± 0.02 |
"""


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"engine": "vllm"}, "is of llama-cpp, and --engine is vllm: give --engine llama-cpp"),
        ({"model": "llama-3.1-8b"}, "is of 'qwen2 7B Q8_0', 7.62 billion parameters, and --model llama-3.1-8b has 8.03"),
        ({"quantization": "q4_0"}, "--quantization is q4_0, and .* says q8_0"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, change: dict[str, str], complaint: str) -> None:
    path = tmp_path / "bench.txt"
    path.write_text(BENCH)
    right = ServingConfig(engine="llama-cpp", model="qwen2.5-7b")
    found = study(serving=right, files=(path,))
    assert found.subject.request.weight_format.name == "q8_0"  # as the file says
    assert fitted(found) == ("weight_read_bytes_per_s",)
    with pytest.raises(ConfigError, match=complaint):
        study(serving=replace(right, **change), files=(path,))


def test_rates_that_contradict_each_other_are_named() -> None:
    with pytest.raises(ConfigError, match=r"a says 22 tokens/s and b 31 for the same work \(decode, batch 1, context 512\)"):
        study(decode(22.0, where="a"), decode(31.0, where="b"))
    assert study(decode(22.0, where="a"), decode(22.6, where="b")).speed is not None
