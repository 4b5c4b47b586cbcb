"""`simulate calibrate --measure`: a hardware file from what a processor or a GPU was measured to reach."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagedkv.catalogue import hardware_names, load_hardware
from pagedkv.errors import ConfigError
from pagedkv.kernels import cpu_rates
from pagedkv.kernels.contract import KernelError
from pagedkv.kernels.cpu_rates import ROWS, WIDTH, copy_all, matrix_product, measure_cpu, memory_bytes, read_all
from pagedkv.kernels.machine_rates import MachineRates, Samples
from pagedkv.sims import cli_calibrate
from pagedkv.sims.calibrate.machine import MeasuredDevice, ReachedRate, known_machine, measured_machine
from pagedkv.sims.cli import main
from pagedkv.units import GIB

DATE = "2026-11-29"


def rate(what: str, value: float) -> ReachedRate:
    return ReachedRate(what=what, value=value, low=0.95 * value, high=1.02 * value, num_samples=7)


def device(name: str = "A processor", *, kind: Any = "cpu", memory_bytes: int | None = 64 * GIB) -> MeasuredDevice:
    return MeasuredDevice(
        name=name,
        kind=kind,
        memory_bytes=memory_bytes,
        available_bytes=60 * GIB,
        read=rate("reading", 80e9),
        copy=rate("copying", 70e9),
        kv_read=rate("keys", 60e9),
        product=rate("a product", 2e12),
    )


def loaded(tmp_path: Path, measured: MeasuredDevice) -> Any:
    path = tmp_path / "mine.toml"
    path.write_text(measured_machine([measured], date=DATE, name="mine.toml").toml(), encoding="utf-8")
    return load_hardware(str(path))


def test_a_processor_becomes_a_machine_with_its_own_figures(tmp_path: Path) -> None:
    machine = loaded(tmp_path, device())
    assert (machine.title, machine.memory_kind, machine.visible_bytes) == ("A processor", "unified", 64 * GIB)
    assert machine.read_bandwidth.value == pytest.approx(80e9)
    assert machine.kv_read_bandwidth.value == pytest.approx(60e9)
    assert machine.reached_flops["bf16"].value == pytest.approx(2e12)
    assert machine.os_reserve.value == 4 * GIB
    assert machine.memory_bandwidth.value == pytest.approx(1.02 * 80e9)  # no datasheet: the most that was seen
    for figure in (machine.read_bandwidth, machine.kv_read_bandwidth, machine.reached_flops["bf16"], machine.visible):
        assert figure.tag == "measured"
        assert f"A processor, {DATE}" in figure.source
    assert "median of 7, 95% to 102% of it" in machine.read_bandwidth.source
    assert machine.engine_overhead.tag == "estimated"


@pytest.mark.parametrize(
    ("name", "memory_gib", "like"),
    [
        ("NVIDIA GB10", 121.69, "dgx-spark"),
        ("NVIDIA GeForce RTX 4090", 23.52, "rtx-4090"),
        ("NVIDIA H100 80GB HBM3", 79.18, "h100"),
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA A100-SXM4-40GB", 39.39, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 79.25, "a100-80gb"),
        ("NVIDIA L40S", 44.4, "l40s"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 94.97, "rtx-pro-6000"),
        ("NVIDIA GeForce RTX 4090", 47.0, None),  # another card of that name
        ("NVIDIA GeForce GTX 1080", 7.9, None),
    ],
)
def test_a_gpu_is_known_by_name_and_memory(name: str, memory_gib: float, like: str | None) -> None:
    found = known_machine(device(name, kind="cuda", memory_bytes=round(memory_gib * GIB)))
    assert (None if found is None else found.name) == like
    assert like is None or like in hardware_names()


def test_a_known_gpu_keeps_what_was_not_measured(tmp_path: Path) -> None:
    machine, spark = (
        loaded(tmp_path, device("NVIDIA GB10", kind="cuda", memory_bytes=round(121.69 * GIB))),
        load_hardware("dgx-spark"),
    )
    assert machine.like == "dgx-spark"
    assert machine.read_bandwidth.value == pytest.approx(80e9)
    assert machine.reached_flops["bf16"].value == pytest.approx(2e12)
    assert machine.reached_flops["fp8"] == spark.reached_flops["fp8"]
    assert (machine.memory_bandwidth, machine.os_reserve) == (spark.memory_bandwidth, spark.os_reserve)


def test_an_unknown_gpu_is_a_discrete_machine(tmp_path: Path) -> None:
    machine = loaded(tmp_path, device("NVIDIA GeForce GTX 1080", kind="cuda", memory_bytes=8 * GIB))
    assert (machine.memory_kind, machine.like, machine.os_reserve.value) == ("discrete", "", 0)


def test_samples_far_apart_are_told() -> None:
    noisy = MeasuredDevice(
        name="A processor",
        kind="cpu",
        memory_bytes=GIB * 64,
        available_bytes=None,
        read=ReachedRate(what="reading", value=80e9, low=40e9, high=90e9, num_samples=7),
        copy=rate("copying", 70e9),
        kv_read=rate("keys", 60e9),
        product=rate("a product", 2e12),
    )
    assert any("up to 62% apart" in note for note in measured_machine([noisy], date=DATE, name="x.toml").notes)
    assert not any("apart" in note for note in measured_machine([device()], date=DATE, name="x.toml").notes)


def test_a_machine_of_unknown_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match="nobody says how much memory"):
        measured_machine([device(memory_bytes=None)], date=DATE, name="x.toml")


# --- the kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 256, 300, 700])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 3)])
def test_the_product_is_numpys(rows: int, columns: int, depth: int) -> None:
    rng = np.random.default_rng(depth)
    a = rng.standard_normal((rows * ROWS, depth)).astype(np.float32)
    b = rng.standard_normal((depth, columns * WIDTH)).astype(np.float32)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    assert np.abs(matrix_product(a, b) - exact).max() < 1e-5 * np.abs(a).sum(axis=1).max() * np.abs(b).max()


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(KernelError, match="do not go together"):
        matrix_product(np.zeros((ROWS, 4), np.float32), np.zeros((5, WIDTH), np.float32))
    with pytest.raises(KernelError, match="7 rows"):
        matrix_product(np.zeros((7, 4), np.float32), np.zeros((4, WIDTH), np.float32))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_reading_and_copying_cover_every_thread_s_share(threads: int) -> None:
    source = np.arange(threads * 4 * WIDTH * 5, dtype=np.float32)
    target = np.zeros_like(source)
    assert read_all(source, threads) == pytest.approx(source.sum(dtype=np.float64), rel=1e-5)
    copy_all(source, target, threads)
    assert np.array_equal(source, target)


def test_the_processor_is_measured() -> None:
    found = measure_cpu(num_bytes=1 << 20, size=48, context=64, rounds=2)
    assert found.kind == "cpu"
    for samples in (found.read, found.copy, found.kv_read, found.product, *found.others.values()):
        assert len(samples.values) == 2
        assert 0 < samples.low <= samples.median <= samples.high
    assert found.product.median >= max(samples.median for samples in found.others.values())
    total, available = memory_bytes()
    assert total is None or (total > 0 and (available is None or 0 < available <= total))


# --- the command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without torch, measured in a moment."""
    whole = measure_cpu
    monkeypatch.setattr(cpu_rates, "measure_cpu", lambda: whole(num_bytes=1 << 20, size=48, context=64, rounds=2))
    monkeypatch.setattr(cli_calibrate, "find_spec", lambda name: None)


@pytest.mark.usefixtures("quick")
def test_without_torch_the_processor_is_measured_and_the_rest_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "here.toml"
    main(["calibrate", "--measure", "--output", str(out)])
    shown = capsys.readouterr()
    assert "pip install 'pagedkv[kernels]'" in shown.out
    assert "GB/s  reading memory" in shown.out
    assert load_hardware(str(out)).memory_kind == "unified"
    main(["calibrate", "--measure", "--device", "cpu", "--json", "-"])
    document = json.loads(capsys.readouterr().out)
    assert [each["kind"] for each in document["devices"]] == ["cpu"]
    assert not any("torch" in note for note in document["notes"])


@pytest.mark.usefixtures("quick")
def test_a_gpu_that_cannot_be_measured_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["calibrate", "--measure", "--device", "cuda"])
    assert refused.value.code == 2
    assert "pip install 'pagedkv[kernels]'; --device cpu measures the processor" in capsys.readouterr().err


def fake_gpu() -> MachineRates:
    one = Samples(values=(200e9, 210e9, 205e9))
    return MachineRates(
        device="NVIDIA GB10",
        kind="cuda",
        threads=None,
        memory_bytes=round(121.69 * GIB),
        available_bytes=None,
        read=one,
        copy=one,
        kv_read=one,
        product=Samples(values=(90e12, 91e12, 92e12)),
        product_by="torch.matmul of bf16",
    )


@pytest.mark.usefixtures("quick")
def test_a_gpu_that_is_there_is_what_the_file_is_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_calibrate, "_gpu", lambda device: (fake_gpu, []))
    out = tmp_path / "spark.toml"
    main(["calibrate", "--measure", "--output", str(out), "--json", "-"])
    document = json.loads(capsys.readouterr().out)
    assert [each["kind"] for each in document["devices"]] == ["cuda", "cpu"]
    machine = load_hardware(str(out))
    assert (machine.like, machine.read_bandwidth.value) == ("dgx-spark", 205e9)
    assert machine.reached_flops["bf16"].source.startswith("torch.matmul of bf16, NVIDIA GB10")
    main(["--hardware", str(out), "--users", "1", "--duration", "30s", "--warmup", "0s", "--allocator", "paged"])
    assert "spark.toml" in capsys.readouterr().out


def test_a_gpu_whose_memory_is_taken_is_an_error_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full() -> MachineRates:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(cli_calibrate, "_gpu", lambda device: (full, []))
    with pytest.raises(SystemExit) as refused:
        main(["calibrate", "--measure", "--device", "cuda"])
    assert refused.value.code == 2
    assert "cannot measure the GPU: CUDA out of memory" in capsys.readouterr().err
