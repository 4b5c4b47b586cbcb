"""Figures that no machine can reach: flagged, never fitted."""

from collections.abc import Sequence

import numpy as np

from pagedkv.hardware_spec import HardwareSpec
from pagedkv.readable_formats import ENGINE_CONTAINERS
from pagedkv.sims.step_constants import catalogue_constants
from pagedkv.sims.step_time import coefficients
from pagedkv.sims.validation.benchmark_rows import BenchmarkRow
from pagedkv.sims.validation.points import NotCompared, Point, points_of
from pagedkv.weight_format import WEIGHT_FORMATS, WeightFormat

_WIDER = {"fp4": ("fp4", "fp8", "bf16"), "fp8": ("fp8", "bf16"), "bf16": ("bf16",), "fp32": ("bf16",)}
_INT8_FACTOR = 2.0
"""Kernels that multiply 8-bit integers reach twice the 16-bit rate: llama.cpp's do."""


def highest_flops(hardware: HardwareSpec, fmt: WeightFormat) -> float:
    """Return the most operations a second that the datasheet lets any kernel reach with weights in `fmt`."""
    peak = max(hardware.spec_flops[dtype].value for dtype in _WIDER[fmt.compute_dtype] if dtype in hardware.spec_flops)
    return peak * (_INT8_FACTOR if fmt.compute_dtype == "bf16" and fmt.bits_per_weight <= 9 else 1.0)


def impossible(point: Point, hardware: HardwareSpec) -> str | None:
    """Return why a figure cannot be: it needs more than the datasheet's bandwidth or arithmetic; None: it can.

    Of a mixture's experts only those of one token count as read, so that nothing believable is flagged.
    """
    model, fmt = point.subject.model, point.subject.weight_format
    prior = catalogue_constants(hardware, fmt)
    unit = coefficients(model, weight_format=fmt, kv_spec=model.kv_spec(point.kv_cache_dtype), constants=prior)
    seconds = point.tokens / point.measured_tok_s
    num_steps = sum(steps.count for steps in point.steps)
    read = (unit.dense_weight_s + unit.expert_weight_s * unit.expert_share) * prior.weight_read_bytes_per_s
    kv_per_token = np.array(unit.kv_s_per_token) * prior.kv_read_bytes_per_s
    for steps in point.steps:
        for entry in steps.batch:
            before = np.minimum(unit.windows, entry["num_slots_needed"] - entry["num_scheduled_tokens"])
            read += steps.count / num_steps * float((kv_per_token * before).sum())
    bandwidth = num_steps * read / seconds
    if bandwidth > hardware.memory_bandwidth.value:
        return (
            f"impossible: {point.measured_tok_s:,.5g} {point.kind} tokens/s would read {bandwidth / 1e9:,.0f} GB/s, more than the "
            f"{hardware.memory_bandwidth.value / 1e9:,.0f} GB/s of {hardware.name}{_with_other_weights(point, read, hardware)}"
        )
    new = sum(steps.count * int(steps.batch["num_scheduled_tokens"].sum()) for steps in point.steps)
    flops = new * unit.linear_s_per_token * prior.linear_flops / seconds
    peak = highest_flops(hardware, fmt)
    if flops > peak:
        return (
            f"impossible: {point.measured_tok_s:,.5g} {point.kind} tokens/s would compute {flops / 1e12:,.0f} TFLOPS, more than "
            f"the {peak / 1e12:,.0f} of {hardware.name} with {fmt.name} weights"
        )
    return None


def _with_other_weights(point: Point, read: float, hardware: HardwareSpec) -> str:
    """Return what of the bytes that a step must `read` is assumed of the weight format, and which formats would need less."""
    model, fmt = point.subject.model, point.subject.weight_format
    dense = model.dense_streamed_bytes(fmt)
    dense_bits = fmt.dense_bits if model.num_experts and fmt.dense_bits is not None else fmt.bits_per_weight
    head_bits = fmt.wide_bits if fmt.head_bits is None else fmt.head_bits
    beside = "linear layers beside the experts" if model.num_experts else "linear layers"
    limit = hardware.memory_bandwidth.value * point.tokens / point.measured_tok_s / sum(steps.count for steps in point.steps)
    used = model.experts_per_token / model.num_experts if model.num_experts else 0.0

    def reads(other: WeightFormat) -> float:
        return read - dense - used * model.expert_bytes(fmt) + model.dense_streamed_bytes(other) + used * model.expert_bytes(other)

    readable = ENGINE_CONTAINERS.get(point.engine, ("any", "safetensors"))
    known = [other for other in WEIGHT_FORMATS.values() if other.container in readable]
    alike = [other for other in known if other.bits_per_weight <= fmt.bits_per_weight and reads(other) <= limit]
    fitting = sorted(alike, key=lambda other: (other.bits_per_weight != fmt.bits_per_weight, -reads(other)))[:3]
    would = f"it could be of weights in {', '.join(other.name for other in fitting)}" if fitting else "no format makes it possible"
    parts = f"{beside} in {dense_bits:g} bits and the output head in {head_bits:g}, {dense / 1e9:,.2f} GB a step"
    return f": {fmt.name} has {parts}; {would}"


def believable(rows: Sequence[BenchmarkRow], hardware: HardwareSpec) -> tuple[list[Point], list[NotCompared]]:
    """Return the figures of `rows` that can be compared, and those that cannot, such as what no machine of this kind reaches."""
    points, not_compared = points_of(rows)
    believed: list[Point] = []
    for point in points:
        reason = impossible(point, hardware)
        if reason is None:
            believed.append(point)
        else:
            not_compared.append(NotCompared(row=point.row, kind=point.kind, reason=reason))
    return believed, not_compared
