"""`simulate calibrate` as a command: what it prints and writes, and how a mistake ends."""

import json
from pathlib import Path

import pytest

from pagedkv.sims.cli import main


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
