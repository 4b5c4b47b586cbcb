"""The processor's own work, which takes bandwidth from a GPU on the same memory."""

import pytest

from pagedkv.catalogue import load_hardware
from pagedkv.errors import ConfigError
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.deployment import Deployment, deploy


def deployed(engine: str, quantization: str, work: str | None) -> Deployment:
    context = 4096 if engine == "llama-cpp" else None
    return deploy(ServingConfig(engine=engine, model="qwen2.5-7b", quantization=quantization, ctx_size=context, cpu_bandwidth=work))


@pytest.mark.parametrize(
    ("engine", "quantization", "basis"),
    [("vllm", "int8", "the catalogue"), ("vllm", "bf16", "vllm on"), ("llama-cpp", "q8_0", "llama-cpp on")],
)
def test_work_of_the_processor_slows_decoding_by_its_share(engine: str, quantization: str, basis: str) -> None:
    alone, beside = (deployed(engine, quantization, work) for work in (None, "58GB/s"))
    assert alone.calibration.basis.startswith(basis), "with the catalogue's constants, and with fitted ones"
    share = 1 - 58 / 232
    before, after = (one.step_time.coefficients.model for one in (alone, beside))
    assert before.dense_weight_s == pytest.approx(share * after.dense_weight_s)
    assert before.kv_s_per_token.tolist() == pytest.approx((share * after.kv_s_per_token).tolist())
    assert before.linear_s_per_token == after.linear_s_per_token, "arithmetic is the GPU's own"
    assert after.step_overhead_s == before.step_overhead_s
    assert alone.budget == beside.budget
    assert "58 GB/s of CPU work" in beside.hardware.title


@pytest.mark.parametrize(
    ("work", "hardware", "message"),
    [
        ("40GB/s", "rtx-4090", "has memory of its own"),
        ("232GB/s", "dgx-spark", "leaves the GPU nothing of the 232 GB/s"),
        ("much", "dgx-spark", "write a bandwidth"),
    ],
)
def test_work_that_cannot_be_is_refused(work: str, hardware: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        deploy(ServingConfig(hardware=hardware, cpu_bandwidth=work))


def test_no_work_is_no_setting() -> None:
    assert deploy(ServingConfig(cpu_bandwidth="0 GB/s")).config == ServingConfig()
    assert load_hardware("dgx-spark").beside_cpu_work(0.0) == load_hardware("dgx-spark")
