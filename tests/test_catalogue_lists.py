"""Lists of the catalogues: all, those that a text finds, and the same for a program."""

import json

import pytest

from pagedkv.catalogue import hardware_names, load_hardware, load_model, model_names
from pagedkv.errors import ConfigError
from pagedkv.sims.catalogue_lists import find_hardware, find_models
from pagedkv.sims.cli import main


def test_without_a_text_all_are_found() -> None:
    assert tuple(find_models()) == tuple(model_names())
    assert tuple(find_hardware()) == tuple(hardware_names())


@pytest.mark.parametrize("text", ["qwen3", "QWEN3 30b", "llama 70B", "70b llama"])
def test_every_word_is_in_what_is_found_and_in_nothing_else(text: str) -> None:
    found = find_models(text)
    for name in model_names():
        known_as = f"{name} {load_model(name).title}".lower()
        assert (name in found) == all(word in known_as for word in text.lower().split())
    assert found


def test_what_is_no_name_finds_the_model_with_such_a_repository() -> None:
    assert tuple(find_models("DeepSeek-R1-Distill-Llama-70B")) == ("llama-3.3-70b",)
    assert tuple(find_models("distill qwen")) == ("qwen2.5-7b", "qwen2.5-14b", "qwen2.5-32b")
    assert not any("distill" in name for name in find_models("deepseek")), "a name goes first"


def test_what_finds_nothing_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'qwen9-8b': did you mean qwen3-8b"):
        find_models("qwen9-8b")
    with pytest.raises(ConfigError, match="unknown machine"):
        find_hardware("abacus")


def test_a_program_reads_what_a_reader_sees(capsys: pytest.CaptureFixture[str]) -> None:
    main(["models", "llama", "70b", "--json", "-"])
    rows = json.loads(capsys.readouterr().out)["models"]
    main(["models", "llama", "70b"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [row["name"] for row in rows] == [line.split()[0] for line in lines if line]
    for row in rows:
        model = load_model(row["name"])
        assert (row["params_total"], row["max_context"]) == (model.params_total, model.max_context)
        assert row["kv_bytes_per_token"] == model.kv_spec("auto").bytes_per_token
    main(["hardware", "spark", "--json", "-"])
    (machine,) = json.loads(capsys.readouterr().out)["machines"]
    assert machine["visible_bytes"] == load_hardware("dgx-spark").visible_bytes
