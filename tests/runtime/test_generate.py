"""`model.generate` over blocks gives the tokens that it gives over a contiguous cache."""

import re
import sys

import numpy as np
import pytest

from pagedkv.errors import ConfigError

torch = pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("pagedkv.runtime")
transformers = pytest.importorskip("transformers", reason="the runtime's models are transformers'")

from tiny_models import COMMON, MODELS, WINDOW, Answer, build, distinct, generate, paged, poison, prompts, shuffle, ties

from pagedkv.runtime import LLMEngine, PagedCache, use_paged_attention
from pagedkv.runtime.attention import padding_mask, paged_attention_forward
from pagedkv.runtime.paged_layer import PagedLayer


@pytest.mark.parametrize("block_size", [16, 5])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_the_contiguous_cache(name: str, block_size: int) -> None:
    model, inputs = build(name), prompts()
    expected = generate(model, inputs)
    cache = PagedCache(model, num_blocks=400, block_size=block_size)
    shuffle(cache)
    given = paged(model, inputs, cache)
    sys.stdout.write(f"{name}, blocks of {block_size}: {ties(expected, given)} of 16 rows part ways at a tie\n")
    assert distinct(expected.tokens).mean() > 8
    table = cache.sequences.block_table(cache.sequences.requests[-1])
    assert (table[1:] != table[:-1] + 1).any()
    cache.allocator.check_integrity()
    cache.reset()
    assert cache.num_blocks_held == 0


@pytest.mark.parametrize("padded", [True, False])
def test_a_window_may_be_known_to_the_mask_alone(padded: bool) -> None:
    """Phimoe does not name its window to the attention function."""
    config = transformers.PhimoeConfig(**COMMON, sliding_window=WINDOW, num_local_experts=4, experts_implementation="eager")
    torch.manual_seed(0)
    model, inputs = transformers.PhimoeForCausalLM(config).eval(), prompts(6)
    model.set_attn_implementation("eager")
    if not padded:
        inputs = {"input_ids": inputs["input_ids"].clamp(min=2)}
    expected = generate(model, inputs)
    ties(expected, paged(model, inputs, PagedCache(model, num_blocks=100, block_size=4)))
    engine = LLMEngine(model, num_blocks=100, block_size=4)
    ids, real = inputs["input_ids"], inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    texts = engine.generate([row[there > 0].tolist() for row, there in zip(ids, real, strict=True)], max_tokens=24)
    assert [text.tokens for text in texts] == expected.tokens.tolist()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_rows_with_padding_anywhere_are_what_they_are_alone(name: str) -> None:
    """A window counts tokens; that of transformers' own caches counts the padding inside it too."""
    model, ids = build(name), torch.from_numpy(np.random.default_rng(5).integers(2, 97, (4, 40)))
    real = torch.from_numpy(np.random.default_rng(6).random((4, 40)) < 0.5).long()
    positions = (real.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        alone = [model(ids[row, real[row] > 0][None]).logits[0] for row in range(4)]
        use_paged_attention(model)
        cache = PagedCache(model, num_blocks=100, block_size=3)
        poison(cache)
        for first, last in ((0, 23), (23, 24), (24, 40)):
            new = {"input_ids": ids[:, first:last], "position_ids": positions[:, first:last], "attention_mask": real[:, :last]}
            logits = model(**new, past_key_values=cache).logits
            for row, expected in enumerate(alone):
                there = real[row, first:last] > 0
                before = int(real[row, :first].sum())
                given = logits[row, there]
                torch.testing.assert_close(given, expected[before : before + len(given)], rtol=1e-3, atol=2e-3)


def test_torch_compile_leaves_alone_what_gives_blocks() -> None:
    """To compile even one small model takes longer than all tests here together: so this looks for the marks."""
    for function in (paged_attention_forward, padding_mask, PagedLayer.update):
        assert getattr(function, "_torchdynamo_disable", False)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt_oss"])
def test_the_window_bites(name: str) -> None:
    model, inputs = build(name), prompts()
    expected = generate(model, inputs)
    model.config.sliding_window = 500
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 500 if layer.self_attn.sliding_window else None
    assert (generate(model, inputs).tokens != expected.tokens).any()


@pytest.mark.parametrize(("name", "allocator"), [("gemma3", "paged"), ("llama", "hybrid"), ("gpt_oss", "paged")])
def test_both_allocators_give_the_same_tokens(name: str, allocator: str) -> None:
    model, inputs = build(name), prompts()
    expected = generate(model, inputs)
    ties(expected, paged(model, inputs, PagedCache(model, num_blocks=200, block_size=7, allocator=allocator)))


def test_blocks_behind_a_window_return_to_the_pool() -> None:
    model, inputs, held = build("gemma3"), prompts(4), {}
    for allocator in ("paged", "hybrid"):
        cache = PagedCache(model, num_blocks=300, block_size=4, allocator=allocator)
        paged(model, inputs, cache, steps=60)
        held[allocator] = cache.num_bytes_held
    window_blocks = 3 * 4 * (WINDOW // 4 + 2)  # three groups of one layer, four sequences
    full_blocks = sum(-(-(int(n) + 59) // 4) for n in inputs["attention_mask"].sum(1))
    page = 2 * 4 * 2 * 16 * 4
    assert held["paged"] == full_blocks * page * 4
    assert held["hybrid"] <= (full_blocks + window_blocks) * page


def test_padding_takes_no_room() -> None:
    model, inputs = build("llama"), prompts()
    cache = PagedCache(model, num_blocks=400, block_size=1)
    paged(model, inputs, cache, steps=5)
    assert cache.num_blocks_held == int(inputs["attention_mask"].sum()) + 16 * 4  # the last token is never cached


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_pool_that_is_too_small_says_how_large_it_must_be(name: str) -> None:
    model, inputs = build(name), prompts()
    expected, num_blocks = generate(model, inputs), 5
    for _ in range(40):
        cache = PagedCache(model, num_blocks=num_blocks, block_size=5)
        try:
            given = paged(model, inputs, cache)
            break
        except ConfigError as error:
            larger = int(re.search(r"num_blocks=(\d+)", str(error))[1])
            assert larger > num_blocks
            num_blocks = larger
        cache.allocator.check_integrity()
    ties(expected, given)
    if name == "llama":  # and not one block more
        assert num_blocks == 1 + cache.num_blocks_held


def test_sampling_draws_the_same_tokens() -> None:
    model, inputs = build("qwen3"), prompts()
    sample = {"do_sample": True, "temperature": 0.8, "top_k": 20}
    torch.manual_seed(7)
    expected = generate(model, inputs, **sample)
    torch.manual_seed(7)
    given = paged(model, inputs, PagedCache(model, num_blocks=200), **sample)
    assert (given.tokens == expected.tokens).all()
    assert (expected.tokens != generate(build("qwen3"), inputs).tokens).any()


def test_beam_search_shares_blocks_and_copies_on_write() -> None:
    model, inputs = build("llama"), prompts(5)
    beams = {"num_beams": 4, "max_new_tokens": 20, "do_sample": False}
    expected = model.generate(**inputs, **beams)
    cache, shared, copied = PagedCache(model, num_blocks=300, block_size=3), [], []
    copy = cache.storage.apply_copies
    cache.storage.apply_copies = lambda copies: (copied.append(len(copies)), copy(copies))
    reorder = cache.reorder_cache
    cache.reorder_cache = lambda rows: (reorder(rows), shared.append(cache.allocator.manager.pool.ref_cnt.max()))
    poison(cache)
    use_paged_attention(model)
    assert (model.generate(**inputs, **beams, past_key_values=cache) == expected).all()
    assert max(shared) > 1
    assert sum(copied) > 0
    cache.allocator.check_integrity()


def test_beam_search_over_windows_says_what_works() -> None:
    model, inputs = build("gemma3"), prompts(5)
    use_paged_attention(model)
    with pytest.raises(ConfigError, match="allocator='paged'"):
        model.generate(**inputs, num_beams=4, max_new_tokens=20, past_key_values=PagedCache(model, num_blocks=900))


def test_drafts_that_are_wrong_are_cut_off() -> None:
    model = build("llama")
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8] * 5]), "attention_mask": torch.ones(1, 20, dtype=torch.long)}
    options = {"prompt_lookup_num_tokens": 3, "steps": 30}
    expected, cache, cut = generate(model, inputs, steps=30), PagedCache(model, num_blocks=60, block_size=3), []
    crop = cache.crop
    cache.crop = lambda tokens: (cut.append(tokens), crop(tokens))
    given = paged(model, inputs, cache, **options)
    assert (given.tokens == expected.tokens).all()
    assert min(cut) < 0
    cache.allocator.check_integrity()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_chunks_of_prompts_and_turns_continue(name: str) -> None:
    model, inputs = build(name), prompts()
    expected = generate(model, inputs)
    cache = PagedCache(model, num_blocks=300, block_size=4)
    first = paged(model, inputs, cache, steps=9, prefill_chunk_size=6)
    assert ties(Answer(expected.tokens[:, :9], expected.logits[:, :9]), first) == 0
    longer = {
        "input_ids": torch.cat((inputs["input_ids"], first.tokens), 1),
        "attention_mask": torch.cat((inputs["attention_mask"], torch.ones_like(first.tokens)), 1),
    }
    second = generate(model, longer, steps=15, past_key_values=cache)
    assert ties(Answer(expected.tokens[:, 9:], expected.logits[:, 9:]), second) == 0


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-4), ("fp16", 0.02), ("bf16", 0.15), ("fp8", 0.6)])
def test_storage_types_round_and_no_more(dtype: str, limit: float, kv_layout: str) -> None:
    model, inputs = build("llama"), prompts()
    expected = generate(model, inputs, steps=2)
    given = paged(model, inputs, PagedCache(model, num_blocks=100, dtype=dtype, kv_layout=kv_layout), steps=2)
    error = (given.logits - expected.logits)[:, 0].square().mean().sqrt() / expected.logits[:, 0].std()
    assert (0 if dtype == "float32" else 1e-5) < error < limit


def test_a_bfloat16_model_computes_what_its_own_cache_gives() -> None:
    model, inputs = build("qwen3", torch.bfloat16), prompts()
    exact = generate(build("qwen3"), inputs, steps=1).logits
    own = generate(model, inputs, steps=1).logits.float()
    given = paged(model, inputs, PagedCache(model, num_blocks=100), steps=1).logits.float()
    assert (given - exact).square().mean() < 1.5 * (own - exact).square().mean()
