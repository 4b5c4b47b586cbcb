"""`simulate calibrate`: what measurements identify, the file that comes of it, and what that file makes of a simulation."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from pagedkv.catalogue import load_hardware, load_model
from pagedkv.errors import ConfigError
from pagedkv.sims.calibrate.study import CalibrationStudy, calibrate
from pagedkv.sims.calibration import calibration_for
from pagedkv.sims.cli import main
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.deployment import deploy
from pagedkv.sims.measurements import MeasuredRate
from pagedkv.sims.step_constants import StepConstants, catalogue_constants
from pagedkv.sims.step_time import RooflineStepTime
from pagedkv.sims.validation.points import decode_steps
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


def step_s(serving: ServingConfig, batch: int, context: int) -> float:
    """Seconds of a step that makes a token for each of `batch` sequences, as a simulation prices it."""
    entries = empty_batch(batch)
    entries["num_scheduled_tokens"], entries["num_slots_needed"], entries["num_known_tokens"] = 1, context, context
    return deploy(serving).step_time.cost(entries, batch).total_s


def prefill_s(serving: ServingConfig, prompt: int) -> float:
    return deploy(serving).step_time.prefill_cost(prompt, max_num_batched_tokens=2048).total_s


# --- what is identified -------------------------------------------------------------------------------------------------


def test_one_decode_rate_says_how_fast_weights_are_read_and_nothing_else() -> None:
    found = study(decode(22.0))
    assert fitted(found) == ("weight_read_bytes_per_s",)
    assert found.speed is not None
    assert "hardly depend" in found.speed.found.kept["linear_flops"]
    assert "weight_read_bytes_per_s can change too" in found.speed.found.kept["step_overhead_s"]
    assert found.speed.errors == [pytest.approx(0, abs=1e-3)]
    before = calibration_for(SPARK, "vllm", load_weight_format("fp8"), "auto", model=load_model("llama-3.1-8b")).constants
    assert replace(found.speed.found.constants, weight_read_bytes_per_s=before.weight_read_bytes_per_s) == before


def test_a_prefill_rate_says_how_fast_it_multiplies() -> None:
    assert fitted(study(prefill(5000.0))) == ("linear_flops",)


@pytest.mark.parametrize(
    ("model", "made", "read"), [("gpt-oss-120b", 33.0, 1700.0), ("qwen3-30b-a3b", 33.0, 3000.0), ("qwen3.5-35b-a3b", 28.0, 2500.0)]
)
def test_a_mixture_s_prefill_says_how_fast_it_multiplies_though_reading_hid_it(model: str, made: float, read: float) -> None:
    """A prefill reads all experts, which takes longer than multiplying at the catalogue's rate: a slow one is slow arithmetic."""
    found = study(decode(made), prefill(read), serving=ServingConfig(model=model))
    assert set(fitted(found)) == {"weight_read_bytes_per_s", "linear_flops"}
    assert found.speed is not None
    assert found.speed.errors == [pytest.approx(0, abs=5e-3)] * 2
    assert found.speed.found.constants.weight_read_bytes_per_s > 0.6 * SPARK.read_bandwidth.value


def test_a_large_batch_at_a_long_context_says_how_fast_keys_are_read() -> None:
    assert fitted(study(decode(150.0, batch=64, depth=8192)))[0] == "kv_read_bytes_per_s"


def test_batches_at_one_context_say_what_a_sequence_costs_and_not_how_fast_keys_are_read() -> None:
    rates = [decode(rate, batch=batch) for batch, rate in ((1, 22.0), (8, 160.0), (32, 500.0))]
    assert set(fitted(study(*rates))) == {"weight_read_bytes_per_s", "sequence_overhead_s"}


def test_contexts_at_batch_one_say_how_fast_keys_are_read() -> None:
    rates = [decode(rate, depth=depth) for depth, rate in ((16, 22.5), (32_768, 14.5), (65_536, 10.5))]
    assert set(fitted(study(*rates))) == {"weight_read_bytes_per_s", "kv_read_bytes_per_s"}


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


@given(
    factors=st.fixed_dictionaries(
        {
            "weight_read_bytes_per_s": st.floats(0.75, 1.1),
            "linear_flops": st.floats(0.6, 1.3),
            "kv_read_bytes_per_s": st.floats(0.7, 1.1),
            "sequence_overhead_s": st.floats(0.5, 4.0),
        }
    )
)
@examples(max_examples=12)
def test_constants_that_are_known_are_found_again(factors: dict[str, float]) -> None:
    base = catalogue_constants(SPARK, load_weight_format("fp8"))
    truth = replace(base, **{name: getattr(base, name) * factor for name, factor in factors.items()})
    measured = made_of(truth, SWEEP)
    found = study(*measured)
    assert found.speed is not None
    assert max(map(abs, found.speed.errors)) < 0.02
    for name in set(fitted(found)) & {"weight_read_bytes_per_s", "linear_flops", "kv_read_bytes_per_s"}:
        assert getattr(found.speed.found.constants, name) == pytest.approx(getattr(truth, name), rel=0.08)


def test_a_rate_is_held_at_the_datasheet_and_a_fixed_cost_gives_way() -> None:
    """52 tokens/s of Llama-3.1-8B in NVFP4 read 263 of 273 GB/s; with 3 ms of overhead in each step it would have to be 312."""
    serving = replace(SERVING, quantization="nvfp4")
    found = study(decode(52.0), serving=serving)
    assert found.speed is not None
    assert found.speed.found.at_the_peak == ("weight_read_bytes_per_s",)
    assert found.speed.found.constants.weight_read_bytes_per_s == SPARK.memory_bandwidth.value
    assert fitted(found) == ("step_overhead_s",)
    assert found.speed.errors == [pytest.approx(0, abs=1e-3)]
    assert "datasheet's limit" in " ".join(found.speed.notes)


# --- the file ------------------------------------------------------------------------------------------------------------


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


# --- what is refused -----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("weight_read_bytes_per_s = ", "weight_read_bytes_per_s = -"), r"weights\.fp8\.weight_read_bytes_per_s is -"),
        (("kv_read_bytes_per_s = ", "kv_raed_bytes_per_s = "), r"constants\.kv_read_bytes_per_s is missing"),
        (("overlap = inf", 'overlap = "inf"'), r"constants\.overlap is 'inf': it must be a number"),
        (("attention_flops = 86000000000000.0", "attention_flops = 0"), r"attention_flops is 0: it must be above 0"),
        (('engine = "vllm"', "engine = 3"), r"step_constants\[0\]\.engine is 3: it must be text"),
        (('date = "2026-11-29"\n', ""), r"step_constants\[0\]\.date is missing"),
        (
            ("overlap = inf", "overlap = inf\ngravity = 1.0"),
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


# --- the command ---------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_file_that_simulate_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "my-spark.toml"
    command = ["calibrate", "--tokens-per-s", "22", "--quantization", "fp8", "--output", str(out)]
    main(command)
    shown = capsys.readouterr()
    assert "weight_read_bytes_per_s" in shown.out
    assert "Not validated" in shown.out
    assert f"--hardware {out}" in shown.err
    before = out.read_text()
    with pytest.raises(SystemExit) as refused:
        main(command)
    assert refused.value.code == 2
    assert "exists: give another name, or --force" in capsys.readouterr().err
    main([*command[:2], "23", *command[3:], "--force"])
    assert out.read_text() != before
    capsys.readouterr()
    main(["--hardware", str(out), "--quantization", "fp8", "--users", "1", "--duration", "30s", "--warmup", "0s", "--json", "-"])
    document = json.loads(capsys.readouterr().out)
    assert document["calibration"]["basis"].startswith("vllm on my-spark.toml: a rate given by hand")


def test_the_document_has_everything(capsys: pytest.CaptureFixture[str]) -> None:
    main(["calibrate", "--tokens-per-s", "22", "--prefill-tokens-per-s", "5000", "--quantization", "fp8", "--json", "-"])
    document = json.loads(capsys.readouterr().out)
    speed = document["speed"]
    assert set(speed["fitted"]) == {"weight_read_bytes_per_s", "linear_flops"}
    assert (speed["status"], speed["num_figures"]) == ("not validated", 2)
    assert speed["kept"]["kv_read_bytes_per_s"]["why"]
    assert [round(figure["measured_tok_s"]) for figure in speed["figures"]] == [22, 5000]
    assert 'like = "dgx-spark"' in document["toml"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "nothing to calibrate with"),
        (["--tokens-per-s", "0"], "--tokens-per-s 0 is no rate"),
        (["--tokens-per-s", "nan"], "is no rate"),
        (["--tokens-per-s", "22", "--batch", "0"], "--batch 0: needs 1"),
        (["--context", "100"], "give that too"),
        (["--tokens-per-s", "22", "--prompt", "100"], "--prompt says where --prefill-tokens-per-s"),
        (["--batch", "4"], "give one of them"),
        (["--tokens-per-s", "22", "--output", "mine.json"], "does not end in .toml"),
        (["nowhere.txt"], "cannot be read"),
        (["--measure", "--tokens-per-s", "22"], "measure first"),
    ],
)
def test_a_mistake_ends_with_status_2(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["calibrate", *words])
    assert refused.value.code == 2
    assert complaint in capsys.readouterr().err


# --- published rows ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batched(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Published rows of Qwen2.5-7B in Q8_0 on a Spark, as llama-batched-bench prints them."""
    with (shared_data / "dgx_spark_benchmarks.csv").open(newline="", encoding="utf-8") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if row["model"] == "Qwen2.5-Coder-7B-Q8_0" and row["engine"] == "llama.cpp batched-bench"
        ]
    lines = [
        "llama_batched_bench: n_kv_max = 270336, n_batch = 2048, n_ubatch = 2048, flash_attn = 1, is_pp_shared = 0",
        "",
        "|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |",
        "|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|",
    ]
    for row in rows:
        pp, batch, fast, slow = (
            int(row["prompt_tokens"]),
            int(row["batch"]),
            float(row["prefill_tok_s"]),
            float(row["decode_tok_s"]),
        )
        n_kv, t_pp, t_tg = batch * (pp + 32), batch * pp / fast, batch * 32 / slow
        whole = t_pp + t_tg
        lines.append(
            f"| {pp:5d} | {32:6d} | {batch:4d} | {n_kv:6d} | {t_pp:8.3f} | {fast:8.2f} | {t_tg:8.3f} | {slow:8.2f} "
            f"| {whole:8.3f} | {n_kv / whole:8.2f} |"
        )
    assert len(rows) > 10
    path = tmp_path_factory.mktemp("batched") / "bench.txt"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def qwen() -> ServingConfig:
    return ServingConfig(engine="llama-cpp", model="qwen2.5-coder-7b", quantization="q8_0")


def _cost_of_a_sequence_s(constants: StepConstants, serving: ServingConfig) -> float:
    """What one more sequence with nothing in the cache adds to a step: host work, and arithmetic as far as nothing hides it."""
    deployment = deploy(serving)
    step_time = RooflineStepTime(
        deployment.model,
        deployment.hardware,
        weight_format=deployment.weight_format,
        kv_spec=deployment.model.kv_spec("auto"),
        constants=constants,
    )
    few, many = (next(decode_steps(batch, 1)).batch for batch in (8, 32))
    return (step_time.cost(many, 32).total_s - step_time.cost(few, 8).total_s) / 24


@pytest.mark.parametrize("hardware", ["dgx-spark", "jetson-thor"])
def test_a_published_table_is_fitted_closely_from_any_machine_nearby(batched: Path, qwen: ServingConfig, hardware: str) -> None:
    """From the Spark's own constants and from a machine that has none: what the table says wins."""
    found = study(serving=replace(qwen, hardware=hardware), files=(batched,))
    assert found.speed is not None
    assert float(np.mean(np.abs(found.speed.errors))) < 0.03
    assert set(fitted(found)) >= {"weight_read_bytes_per_s", "linear_flops", "kv_read_bytes_per_s", "sequence_overhead_s"}
    constants = found.speed.found.constants
    assert constants.kv_read_bytes_per_s == pytest.approx(191e9, rel=0.05)
    assert _cost_of_a_sequence_s(constants, qwen) == pytest.approx(0.49e-3, rel=0.2)
    assert found.speed.group["own_spread"].keys() == {"decode", "prefill"}


def test_half_of_a_published_table_foretells_the_other(batched: Path, qwen: ServingConfig, tmp_path: Path) -> None:
    lines = batched.read_text().splitlines()
    head, rows = lines[:4], lines[4:]
    half, rest = tmp_path / "half.txt", tmp_path / "rest.txt"
    half.write_text("\n".join([*head, *rows[::2]]))
    rest.write_text("\n".join([*head, *rows[1::2]]))
    blind = replace(qwen, hardware="jetson-thor")
    machine = written(study(serving=blind, files=(half,)), tmp_path)
    scored, without = (study(serving=replace(qwen, hardware=each), files=(rest,)).speed for each in (machine, "jetson-thor"))
    assert scored is not None
    assert without is not None
    off, blindly = (
        float(
            np.mean(
                [
                    abs(math.log(old / figure.point.measured_tok_s))
                    for old, figure in zip(each.before_tok_s, each.figures, strict=True)
                ]
            )
        )
        for each in (scored, without)
    )
    assert off < 0.04 < blindly


def test_rows_of_several_models_validate_and_say_what_is_left_out(shared_data: Path) -> None:
    serving = ServingConfig(engine="llama-cpp", quantization="q8_0")
    found = study(serving=serving, files=(shared_data / "dgx_spark_benchmarks.csv",))
    assert found.speed is not None
    assert found.speed.doubts == ""
    assert found.speed.group["num_models"] == 2
    reasons = " ".join(each.reason for each in found.left_out)
    for words in ("with q4_0 weights, not q8_0", "of vllm, not of llama-cpp", "of older builds", "verified=no"):
        assert words in reasons


def test_the_screen_shows_rates_whole_and_reasons_once(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["calibrate", str(shared_data / "dgx_spark_benchmarks.csv"), "--engine", "vllm", "--quantization", "fp8"])
    shown = capsys.readouterr().out
    assert shown.startswith("Qwen3.6 27B in fp8 on NVIDIA DGX Spark")  # the model of the rows, not of --model
    assert "decode, batch 10, context 2,112, Qwen3.8-27B (hybrid GDN, dense)" in shown
    assert shown.count("speculative decoding, whose acceptance was not published") == 1
    assert "…" not in shown
    found = study(serving=replace(SERVING, engine="vllm"), files=(shared_data / "dgx_spark_benchmarks.csv",))
    assert found.speed is not None
    assert found.speed.group["kv_cache_dtypes"] == ["fp8"]  # as those rows ran
    assert "a KV cache in fp8, not auto" in found.speed.doubts


def test_two_files_are_fitted_together(batched: Path, qwen: ServingConfig, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(batched.read_text().replace("|   512 |", "|   513 |"))
    found = study(serving=qwen, files=(batched, other))
    assert found.speed is not None
    assert found.speed.group["source"].startswith("bench.txt, other.txt: 72 figures")
