"""`simulate calibrate`: the hardware file that comes of it, and what it makes of a simulation."""

from dataclasses import replace
from pathlib import Path

import pytest
from calibrations import DATE, SERVING, SPARK, SWEEP, decode, made_of, prefill, study, written

from pagedkv.catalogue import load_hardware, load_model
from pagedkv.errors import ConfigError
from pagedkv.sims.calibration import calibration_for
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.deployment import deploy
from pagedkv.sims.step_constants import catalogue_constants
from pagedkv.step_batch import empty_batch
from pagedkv.weight_format import load_weight_format


def step_s(serving: ServingConfig, batch: int, context: int) -> float:
    """Seconds of a step that makes a token for each of `batch` sequences, as a simulation prices it."""
    entries = empty_batch(batch)
    entries["num_scheduled_tokens"], entries["num_slots_needed"], entries["num_known_tokens"] = 1, context, context
    return deploy(serving).step_time.cost(entries, batch).total_s


def prefill_s(serving: ServingConfig, prompt: int) -> float:
    return deploy(serving).step_time.prefill_cost(prompt, max_num_batched_tokens=2048).total_s


def test_a_calibrated_machine_reproduces_what_was_measured(tmp_path: Path) -> None:
    rates = [decode(22.0), decode(450.0, batch=32, depth=1024), prefill(5200.0)]
    machine = written(study(*rates), tmp_path)
    mine = replace(SERVING, hardware=machine)
    assert 1 / step_s(mine, 1, 512) == pytest.approx(22.0, rel=2e-3)
    assert 32 / step_s(mine, 32, 1024) == pytest.approx(450.0, rel=2e-3)
    assert 2048 / prefill_s(mine, 2048) == pytest.approx(5200.0, rel=2e-3)
    assert 1 / step_s(SERVING, 1, 512) != pytest.approx(22.0, rel=0.05)


def test_eager_steps_are_calibrated_as_they_will_be_simulated(tmp_path: Path) -> None:
    eager = replace(SERVING, enforce_eager=True)
    machine = written(study(decode(20.0), serving=eager), tmp_path)
    assert 1 / step_s(replace(eager, hardware=machine), 1, 512) == pytest.approx(20.0, rel=2e-3)
    assert 1 / step_s(replace(SERVING, hardware=machine), 1, 512) > 20.4


def test_the_file_is_like_its_machine_in_all_that_was_not_measured(tmp_path: Path) -> None:
    machine = load_hardware(written(study(decode(22.0)), tmp_path))
    assert machine.like == "dgx-spark"
    assert dict(machine.figures()) == dict(SPARK.figures())
    for engine, weights in (("llama-cpp", "q8_0"), ("vllm", "nvfp4"), ("sglang", "fp8")):
        fmt = load_weight_format(weights)
        ours, theirs = (calibration_for(each, engine, fmt, "auto", model=load_model("llama-3.1-8b")) for each in (machine, SPARK))
        assert ours == theirs


def test_the_answer_says_what_it_rests_on(tmp_path: Path) -> None:
    machine = load_hardware(written(study(decode(22.0)), tmp_path))
    found = calibration_for(machine, "vllm", load_weight_format("fp8"), "auto", model=load_model("llama-3.1-8b"))
    assert found.status == "not validated"
    assert "vllm on mine.toml: a rate given by hand: 1 figure of llama-3.1-8b" in found.basis
    assert "1 figure, needs 4 for 1 constant" in found.why
    assert "of a single model" in found.why
    assert (found.num_figures, found.num_models, found.date) == (1, 1, DATE)


def test_many_figures_of_a_model_make_its_interval_narrower_and_no_other_models(tmp_path: Path) -> None:
    base = catalogue_constants(SPARK, load_weight_format("fp8"))
    machine = load_hardware(written(study(*made_of(replace(base, sequence_overhead_s=2e-4), SWEEP)), tmp_path))
    fmt = load_weight_format("fp8")
    mine, other = (calibration_for(machine, "vllm", fmt, "auto", model=load_model(name)) for name in ("llama-3.1-8b", "qwen3-8b"))
    spark = calibration_for(SPARK, "vllm", fmt, "auto", model=load_model("llama-3.1-8b"))
    assert mine.decode_spread == pytest.approx(0.05, abs=0.02)
    assert mine.decode_spread < spark.decode_spread == pytest.approx(other.decode_spread, rel=1e-3)


def test_a_second_calibration_keeps_the_first(tmp_path: Path) -> None:
    first = written(study(decode(22.0)), tmp_path)
    nvfp4 = ServingConfig(model="llama-3.1-8b", quantization="nvfp4", hardware=first)
    second = load_hardware(written(study(decode(38.0), serving=nvfp4), tmp_path))
    assert [sorted(group["weights"]) for group in second.step_constants] == [["fp8"], ["nvfp4"]]
    again = load_hardware(written(study(decode(21.0), serving=replace(SERVING, hardware=first)), tmp_path))
    assert [sorted(group["weights"]) for group in again.step_constants] == [["nvfp4"], ["fp8"]]
    assert 1 / step_s(replace(SERVING, hardware=first), 1, 512) == pytest.approx(21.0, rel=2e-3)
    assert again.like == "dgx-spark"


def test_a_machine_of_ones_own_keeps_its_figures(tmp_path: Path) -> None:
    box = tmp_path / "box.toml"
    box.write_text(
        'memory_kind = "discrete"\nvisible = "47.40 GiB"\nmemory_bandwidth = "960 GB/s"\nspec_flops.bf16 = "182 TFLOPS"\n'
        'title = "A \\"box\\""\nread_bandwidth = { value = "871 GB/s", tag = "measured", source = "copy kernel" }\n'
    )
    machine = load_hardware(written(study(decode(60.0), serving=replace(SERVING, hardware=str(box))), tmp_path))
    for (label, ours), (_, theirs) in zip(machine.figures(), load_hardware(str(box)).figures(), strict=True):
        assert (ours.tag, ours.source) == (theirs.tag, theirs.source), label
        assert ours.value == pytest.approx(theirs.value), label
    assert (machine.like, machine.title) == ("", 'A "box"')


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("weight_read_bytes_per_s = ", "weight_read_bytes_per_s = -"), r"weights\.fp8\.weight_read_bytes_per_s is -"),
        (("kv_read_bytes_per_s = ", "kv_raed_bytes_per_s = "), r"constants\.kv_read_bytes_per_s is missing"),
        (("overlap = ", 'overlap = "inf"  # '), r"constants\.overlap is 'inf': it must be a number"),
        (("attention_flops = ", "attention_flops = 0  # "), r"attention_flops is 0: it must be above 0"),
        (('engine = "vllm"', "engine = 3"), r"step_constants\[0\]\.engine is 3: it must be text"),
        (('date = "2026-11-29"\n', ""), r"step_constants\[0\]\.date is missing"),
        (
            ("overlap = ", "gravity = 1.0\noverlap = "),
            r"unknown constant 'mine\.toml\.step_constants\[0\]\.constants\.gravity'",
        ),
    ],
)
def test_a_file_with_a_broken_group_is_refused_with_its_place(tmp_path: Path, change: tuple[str, str], complaint: str) -> None:
    path = Path(written(study(decode(22.0)), tmp_path))
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change, 1))
    with pytest.raises(ConfigError, match=complaint):
        deploy(replace(SERVING, hardware=str(path)))


def test_a_file_that_is_like_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    for text, complaint in (
        ('like = "dgx-sparc"', "unknown hardware 'dgx-sparc': did you mean dgx-spark"),
        ('like = "other.toml"', "must be the name of a machine of the catalogue"),
        ("like = 3", "must be the name of a machine"),
        ('like = "dgx-spark"\nstep_constants = 3', "must be tables, each headed"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=complaint):
            load_hardware(str(path))
    path.write_text('[mine]\nlike = "h100-80gb"\nread_bandwidth = "3000 GB/s"')
    machine = load_hardware(str(path))
    assert (machine.like, machine.read_bandwidth.value, machine.title) == ("h100", 3e12, load_hardware("h100").title)
