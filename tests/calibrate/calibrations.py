"""A calibration from rates that are made up."""

from dataclasses import replace
from pathlib import Path

from pagedkv.catalogue import load_hardware, load_model
from pagedkv.sims.calibrate.study import CalibrationStudy, calibrate
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.measurements import MeasuredRate
from pagedkv.sims.step_constants import StepConstants
from pagedkv.sims.step_time import RooflineStepTime
from pagedkv.step_batch import empty_batch
from pagedkv.weight_format import load_weight_format

DATE = "2026-11-29"
SPARK = load_hardware("dgx-spark")
SERVING = ServingConfig(model="llama-3.1-8b", quantization="fp8")


def decode(rate: float, *, batch: int = 1, depth: int = 512, where: str = "mine") -> MeasuredRate:
    return MeasuredRate(where=where, kind="decode", batch=batch, depth=depth, tokens_per_s=rate)


def prefill(rate: float, *, prompt: int = 2048, where: str = "mine") -> MeasuredRate:
    return MeasuredRate(where=where, kind="prefill", batch=1, prompt_tokens=prompt, tokens_per_s=rate)


def study(*rates: MeasuredRate, serving: ServingConfig = SERVING, files: tuple[Path, ...] = ()) -> CalibrationStudy:
    return calibrate(serving, files, rates, date=DATE, name="mine.toml")


def fitted(found: CalibrationStudy) -> tuple[str, ...]:
    assert found.speed is not None
    return found.speed.found.fitted


def written(found: CalibrationStudy, folder: Path) -> str:
    path = folder / "mine.toml"
    path.write_text(found.toml(), encoding="utf-8")
    return str(path)


def made_of(constants: StepConstants, rates: list[MeasuredRate]) -> list[MeasuredRate]:
    """The same work as a machine with these constants would have measured it."""
    model = load_model("llama-3.1-8b")
    step_time = RooflineStepTime(
        model, SPARK, weight_format=load_weight_format("fp8"), kv_spec=model.kv_spec("auto"), constants=constants
    )
    measured = []
    for rate in rates:
        if rate.kind == "prefill":
            seconds = step_time.prefill_cost(rate.prompt_tokens, max_num_batched_tokens=2048).total_s
            measured.append(replace(rate, tokens_per_s=rate.prompt_tokens / seconds))
        else:
            entries = empty_batch(rate.batch)
            entries["num_scheduled_tokens"], entries["num_slots_needed"], entries["num_known_tokens"] = 1, rate.depth, rate.depth
            measured.append(replace(rate, tokens_per_s=rate.batch / step_time.cost(entries, rate.batch).total_s))
    return measured


SWEEP = [decode(1, batch=batch, depth=depth) for batch in (1, 8, 32) for depth in (512, 8192)] + [
    prefill(1, prompt=prompt) for prompt in (1024, 8192)
]
