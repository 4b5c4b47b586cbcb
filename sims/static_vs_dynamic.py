"""Ten cases on a DGX Spark: what a formula claims, and what people get.

`python -m pagedkv.sims.static_vs_dynamic` prints the table of docs/static-vs-dynamic.md.
"""

import sys

from pagedkv.sims.config import ATTAIN, LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.deployment import deploy
from pagedkv.sims.fit import fit
from pagedkv.sims.max_users import max_users

GOALS = ("ttft:5000", "tpot:200")
CASES = (
    ServingConfig(),
    ServingConfig(max_model_len=131_072),
    ServingConfig(quantization="fp8"),
    ServingConfig(quantization="nvfp4", kv_cache_dtype="fp8"),
    ServingConfig(model="qwen2.5-7b", quantization="fp8"),
    ServingConfig(model="llama-3.1-70b", quantization="nvfp4"),
    ServingConfig(model="llama-3.1-70b", quantization="nvfp4", kv_cache_dtype="fp8", max_model_len=8192),
    ServingConfig(model="qwen3-30b-a3b", quantization="fp8"),
    ServingConfig(model="gpt-oss-120b", max_model_len=131_072),
    ServingConfig(model="llama-2-7b", max_model_len=4096),
)


def rows() -> list[tuple[str, ...]]:
    """Return the cells of the table, one tuple per case."""
    table: list[tuple[str, ...]] = []
    for serving in CASES:
        deployment = deploy(serving)
        static = fit(deployment)
        config = SimulationConfig(
            load=LoadConfig(over_length="drop"),
            serving=serving,
            measurement=MeasurementConfig(goodput=GOALS, duration="300s"),
        )
        paged, contiguous = (max_users(config, name, attain=ATTAIN).value for name in (deployment.own_allocator, "contiguous-max"))
        what = f"{deployment.model.name}, {deployment.weight_format.name}, KV {serving.kv_cache_dtype}"
        table.append(
            (
                what,
                f"{deployment.scheduler.max_model_len:,}",
                f"{static.kv_tokens:,}",
                f"{static.formula_users:.1f}",
                str(static.rows[-1].contiguous_max),
                str(paged),
                str(contiguous),
            )
        )
        print(f"{what}: {table[-1][3:]}", file=sys.stderr)  # noqa: T201
    return table


def markdown() -> str:
    """Return the table."""
    head = ("case", "max-model-len", "KV tokens", "formula: users", "contiguous: at once", "blocks: people", "contiguous: people")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows())]) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")  # noqa: T201
