"""The files of a result folder say the same as its summary."""

import csv
import json
import math
from pathlib import Path

import pytest
from result_folders import CLOSED

from pagedkv.sims.cli import main
from pagedkv.sims.export import REQUEST_COLUMNS, to_json
from pagedkv.sims.recording import KV_KINDS
from pagedkv.sims.records import Outcome

pytestmark = pytest.mark.usefixtures("undrawn")


def rows(name: str) -> list[dict[str, str]]:
    with Path(name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_requests_are_one_row_each_and_add_up_to_the_summary() -> None:
    main([*CLOSED, "--out", "r"])
    summary = json.loads(Path("r/summary.json").read_text("utf-8"))
    requests = rows("r/requests.csv")
    assert list(requests[0]) == REQUEST_COLUMNS
    for result in summary["results"]:
        mine = [r for r in requests if r["allocator"] == result["allocator"]]
        for repeat in ("0", "1"):
            numbers = [int(r["request"]) for r in mine if r["repeat"] == repeat]
            assert numbers == list(range(len(numbers)))
        measured = [r for r in mine if r["measured"] == "1"]
        assert [r["measured"] == "1" for r in mine] == [float(r["arrival_s"]) >= 5.0 for r in mine]
        assert len(measured) == result["num_injected"]
        for outcome in Outcome:
            assert sum(r["outcome"] == outcome.name.lower() for r in measured) == result[f"num_{outcome.name.lower()}"]
    for r in requests:
        instants = [r["arrival_s"], r["scheduled_s"], r["first_token_s"], r["last_token_s"]]
        known = [float(t) for t in instants if t]
        assert known == sorted(known)
        assert [bool(t) for t in instants] == sorted((bool(t) for t in instants), reverse=True)
        assert bool(r["first_token_s"]) == (int(r["num_output_tokens"]) > 0)
        assert (r["outcome"] == "finished") == (r["num_output_tokens"] == r["output_tokens"])


def test_the_timeline_tiles_the_run_and_means_the_same() -> None:
    main("--users 9 --think-time 2s --duration 20s --warmup 0 --out r".split())
    summary = json.loads(Path("r/summary.json").read_text("utf-8"))
    for result in summary["results"]:
        mine = [r for r in rows("r/timeline.csv") if r["allocator"] == result["allocator"]]
        seconds = [float(r["observed_s"]) for r in mine]
        assert math.fsum(seconds) == pytest.approx(20.0)
        assert [float(r["start_s"]) for r in mine] == list(range(20))
        for r in mine:
            assert math.fsum(float(r[f"kv_{kind}"]) for kind in KV_KINDS) == pytest.approx(1.0, abs=1e-6)
        for column, expected in (
            ("running", result["running_mean"]),
            ("waiting", result["waiting_mean"]),
            ("kv_tokens", result["kv"]["tokens"]),
        ):
            assert math.fsum(s * float(r[column]) for s, r in zip(seconds, mine, strict=True)) / 20 == pytest.approx(
                expected, abs=1e-8
            )


def test_no_number_that_json_does_not_know() -> None:
    assert json.loads(to_json({"a": [1.5, None, "é"]})) == {"a": [1.5, None, "é"]}
    assert "é" in to_json({"a": "é"})
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not JSON compliant"):
            to_json({"a": value})
    assert json.loads(to_json({"a": 0.1 + 0.2}))["a"] == 0.1 + 0.2
