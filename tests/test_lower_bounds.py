"""A percentile is a lower bound if requests that were cut off could raise it: against trying it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.sims.comparison import comparison
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.lower_bounds import TOLERANCE, raisable
from pagedkv.sims.results import simulate
from pagedkv.sims.scenario import resolve
from pagedkv.sims.statistics import PERCENTILES


@given(st.lists(st.tuples(st.floats(0.1, 100), st.booleans()), min_size=1, max_size=40))
def test_what_waiting_longer_would_raise(requests: list[tuple[float, bool]]) -> None:
    samples, known = np.array([s for s, _ in requests]), np.array([k for _, k in requests])
    longer = np.sort(np.where(known, samples, 1e9))
    found = raisable(samples, known)
    for p in PERCENTILES:
        now = np.percentile(samples, p)
        rank = longer[math.floor(p / 100 * (len(requests) - 1) + 1e-12)]
        assert (p in found) == (rank > now * (1 + TOLERANCE))
    if known.all():
        assert not found
    if not known.any():
        assert found == list(PERCENTILES)


def test_tables_mark_them() -> None:
    """Twenty at once of whom two run: those who wait at the end have no first token yet."""
    config = SimulationConfig(
        load=LoadConfig(users=20, think_time="0s", random_input_len=300, random_output_len=200),
        serving=ServingConfig(hardware="rtx-4090", max_model_len=1024, max_num_seqs=2),
        measurement=MeasurementConfig(duration="20s", warmup="0s", allocator=("paged",)),
    )
    document = simulate(resolve(config)).document()
    (column,) = document["results"]
    assert {"ttft_s.p90", "ttft_s.p99", "e2e_s.p99"} <= set(column["lower_bounds"])
    shown = {row.label: row.values[0] for row in comparison(document) if row.values}
    for label, name in (("TTFT P99, ms", "ttft_s.p99"), ("E2E P50, s", "e2e_s.p50"), ("TTFT P50, ms", "ttft_s.p50")):
        assert shown[label].startswith("≥ ") == (name in column["lower_bounds"])
    assert not shown["ITL P99, ms"].startswith("≥")


def test_repeats_mark_what_any_of_them_marks() -> None:
    from pagedkv.sims.results import combine  # noqa: PLC0415

    latencies = dict.fromkeys(("ttft_s", "tpot_s", "itl_s", "e2e_s"))
    runs = [latencies | {"lower_bounds": names} for names in (["e2e_s.p99"], [], ["e2e_s.p90", "e2e_s.p99"])]
    assert combine(runs)["lower_bounds"] == ["e2e_s.p90", "e2e_s.p99"]
    assert combine([latencies | {"lower_bounds": []}] * 2)["lower_bounds"] == pytest.approx([])
