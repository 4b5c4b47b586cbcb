"""`generate`: users in a closed loop before a model that really runs, from a file to figures."""

import csv
import json
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("pagedkv.runtime")
transformers = pytest.importorskip("transformers", reason="the runtime's models are transformers'")

import tokenizers
from tiny_models import COMMON, VOCAB, build

from pagedkv.runtime.engine import LLMEngine
from pagedkv.sims.cli import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a small model's configuration is, and a file of prompts, eleven of token ids and one that is too long."""
    monkeypatch.chdir(tmp_path)
    transformers.LlamaConfig(**COMMON | {"num_hidden_layers": 2}).save_pretrained("model")
    lines = [" ".join(str(2 + (i * j + i) % (VOCAB - 2)) for j in range(5 + 2 * i)) for i in range(11)]
    Path("prompts.txt").write_text("\n".join([*lines, " ".join(["7"] * 600)]) + "\n", encoding="utf-8")
    return tmp_path


BASE = "generate --random-weights model --prompts prompts.txt --block-size 4 --max-tokens 12"


def failing(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit:
        main(shlex.split(command))
    assert exit.value.code == 2
    return capsys.readouterr().err


def test_the_figures_are_those_of_a_simulation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(shlex.split(f"{BASE} --users 6 --num-gpu-blocks-override 25 --out out"))
    shown, told = capsys.readouterr()
    assert "6 users" in shown
    assert "TTFT P50" in shown
    assert "1 prompt rejected: prompt 11 of 600 tokens and 12 new ones: prompt and output have room for 97 together" in told
    document = json.loads((folder / "out" / "summary.json").read_text())
    result: dict[str, Any] = document["results"][0]
    assert (result["num_injected"], result["num_finished"], result["num_rejected"]) == (12, 11, 1)
    assert result["num_preemptions"] > 0
    assert result["running_max"] <= 6
    assert sum(result["kv"].values()) == pytest.approx(1)
    assert 0 < result["ttft_s"]["mean"] <= result["e2e_s"]["mean"]
    assert document["budget"]["num_blocks"] == 25
    assert document["budget"]["kv_cache"] == 25 * 4 * document["budget"]["kv_bytes_per_token"]
    rows = list(csv.DictReader((folder / "out" / "requests.csv").open()))
    assert [row["outcome"] for row in rows].count("finished") == 11
    for row in rows:
        if row["outcome"] == "finished":
            assert float(row["arrival_s"]) <= float(row["scheduled_s"]) < float(row["first_token_s"]) < float(row["last_token_s"])
    answers = [json.loads(line) for line in (folder / "out" / "answers.jsonl").read_text().splitlines()]
    assert [len(answer["tokens"]) for answer in answers] == [12] * 11 + [0]
    assert answers[-1]["finish_reason"] == "rejected"


def test_a_saved_model_says_what_its_own_generate_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build("qwen3")
    model.save_pretrained("saved")
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3]]
    Path("two.jsonl").write_text(f'{prompts[0]}\n{{"prompt": {prompts[1]}, "max_tokens": 5}}\n', encoding="utf-8")
    main(shlex.split("generate --model saved --prompts two.jsonl --max-tokens 9 --num-gpu-blocks-override 20 --json - --out out"))
    assert json.loads(capsys.readouterr().out)["results"][0]["num_finished"] == 2
    given = [json.loads(line)["tokens"] for line in (folder / "out" / "answers.jsonl").read_text().splitlines()]
    for prompt, tokens, count in zip(prompts, given, (9, 5), strict=True):
        wanted = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)[0, len(prompt) :]
        assert tokens == wanted.tolist()


def test_one_users_answers_are_printed_as_they_come(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(shlex.split(f"{BASE} --num-gpu-blocks-override 40 --stream --out out"))
    shown = capsys.readouterr().out
    answers = [json.loads(line)["tokens"] for line in (folder / "out" / "answers.jsonl").read_text().splitlines()]
    assert shown.startswith("".join(" ".join(map(str, tokens)) + "\n\n" for tokens in answers[:11]))


def test_an_interrupted_run_reports_what_was_done(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = LLMEngine.step, []

    def interrupted(engine: LLMEngine) -> Any:
        steps.append(engine)
        if len(steps) == 25:
            os.kill(os.getpid(), signal.SIGINT)
        return step(engine)

    monkeypatch.setattr(LLMEngine, "step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as exit:
        main(shlex.split(f"{BASE} --users 2 --num-gpu-blocks-override 60 --json x.json"))
    assert exit.value.code == 130
    assert "until then" in capsys.readouterr().err
    result = json.loads((folder / "x.json").read_text())["results"][0]
    assert result["num_finished"] > 0
    assert result["num_unfinished"] == 2
    assert len(steps) == 25
    engine = steps[-1]
    engine.scheduler.check_integrity()
    assert engine.allocator.free_slots == engine.allocator.usable_slots
    assert signal.getsignal(signal.SIGINT) is before


def test_a_draft_model_changes_no_answer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers.LlamaConfig(**COMMON | {"num_hidden_layers": 1}).save_pretrained("draft")
    command = f"{BASE} --users 4 --num-gpu-blocks-override 40 --out"
    main(shlex.split(f"{command} alone"))
    main(shlex.split(f"{command} drafted --speculative-model draft --num-speculative-tokens 3"))
    assert "3 drafts a step by draft" in " ".join(capsys.readouterr().out.split())
    alone, drafted = ((folder / name / "answers.jsonl").read_text() for name in ("alone", "drafted"))
    assert alone == drafted
    documents = [json.loads((folder / name / "summary.json").read_text()) for name in ("alone", "drafted")]
    assert documents[0]["results"][0]["num_draft_tokens"] is None
    assert documents[1]["results"][0]["num_draft_tokens"] > 0
    assert documents[1]["budget"]["kv_cache"] == 1.5 * documents[0]["budget"]["kv_cache"]
    assert documents[1]["budget"]["weights"] > documents[0]["budget"]["weights"]


def test_several_texts_of_each_prompt_and_the_best_beams(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"{BASE} --users 2 --num-gpu-blocks-override 90"
    main(shlex.split(f"{command} --out drawn --n 3 --temperature 1"))
    answers = [json.loads(line) for line in (folder / "drawn" / "answers.jsonl").read_text().splitlines()]
    assert [(answer["prompt"], answer["index"]) for answer in answers] == [(i, k) for i in range(12) for k in range(3)]
    assert [len(answer["tokens"]) for answer in answers] == [12] * 33 + [0] * 3
    assert len({tuple(answer["tokens"]) for answer in answers}) > 25
    document = json.loads((folder / "drawn" / "summary.json").read_text())
    result: dict[str, Any] = document["results"][0]
    assert (result["num_finished"], result["num_rejected"]) == (33, 1)  # each text counts as a request
    assert sum(int(row["num_output_tokens"]) for row in csv.DictReader((folder / "drawn" / "requests.csv").open())) == 33 * 12
    assert result["running_max"] == 6
    assert sum(result["kv"].values()) == pytest.approx(1)
    rows = list(csv.DictReader((folder / "drawn" / "requests.csv").open()))
    for row in rows:
        if row["outcome"] == "finished":
            assert float(row["arrival_s"]) <= float(row["scheduled_s"]) < float(row["first_token_s"]) < float(row["last_token_s"])
    main(shlex.split(f"{command} --out beams --n 2 --beam-width 3 --length-penalty 0"))
    beams = [json.loads(line) for line in (folder / "beams" / "answers.jsonl").read_text().splitlines()]
    for best, second in zip(beams[:22:2], beams[1:22:2], strict=True):
        assert best["score"] >= second["score"]
        assert best["tokens"] != second["tokens"]
    capsys.readouterr()


def with_tokenizer(folder: Path, template: str | None) -> Any:
    """Give the model of `folder` a tokenizer of a token per letter, and return it."""
    letters = [chr(code) for code in range(32, 32 + VOCAB - 2)]
    vocabulary = {"[UNK]": 0, "<s>": 1, **{letter: 2 + i for i, letter in enumerate(letters)}}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("<s>|."), "isolated")
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")
    made.chat_template = template
    made.save_pretrained(folder)
    return made


def test_texts_and_conversations_go_through_the_tokenizers_template(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    tokenizer = with_tokenizer(folder / "model", template)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    Path("chat.jsonl").write_text(f'{json.dumps({"messages": turns})}\n"Hi"\n[7, 8]\n', encoding="utf-8")
    asked: list[list[int]] = []
    add = LLMEngine.add_request

    def noted(engine: LLMEngine, prompt: list[int], **more: Any) -> Any:
        asked.append(list(prompt))
        return add(engine, prompt, **more)

    monkeypatch.setattr(LLMEngine, "add_request", noted)
    command = "generate --random-weights model --prompts chat.jsonl --max-tokens 3 --num-gpu-blocks-override 60"
    main(shlex.split(f"{command} --apply-chat-template"))
    spelled = [tokenizer.decode(tokens).replace(" ", "") for tokens in asked[1:3]]
    assert spelled == ["<s>[system]Bebrief.[user]Hi[assistant]", "<s>[user]Hi[assistant]"]
    assert asked[1].count(1) == asked[2].count(1) == 1  # the template has written it: the tokenizer adds no second
    assert asked[3] == [7, 8]
    main(shlex.split(command))
    assert asked[5] == asked[1]
    assert asked[6] == tokenizer("Hi")["input_ids"] != asked[2]


def test_a_conversation_needs_a_template_that_takes_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("chat.jsonl").write_text('{"messages": [{"role": "wizard", "content": "Hi"}]}\n', encoding="utf-8")
    command = "generate --random-weights model --prompts chat.jsonl"
    assert "prompt 0 is a conversation, and the model's folder has no tokenizer" in failing(command, capsys)
    with_tokenizer(folder / "model", None)
    Path("half.jsonl").write_text('"Hello"\n"\\ud83d"\n', encoding="utf-8")
    half = failing("generate --random-weights model --prompts half.jsonl", capsys)
    assert "prompt 1: a text with '\\ud83d' alone, half of a surrogate pair" in half
    assert "prompt 0: this model has no chat template" in failing(command, capsys)
    with_tokenizer(folder / "model", "{{ raise_exception('no wizards') }}")
    assert "the chat template refuses these messages: no wizards" in failing(command, capsys)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"{BASE} --model model", "give one of --model FOLDER and --random-weights"),
        (f"{BASE} --users 0", "--users is 0"),
        (f"{BASE} --users 2 --stream", "--stream goes with one user and one text, not with --users 2"),
        (f"{BASE} --num-speculative-tokens 3", "speculation needs --speculative-model and --num-speculative-tokens"),
        (f"{BASE} --speculative-model model", "e.g. 3: give both, or none"),
        (f"{BASE} --speculative-model model --num-speculative-tokens 0", "num-speculative-tokens is 0"),
        (f"{BASE} --speculative-model absent --num-speculative-tokens 2", "needs a config.json"),
        (f"{BASE} --speculative-model other --num-speculative-tokens 2", "needs the vocabulary of its target"),
        (f"{BASE.removesuffix('12')}99999999999999999999", "--max-tokens is 99999999999999999999: needs 1 to"),
        (f"{BASE} --seed 99999999999999999999", "--seed is 99999999999999999999: needs"),
        (f"{BASE} --n 0", "--n is 0: needs 1 or more"),
        (f"{BASE} --n 2", "all texts would be the same; give --temperature, or --beam-width"),
        (f"{BASE} --n 2 --temperature 1 --stream", "--stream goes with one user and one text, not with --n 2"),
        (f"{BASE} --length-penalty 1", "is for beams: give --beam-width"),
        (f"{BASE} --beam-width 1", "beam-width is 1: needs 2 or more"),
        (f"{BASE} --beam-width 2 --n 3", "3 texts of 2 beams"),
        (f"{BASE} --beam-width 2 --temperature 1", "needs temperature 0"),
        (f"{BASE} --beam-width 2 --speculative-model model --num-speculative-tokens 2", "use one of both"),
        (f"{BASE} --temperature -1", "temperature is -1"),
        (f"{BASE} --dtype fp8", "needs auto, float32"),
        (f"{BASE} --kv-cache-memory-bytes 1KiB", "holds 0 blocks"),
        ("generate --random-weights absent --prompts prompts.txt", "needs a config.json"),
        ("generate --random-weights model --prompts absent.txt", "cannot read --prompts"),
        ("generate --random-weights model --prompts words.txt", "has no tokenizer: write token ids"),
        ("generate --random-weights model --prompts foreign.txt", "prompt 1: token id 97: the model has 0 to 96"),
        ("generate --random-weights hybrid.json --prompts prompts.txt --enable-prefix-caching", "blocks keep no state"),
        ("generate --random-weights strange.json --prompts prompts.txt", "model_type 'nonsense'"),
        ("generate --model model --prompts prompts.txt", "cannot load the weights"),
    ],
)
def test_what_cannot_run_is_refused_with_what_would(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    transformers.LlamaConfig(**COMMON | {"vocab_size": 90}).save_pretrained("other")
    Path("words.txt").write_text("Hello there\n", encoding="utf-8")
    Path("foreign.txt").write_text("5 96\n5 97\n", encoding="utf-8")
    small = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 32, "num_experts": 0, "num_hidden_layers": 4, "head_dim": 16}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 2, "linear_num_key_heads": 1, "linear_num_value_heads": 2}
    Path("hybrid.json").write_text(json.dumps({"model_type": "qwen3_next"} | small), encoding="utf-8")
    Path("strange.json").write_text(json.dumps({"model_type": "nonsense"}), encoding="utf-8")
    assert message in failing(command, capsys)
