"""Prompts from files, and what `generate` needs."""

import sys
from pathlib import Path

import pytest

from pagedkv.errors import ConfigError
from pagedkv.sims.cli import main
from pagedkv.sims.prompt_file import Prompt, read_prompts


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_line_is_a_prompt_and_numbers_alone_are_token_ids(tmp_path: Path) -> None:
    prompts = read_prompts(written(tmp_path / "p.txt", "Who are you?\n\n 12 7 0\n3 words here\n"))
    assert prompts == [Prompt(text="Who are you?"), Prompt(tokens=(12, 7, 0)), Prompt(text="3 words here")]


def test_json_lines_are_texts_token_ids_or_objects(tmp_path: Path) -> None:
    text = '"12 7"\n[1, 2]\n{"prompt": "a", "max_tokens": 3, "other": 1}\n{"prompt": [5]}\n'
    text += '{"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}], "max_tokens": 4}\n'
    assert read_prompts(written(tmp_path / "p.jsonl", text)) == [
        Prompt(text="12 7"),
        Prompt(tokens=(1, 2)),
        Prompt(text="a", max_tokens=3),
        Prompt(tokens=(5,)),
        Prompt(messages=(("system", ""), ("user", "Hi")), max_tokens=4),
    ]


def test_lines_end_where_files_say_so(tmp_path: Path) -> None:
    """Not at characters that Python takes for ends of lines, and JSON for letters; and a byte order mark is no letter."""
    (tmp_path / "p.jsonl").write_bytes('\ufeff"a\u2028b\x85"\r\n{"prompt": "\u2029"}\n'.encode())
    assert read_prompts(tmp_path / "p.jsonl") == [Prompt(text="a\u2028b\x85"), Prompt(text="\u2029")]
    (tmp_path / "p.txt").write_bytes("\ufeff12 7\r\na\x0cb".encode())
    assert read_prompts(tmp_path / "p.txt") == [Prompt(tokens=(12, 7)), Prompt(text="a\x0cb")]


@pytest.mark.parametrize("number", [str(2**31), "9" * 18, pytest.param("9" * 5000, id="5000 digits")])
@pytest.mark.parametrize(("name", "line"), [("p.txt", "1 {}"), ("p.jsonl", "[1, {}]")])
def test_numbers_that_are_no_token_ids_are_refused(tmp_path: Path, number: str, name: str, line: str) -> None:
    with pytest.raises(ConfigError, match=r"line 2: .*needs"):
        read_prompts(written(tmp_path / name, f"[1]\n{line.format(number)}\n"))


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("[" * 100_000, id="brackets"),
        *("nonsense", "[]", '[1, "a"]', "[-1]", "[true]", '{"text": "a"}', '{"prompt": "a", "max_tokens": 0}', '""', "3"),
        f'{{"prompt": "a", "max_tokens": {2**31}}}',
        *('{"messages": []}', '{"messages": "Hi"}', '{"messages": ["Hi"]}', '{"messages": [{"role": "user"}]}'),
        '{"messages": [{"role": "", "content": "Hi"}]}',
    ],
)
def test_the_line_that_is_no_prompt_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError, match=r"line 2: .*needs"):
        read_prompts(written(tmp_path / "p.jsonl", f"[1]\n{line}\n"))


def test_a_prompt_and_a_conversation_at_once_are_refused(tmp_path: Path) -> None:
    line = '{"prompt": "a", "messages": [{"role": "user", "content": "Hi"}]}'
    with pytest.raises(ConfigError, match="line 1: has a prompt and messages: give one"):
        read_prompts(written(tmp_path / "p.jsonl", line + "\n"))


def test_files_without_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no prompt"):
        read_prompts(written(tmp_path / "p.txt", "\n \n"))
    with pytest.raises(ConfigError, match="cannot read"):
        read_prompts(tmp_path)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_prompts(tmp_path / "b.txt")


def test_without_torch_generate_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    prompts = written(tmp_path / "p.txt", "1 2 3\n")
    with pytest.raises(SystemExit) as exit:
        main(["generate", "--random-weights", str(tmp_path), "--prompts", str(prompts)])
    assert exit.value.code == 2
    assert "pip install 'pagedkv[runtime]'" in capsys.readouterr().err
