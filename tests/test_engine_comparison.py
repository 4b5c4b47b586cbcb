"""Several engines in one command: a column each, the same load, and the reasons."""

import json
from pathlib import Path

import pytest

from pagedkv.sims.cli import main

LOAD = [
    "--users",
    "5",
    "--think-time",
    "2s",
    "--random-input-len",
    "200",
    "--random-output-len",
    "20",
    "--duration",
    "20s",
    "--warmup",
    "0s",
]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    main([*LOAD, *words])
    done = capsys.readouterr()
    return done.out, done.err


def test_each_engine_is_a_column_with_its_budget_and_its_rules(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "--engine", "sglang,vllm,orca,llama-cpp", "--json", "-")
    document = json.loads(out)
    names = [(column["engine"], column["allocator"]) for column in document["results"]]
    assert names == [
        ("sglang", "radix"),
        ("vllm", "paged"),
        ("orca", "contiguous-max"),
        ("orca", "contiguous-pow2"),
        ("orca", "contiguous-oracle"),
        ("llama-cpp", "llama-cpp-unified"),
    ]
    assert (
        list(document["budgets"]) == list(document["rules"]) == list(document["configs"]) == ["sglang", "vllm", "orca", "llama-cpp"]
    )
    assert document["refused"] == {}


def test_a_column_is_what_the_engine_alone_comes_to(capsys: pytest.CaptureFixture[str]) -> None:
    both = json.loads(run(capsys, "--engine", "vllm,tensorrt-llm", "--json", "-")[0])["results"]
    alone = [json.loads(run(capsys, "--engine", name, "--json", "-")[0])["results"][0] for name in ("vllm", "tensorrt-llm")]
    for column, other in zip(both, alone, strict=True):
        assert {**column, "verdict": None} == {**other, "verdict": None}


def test_an_engine_that_does_not_start_says_why_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "--engine", "vllm,llama-cpp", "--ctx-size", "1000000")
    assert "llama-cpp does not start: " in out
    assert "ctx-size" in out
    document = json.loads(run(capsys, "--engine", "vllm,llama-cpp", "--ctx-size", "1000000", "--json", "-")[0])
    assert list(document["refused"]) == ["llama-cpp"]
    assert [column["engine"] for column in document["results"]] == ["vllm"]


def test_the_terminal_names_engines_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "--engine", "ollama,vllm")
    assert out.index("Memory and limits") < out.index("output tokens/s") < out.index("Why")
    assert "1 slot of 131,072 tokens" in " ".join(out.split())
    assert all(len(line) <= 80 for line in out.splitlines() if not line.startswith("This run"))
    assert "--engine ollama,vllm" in out


def test_the_terminal_says_what_may_go_wrong_and_how_well_each_engine_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--engine", "vllm,sglang,llama-cpp", "--quantization", "bf16")
    plain, document = run(capsys, *words)[0], json.loads(run(capsys, *words, "--json", "-")[0])
    out = " ".join(plain.split())
    assert "sglang: warning: engine, operating system and other programs leave" in out
    assert out.count("warning:") == 1
    for engine, calibration in document["calibrations"].items():
        factor = f"{calibration['decode_factor']:.2f}"
        assert f"{engine}: step times {calibration['status']}" in out
        assert f"a factor of {factor} in decoding" in out
    for column in document["results"]:
        low, high = column["error_interval"]["output_tokens_per_s"]
        assert f"{column['allocator']}: output tokens/s {low:,.0f} to {high:,.0f}" in out
    assert "think time 2s" in out


def test_the_folder_has_a_result_of_each(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run(capsys, "--engine", "vllm,ollama", "--out", str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.json", "metrics.prom", "ollama", "trace.json", "vllm"]
    assert (tmp_path / "ollama" / "report.html").exists()
    assert "ollama" in (tmp_path / "ollama" / "config.toml").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--engine", "vllm,nobody"], "nobody"),
        (["--engine", ","], "no engine given"),
        (["--engine", "vllm,ollama", "--mem-fraction-static", "0.5"], "it is for --engine sglang"),
        (["--engine", "vllm,sglang", "--report", "x.html"], "give --out FOLDER"),
        (["--engine", "vllm,sglang", "--model", "llama-3.1-405b"], "none of these engines starts"),
    ],
)
def test_what_cannot_be_compared_is_refused(capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    with pytest.raises(SystemExit) as stop:
        run(capsys, *words)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err
