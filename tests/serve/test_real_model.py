"""A model that really runs, behind the server: the tokens are the engine's own, and clients come and go as they like."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="a real model needs torch")
transformers = pytest.importorskip("transformers", reason="and transformers")
pytest.importorskip("starlette", reason="the server is made of starlette: pip install 'pagedkv[serve]'")
pytest.importorskip("uvicorn", reason="and of uvicorn")
pytest.importorskip("httpx", reason="the tests' client is httpx")

import tokenizers
from small_server import MODEL, samples, served

from pagedkv.runtime.engine import LLMEngine
from pagedkv.runtime.sampling import SamplingParams
from pagedkv.scheduling.waiting import NUM_ACCEPTED
from pagedkv.sims.serve.model_text import model_tokenizer
from pagedkv.sims.serve.real import RealEngine, warm_up

VOCAB = 260
END = 259
TEMPLATE = (
    "{% for m in messages %}{{ raise_exception('no wizards') if m.role == 'wizard' }}<{{ m.role }}>{{ m.content }}{% endfor %}>"
)


def byte_tokenizer(template: str | None = TEMPLATE) -> Any:
    """A token for every byte, so that most letters beyond ASCII take several."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    made.chat_template = template
    return made


def llm(**changes: Any) -> LLMEngine:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.35,
    )
    return _small_engine(transformers.LlamaForCausalLM(config), changes)


def hybrid(**changes: Any) -> LLMEngine:
    """One with linear attention in two of its three layers."""
    torch.manual_seed(4)
    config = transformers.Qwen3NextConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "linear_attention", "full_attention"],
        num_experts=0,
        max_position_embeddings=512,
        initializer_range=0.35,
    )
    return _small_engine(transformers.Qwen3NextForCausalLM(config), changes)


def _small_engine(model: Any, changes: dict[str, Any]) -> LLMEngine:
    settings = {"num_blocks": 60, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 64, **changes}
    return LLMEngine(model.eval(), **settings)


def real(model: LLMEngine, tokenizer: Any = None, end_tokens: Sequence[int] = ()) -> RealEngine:
    texts = model_tokenizer(tokenizer, max_model_len=model.scheduler.settings.max_model_len)
    return RealEngine(model, texts, sampling=SamplingParams, end_tokens=tuple(end_tokens), vocab_size=VOCAB)


PROMPTS = [[(7 * i + j * j) % 250 for j in range(3 + 5 * i)] for i in range(10)]


@pytest.mark.parametrize("drafts", [0, 3])
def test_greedy_answers_are_the_engines_own_whoever_else_is_there(monkeypatch: pytest.MonkeyPatch, drafts: int) -> None:
    monkeypatch.setattr("pagedkv.sims.serve.serve_loop.FORGET_AT", -20)  # before every step
    expected = [text.tokens for text in llm().generate(PROMPTS, max_tokens=40)]

    async def test() -> None:
        model = llm() if not drafts else llm(speculative_model=llm().models.runner.model, num_speculative_tokens=drafts)
        warm_up(model, block_size=4)
        async with served(real(model)) as server:

            async def answer(number: int) -> list[int]:
                await asyncio.sleep(number / 100)
                body = {"prompt": PROMPTS[number], "max_tokens": 40, "temperature": 0, "stream": bool(number % 2)}
                got = await server.post("completions", **body)
                chunks = [got.json()] if number % 2 == 0 else list(map(json.loads, got.text.split("data: ")[1:-1]))
                return list(map(int, "".join(chunk["choices"][0]["text"] for chunk in chunks).split()))

            assert await asyncio.gather(*map(answer, range(len(PROMPTS)))) == expected
            assert server.is_empty()
            counted = samples(server.loop.metrics.text(MODEL, num_waiting=0))
        assert counted["generation_tokens_total"] == 40 * len(PROMPTS)
        assert counted["num_preemptions_total"] > 0
        assert bool(model.scheduler.arrays.counts[NUM_ACCEPTED] > 200) is (drafts > 0)
        assert counted["e2e_request_latency_seconds_count"] == len(PROMPTS)
        parts = [counted[f"request_{part}_time_seconds_sum"] for part in ("queue", "prefill", "decode")]
        assert counted["e2e_request_latency_seconds_sum"] == pytest.approx(sum(parts))
        assert min(parts) > 0

    asyncio.run(test())


def test_an_end_token_ends_an_answer_unless_it_is_ignored() -> None:
    whole = llm().generate([PROMPTS[2]], max_tokens=30)[0].tokens
    end = whole[11]
    place = whole.index(end)

    async def test() -> None:
        async with served(real(llm(), end_tokens=[end])) as server:
            body = {"prompt": PROMPTS[2], "max_tokens": 30, "temperature": 0}
            stopped = (await server.post("completions", **body)).json()
            assert (stopped["choices"][0]["finish_reason"], stopped["usage"]["completion_tokens"]) == ("stop", place + 1)
            on = (await server.post("completions", **body, ignore_eos=True)).json()
            assert (on["choices"][0]["finish_reason"], on["usage"]["completion_tokens"]) == ("length", 30)
            assert (await server.post("completions", **body, min_tokens=20)).status_code == 400

    asyncio.run(test())


def test_tokens_of_the_request_end_an_answer_too() -> None:
    whole = llm().generate([PROMPTS[2]], max_tokens=30)[0].tokens
    place = next(i for i in range(8, 30) if whole[i] not in whole[:i])

    async def test() -> None:
        async with served(real(llm())) as server:
            for ignored in (False, True):
                body = {"prompt": PROMPTS[2], "max_tokens": 30, "temperature": 0, "ignore_eos": ignored}
                answer = (await server.post("completions", **body, stop_token_ids=[whole[place], 3000])).json()
                (choice,) = answer["choices"]
                assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", whole[place])
                assert answer["usage"]["completion_tokens"] == place + 1

    asyncio.run(test())


@pytest.mark.parametrize("drafts", [0, 3])
def test_without_max_tokens_a_chat_has_the_room_of_a_pool_smaller_than_the_model(drafts: int) -> None:
    more = {"speculative_model": llm().models.runner.model, "num_speculative_tokens": drafts} if drafts else {}

    async def test() -> None:
        async with served(real(llm(max_model_len=500, num_blocks=30, **more), byte_tokenizer())) as server:
            usage = (await server.post("chat/completions", messages=[{"role": "user", "content": "Hi"}])).json()["usage"]
            assert usage["total_tokens"] == 29 * 4 + 1 - drafts
            assert server.is_empty()

    asyncio.run(test())


def test_a_seed_fixes_what_is_drawn() -> None:
    async def test() -> None:
        async with served(real(llm())) as server:

            async def drawn(**more: Any) -> str:
                answer = await server.post("completions", prompt=PROMPTS[1], max_tokens=12, **more)
                return str(answer.json()["choices"][0]["text"])

            assert await drawn(seed=5) == await drawn(seed=5) != await drawn(seed=6)
            assert await drawn() != await drawn()

    asyncio.run(test())


@pytest.mark.parametrize("stream", [True, False])
def test_whoever_leaves_while_a_step_is_computed_gives_blocks_back(stream: bool) -> None:
    async def test() -> None:
        model = llm()
        async with served(real(model)) as server:
            body = {"max_tokens": 200, "temperature": 0}
            stays = asyncio.create_task(server.post("completions", prompt=PROMPTS[0], **body))
            for _ in range(3):
                leaves = asyncio.create_task(server.post("completions", prompt=PROMPTS[3], stream=stream, **body))
                await server.until(lambda: model.scheduler.num_running == 2)
                leaves.cancel()
                await server.until(lambda: model.num_unfinished <= 1)
            assert (await stays).json()["usage"]["completion_tokens"] == 200
            assert server.is_empty()

    asyncio.run(test())


def test_texts_and_chats_go_through_the_models_tokenizer() -> None:
    async def test() -> None:
        tokenizer = byte_tokenizer()
        async with served(real(llm(), tokenizer)) as server:
            messages = [{"role": "user", "content": "Grüße"}]
            chat = (await server.post("chat/completions", messages=messages, max_tokens=30, temperature=0)).json()
            ids = tokenizer("<user>Grüße>")["input_ids"]
            assert chat["usage"]["prompt_tokens"] == len(ids) == len("<user>Grüße>".encode())
            expected = llm().generate([ids], max_tokens=30)[0].tokens
            assert chat["choices"][0]["message"]["content"] == tokenizer.decode(expected)
            refused = await server.post("chat/completions", messages=[{"role": "wizard", "content": ""}])
            assert "no wizards" in refused.json()["error"]["message"]

    asyncio.run(test())


def test_what_a_model_cannot_do_is_refused() -> None:
    async def test() -> None:
        hello = [{"role": "user", "content": "Hello"}]
        async with served(real(llm())) as server:
            for path, body, says in (
                ("completions", {"prompt": "text"}, "no tokenizer"),
                ("chat/completions", {"messages": hello}, "no tokenizer"),
                ("completions", {"prompt": [VOCAB]}, "token ids must be 0 to 259"),
                (
                    "completions",
                    {"prompt": [1], "presence_penalty": 0.5, "min_p": 0.1},
                    "here, leave it out: presence_penalty, min_p",
                ),
                ("completions", {"prompt": [1], "logit_bias": {"5": 1}}, "logit_bias"),
                ("completions", {"prompt": [1], "structured_outputs": {"regex": "a*"}}, "structured_outputs"),
                ("completions", {"prompt": [1], "min_tokens": 3, "stop_token_ids": [5]}, "no stop_token_ids"),
                ("completions", {"prompt": [1] * 230, "max_tokens": 8}, "more than 237 in all"),
            ):
                answer = await server.post(path, **body)
                assert (answer.status_code, says in answer.json()["error"]["message"]) == (400, True), answer.text
            assert server.is_empty()
        async with served(real(llm(), byte_tokenizer())) as server:
            for path, body in (
                ("completions", {"prompt": "half \ud83d"}),
                ("chat/completions", {"messages": [{"role": "user", "content": "\ude42"}]}),
            ):
                answer = await server.client.post(f"/v1/{path}", content=json.dumps(body))
                assert (answer.status_code, "half of a surrogate pair" in answer.text) == (400, True), answer.text
        async with served(real(llm(), byte_tokenizer(template=None))) as server:
            answer = await server.post("chat/completions", messages=hello)
            assert "no chat template" in answer.json()["error"]["message"]

    asyncio.run(test())


def test_texts_that_cannot_fit_are_refused_before_they_are_encoded() -> None:
    class Encodes:
        """A tokenizer whose longest token has three characters."""

        chat_template = "{{ messages }}"

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "abc": 1}

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            assert len(text) <= 237 * 3
            return {"input_ids": [0] * 5}

        def decode(self, ids: Sequence[int], **_: Any) -> str:
            return "a" * len(ids)

    async def test() -> None:
        async with served(real(llm(), Encodes())) as server:
            assert (await server.post("completions", prompt="a" * 237 * 3, max_tokens=1)).status_code == 200
            for path, body in (
                ("completions", {"prompt": "a" * (237 * 3 + 1)}),
                ("completions", {"prompt": ["a", "a" * 1_000_000]}),
                ("chat/completions", {"messages": [{"role": "user", "content": "a" * 400}] * 2}),
            ):
                answer = await server.post(path, **body)
                assert answer.json()["error"]["code"] == "context_length_exceeded", answer.text
                assert "no text of more than 711 has room" in answer.text

    asyncio.run(test())


@pytest.mark.parametrize("text", ["plain", "Grüße 🙂 日本語", "é", "🙂"])
def test_a_text_comes_in_whole_characters(text: str) -> None:
    tokenizer = byte_tokenizer()
    decoder, ids = model_tokenizer(tokenizer, max_model_len=99).decoder(), tokenizer(text)["input_ids"]
    parts = [decoder.push([token], last=i == len(ids) - 1) for i, token in enumerate(ids)]
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)
    cut = model_tokenizer(tokenizer, max_model_len=99).decoder()
    assert "".join(cut.push([token], last=i == len(ids) - 2) for i, token in enumerate(ids[:-1])) == tokenizer.decode(ids[:-1])
