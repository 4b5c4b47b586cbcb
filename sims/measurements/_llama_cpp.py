"""What llama.cpp's two benchmarks have in common: a test by its name, weight types by the names of its model types."""

import re

from pagedkv.errors import ConfigError
from pagedkv.sims.measurements import MeasuredRate
from pagedkv.weight_format import WEIGHT_FORMATS

_TYPES = {
    "mxfp4 moe": "mxfp4+q8_0",
    "q4_k - medium": "q4_k_m",
    "q5_k - medium": "q5_k_m",
    "q6_k": "q6_k",
    "f16": "fp16",
    "f32": "fp32",
}
_TEST = re.compile(r"(?:pp(?P<prompt>\d+))?\+?(?:tg(?P<output>\d+))?(?:\s*@\s*d(?P<depth>\d+))?")


def weights_of(model_type: str) -> str | None:
    """Return the weight format that a model type such as "llama 8B Q4_K - Medium" names; None if it has none that is known."""
    words = model_type.lower()
    for ending, name in _TYPES.items():
        if f" {words}".endswith(f" {ending}"):
            return name
    last = words.rpartition(" ")[2]
    return last if last in WEIGHT_FORMATS else None


def rate_of_test(
    where: str, *, prompt: int, output: int, depth: int, tokens_per_s: float, batch: int = 1, chunk: int | None = None
) -> MeasuredRate:
    """Return the rate of a test that computes `prompt` tokens, or makes `output` tokens, behind `depth` cached ones; or both.

    Raises:
        ConfigError: If it does neither.
    """
    if not prompt and not output:
        raise ConfigError(f"{where}: a test of neither prompt nor generated tokens; needs one such as pp512 or tg128")
    if prompt and output:
        # llama-bench counts prompt tokens and generated ones together.
        tokens_per_s *= output / (prompt + output)
        return MeasuredRate(
            where=where,
            kind="run",
            batch=batch,
            prompt_tokens=prompt,
            depth=depth,
            output_tokens=output,
            tokens_per_s=tokens_per_s,
            chunk_tokens=chunk,
        )
    if prompt:
        return MeasuredRate(
            where=where,
            kind="prefill",
            batch=batch,
            prompt_tokens=prompt,
            depth=depth,
            tokens_per_s=tokens_per_s,
            chunk_tokens=chunk,
        )
    return MeasuredRate(where=where, kind="decode", batch=batch, depth=depth + output // 2, tokens_per_s=tokens_per_s)


def test_lengths(name: str, where: str) -> tuple[int, int, int]:
    """Return (prompt, output, depth) of a test such as "pp512", "tg128 @ d4096" or "pp512+tg128".

    Raises:
        ConfigError: If it is none.
    """
    match = _TEST.fullmatch(name.strip())
    if match is None or not (match["prompt"] or match["output"]):
        raise ConfigError(f"{where}: test is {name!r}; needs one such as pp512, tg128 or tg32 @ d4096")
    return int(match["prompt"] or 0), int(match["output"] or 0), int(match["depth"] or 0)
