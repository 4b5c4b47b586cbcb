"""A serving engine gives the tokens of transformers' own generate, whatever the scheduler does to a request on the way."""

import sys
from typing import Any

import numpy as np
import pytest

from pagedkv.errors import ConfigError

torch = pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("pagedkv.runtime")
transformers = pytest.importorskip("transformers", reason="the runtime's models are transformers'")

from tiny_models import COMMON, MODELS, TIE, VOCAB, WINDOW, Answer, build, generate

from pagedkv.runtime.engine import LLMEngine
from pagedkv.runtime.model_layers import model_layers
from pagedkv.runtime.sampling import Sampler, SamplingParams, sample
from pagedkv.runtime.storage_layout import plan_storage

STEPS = 20


def shared_prompts(count: int = 16, *, seed: int = 0) -> list[list[int]]:
    """Ragged prompts, half of them behind one system prompt, two the same."""
    rng = np.random.default_rng(seed)
    system = rng.integers(2, VOCAB, 18).tolist()
    prompts = [(system if i % 2 else []) + rng.integers(2, VOCAB, int(rng.integers(1, 16))).tolist() for i in range(count - 1)]
    return [*prompts, prompts[1]]


def contiguous(model: Any, prompts: list[list[int]], **options: Any) -> Answer:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    model.set_attn_implementation("eager")
    return generate(model, {"input_ids": ids, "attention_mask": mask}, **options)


def tight(model: Any, **options: Any) -> LLMEngine:
    """An engine that has to preempt and to cut prompts; its memory is NaN before.

    `num_blocks` are those of all layers: it has as many more as a block has fewer layers, less a quarter that windows do not need.
    """
    limits = {"num_blocks": 22, "block_size": 4, "max_num_seqs": 6, "max_num_batched_tokens": 16} | options
    if not {"speculative_model", "disable_hybrid_kv_cache_manager"} & set(options):
        groups = plan_storage(model_layers(model.config, with_states=True), share_windows=True).num_groups
        limits["num_blocks"] = limits["num_blocks"] * groups * (3 if groups > 1 else 4) // 4
    engine = LLMEngine(model, **limits)
    for tensor in engine.storage._tensors:
        tensor.fill_(torch.nan)
    return engine


def ties(expected: Answer, given: list[list[int]]) -> int:
    """Return how many texts part ways at a tie; fail if one does for another reason."""
    parted = 0
    for row, tokens in enumerate(given):
        right = expected.tokens[row].tolist()
        if tokens != right:
            first = next(i for i, pair in enumerate(zip(tokens, right, strict=True)) if pair[0] != pair[1])
            best = expected.logits[row, first].topk(2).values
            assert best[0] - best[1] < TIE, f"text {row} differs at token {first}, where the best logits are {best.tolist()}"
            parted += 1
    return parted


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_the_contiguous_cache(name: str, *, caching: bool) -> None:
    model, prompts = build(name), shared_prompts()
    expected = contiguous(model, prompts, steps=STEPS)
    engine = tight(model, enable_prefix_caching=caching)
    given = engine.generate(prompts, max_tokens=STEPS)
    known = engine.scheduler.requests.arrays[: len(prompts)]
    preemptions, hits = int(known["num_preemptions"].sum()), int(known["num_hit_tokens"].sum())
    parted = ties(expected, [text.tokens for text in given])
    sys.stdout.write(f"{name}, caching {caching}: {preemptions} preemptions, {hits} tokens found, {parted} texts part at a tie\n")
    assert preemptions > 2
    assert (hits > 50) is caching
    assert {text.finish_reason for text in given} == {"length"}
    assert engine.allocator.free_slots == engine.allocator.usable_slots
    engine.scheduler.check_integrity()


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
def test_windows_hold_no_more_than_they_see(name: str) -> None:
    """The same texts over one table for all layers, which keeps all tokens, and over one for each group, in fewer bytes."""
    model, prompt = build(name), shared_prompts()[1]
    held, texts = {}, {}
    for one_table in (True, False):
        engine = LLMEngine(model, num_blocks=300, block_size=4, disable_hybrid_kv_cache_manager=one_table)
        engine.add_request(prompt, max_tokens=90)
        new = [engine.step()]
        while engine.num_unfinished:
            held[one_table] = (engine.allocator.usable_slots - engine.allocator.free_slots) // engine.allocator.unit_slots
            held[one_table] *= engine.storage.block_bytes
            new.append(engine.step())
        texts[one_table] = [each.token for step in new for each in step]
    assert texts[True] == texts[False]
    full, sliding = (sum(layer.kind == kind for layer in engine.models.layers) for kind in ("full", "sliding_window"))
    tokens, window_blocks = len(prompt) + 88, -(-(WINDOW + 3) // 4)
    assert held[True] == (full + sliding) * -(-tokens // 4) * 4 * 2 * 2 * 16 * 4
    assert held[False] <= (full * -(-tokens // 4) + sliding * window_blocks) * 4 * 2 * 2 * 16 * 4


def test_blocks_that_one_step_fills_are_read_by_another_entry_of_it() -> None:
    model, prompt = build("qwen3"), shared_prompts()[1]
    expected = contiguous(model, [prompt], steps=6).tokens.tolist()
    engine = tight(model, max_num_batched_tokens=200)
    assert [text.tokens for text in engine.generate([prompt] * 4, max_tokens=6)] == expected * 4
    assert engine.scheduler.requests.arrays["num_cached_tokens"][1:4].all()


def test_a_text_ends_at_its_end_token() -> None:
    model, prompts = build("llama"), shared_prompts()
    whole = contiguous(model, prompts, steps=STEPS).tokens.tolist()
    ends = {whole[0][7], whole[3][2]}
    engine = tight(model)
    for text, all_tokens in zip(engine.generate(prompts, max_tokens=STEPS, eos_token_id=ends), whole, strict=True):
        first = next((i + 1 for i, token in enumerate(all_tokens) if token in ends), STEPS)
        assert text.tokens == all_tokens[:first]
        assert text.finish_reason == ("stop" if text.tokens[-1] in ends else "length")
    assert engine.allocator.free_slots == engine.allocator.usable_slots
    engine.scheduler.check_integrity()


def test_whoever_is_aborted_frees_blocks_at_once_and_disturbs_nobody() -> None:
    model, prompts, rng = build("llama"), shared_prompts(24), np.random.default_rng(5)
    whole = contiguous(model, prompts, steps=STEPS).tokens.tolist()
    engine = tight(model)
    for prompt in prompts:
        engine.add_request(prompt, max_tokens=STEPS)
    texts: dict[int, list[int]] = {}
    aborted, freed = set[int](), 0
    while engine.num_unfinished:
        for new in engine.step():
            texts.setdefault(new.request, []).append(new.token)
        running = engine.scheduler.arrays.running[: engine.scheduler.num_running].tolist()
        victim = int(rng.choice(running)) if running and len(aborted) % 2 else int(rng.integers(24))
        if len(aborted) < 12 and rng.random() < 0.3:
            free = engine.allocator.free_slots
            if engine.abort(victim):
                aborted.add(victim)
                freed += engine.allocator.free_slots > free
            engine.scheduler.check_integrity()
    assert len(aborted) == 12
    assert freed >= 6
    assert [texts[i] for i in range(24) if i not in aborted] == [whole[i] for i in range(24) if i not in aborted]
    assert engine.allocator.free_slots == engine.allocator.usable_slots
    assert not engine.abort(0)


def test_a_seed_fixes_the_text_whoever_else_is_there() -> None:
    model, prompts = build("llama"), shared_prompts()
    params = SamplingParams(temperature=0.9, top_k=30, top_p=0.95, seed=11)
    crowded = tight(model)
    texts = crowded.generate(prompts, max_tokens=STEPS, sampling=params)
    assert crowded.scheduler.requests.arrays["num_preemptions"].sum() > 2
    alone = [tight(model, num_blocks=60).generate([prompt], max_tokens=STEPS, sampling=params)[0] for prompt in prompts[:5]]
    assert texts[:5] == alone
    other = tight(model).generate(prompts, max_tokens=STEPS, sampling=SamplingParams(temperature=0.9, seed=12))
    assert sum(a == b for a, b in zip(texts, other, strict=True)) < 4


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.6), (0.8, 12, 0.8)])
def test_tokens_are_drawn_from_the_distribution_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(1)) * 2
    wanted = transformers.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        wanted = transformers.TopKLogitsWarper(top_k)(None, wanted)
    wanted = transformers.TopPLogitsWarper(top_p)(None, wanted).softmax(-1)[0]
    count = 4000
    params = [SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=i) for i in range(count)]
    drawn = torch.bincount(torch.tensor(sample(logits.expand(count, -1), [Sampler(each) for each in params])), minlength=20)
    assert not drawn[wanted == 0].any()
    deviation = (drawn - count * wanted).abs() / (count * wanted * (1 - wanted)).clamp(min=1).sqrt()
    assert deviation.max() < 4


def test_greedy_and_sampled_requests_share_a_batch() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    greedy, hot = Sampler(SamplingParams()), SamplingParams(temperature=5.0, seed=3)
    first = sample(logits, [greedy, Sampler(hot), greedy])
    assert first[0] == int(logits[0].argmax())
    assert first[2] == int(logits[2].argmax())
    assert first[1:2] == sample(logits[1:2], [Sampler(hot)])
    assert sample(logits[:0], []) == []


@pytest.mark.parametrize("temperature", [1e-6, 1e-300, 5e-324])
def test_next_to_temperature_0_the_likeliest_token_is_drawn(temperature: float) -> None:
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(1)) * 4 + 3
    drawn = sample(logits, [Sampler(SamplingParams(temperature=temperature, seed=seed)) for seed in range(20)])
    assert drawn == logits.argmax(-1).tolist()


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_what_is_no_distribution_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="needs"):
        SamplingParams(**options)


def test_misuse_says_what_works() -> None:
    model = build("llama")
    engine = tight(model)
    with pytest.raises(ConfigError, match="0 to 96"):
        engine.add_request([97], max_tokens=3)
    with pytest.raises(ConfigError, match="1 or more prompt"):
        engine.add_request([], max_tokens=3)
    assert engine.add_request([5] * 80, max_tokens=6) is None
    with pytest.raises(ConfigError, match="prompt 1 of 80 tokens and 6 new ones: prompt and output have room for 85"):
        engine.generate([[5], [5] * 80], max_tokens=6)
    assert engine.num_unfinished == engine.scheduler.num_waiting == 0
    assert engine.step() == []
    assert len(engine.generate([[5] * 80], max_tokens=5)[0].tokens) == 5
    with pytest.raises(ConfigError, match="the model takes 512"):
        tight(model, max_model_len=513)
    assert tight(model, max_model_len=512).allocator.max_model_len == 512


@pytest.mark.parametrize(("name", "one_table"), [("llama", True), ("gemma3", True), ("gemma3", False)])
@pytest.mark.parametrize("limit", [512, 0])  # 0: none
@pytest.mark.parametrize("most_tokens", [5, 40])
def test_the_longest_text_is_what_the_pool_holds(name: str, limit: int, most_tokens: int, *, one_table: bool) -> None:
    """Whoever asks for the longest text gets it, and for one token more is refused, whether or not the model has a limit."""
    model = build(name)
    model.config.max_position_embeddings = limit
    sizes = {"num_blocks": 23, "block_size": 4, "max_num_batched_tokens": most_tokens}
    engine = LLMEngine(model, disable_hybrid_kv_cache_manager=one_table, **sizes)
    most = engine.allocator.max_model_len
    assert engine.add_request([5] * (most - 3), max_tokens=4) is None
    assert len(engine.generate([[5] * (most - 3)], max_tokens=3)[0].tokens) == 3
    longer = LLMEngine(model, disable_hybrid_kv_cache_manager=one_table, max_model_len=500, **sizes)
    assert longer.allocator.max_model_len == 500
    assert longer.add_request([5] * (most - 3), max_tokens=4) is None
    assert longer.add_request([5] * (most - 3), max_tokens=3) is not None


def test_a_window_leaves_more_room_to_prompts_that_come_in_chunks() -> None:
    model, most = build("gemma3"), []
    for most_tokens in (40, 5):
        most.append(LLMEngine(model, num_blocks=43, block_size=4, max_num_batched_tokens=most_tokens).allocator.max_model_len)
    assert most[1] > most[0]


def test_an_admission_leaves_the_watermark_free_while_something_runs() -> None:
    model, running = build("llama"), {}
    for watermark in (0.0, 0.5):
        engine = LLMEngine(model, num_blocks=17, block_size=4, watermark=watermark, enable_prefix_caching=False)
        for _ in range(2):
            engine.add_request([5] * 20, max_tokens=8)
        engine.step()
        running[watermark] = engine.scheduler.num_running
    assert running == {0.0: 2, 0.5: 1}


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        ("Mamba2ForCausalLM", "Mamba2Config", "has no layer of attention"),
        ("LlamaForCausalLM", "LlamaConfig", "depend on its company"),
    ],
)
def test_models_that_cannot_be_packed_are_refused(model: str, config: str, message: str) -> None:
    rope = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}} if config == "LlamaConfig" else {}
    heads = {"num_heads": 8, "head_dim": 16} if config == "Mamba2Config" else {}
    small = getattr(transformers, model)(getattr(transformers, config)(**COMMON | {"num_hidden_layers": 4} | rope | heads))
    with pytest.raises(ConfigError, match=message):
        LLMEngine(small, num_blocks=10)
