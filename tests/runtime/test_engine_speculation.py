"""With a draft model an engine says what it would say alone, and decides as the simulator does, given the same accepted counts."""

import copy
import sys
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("pagedkv.runtime")
transformers = pytest.importorskip("transformers", reason="the runtime's models are transformers'")

from shadow import Shadow, ragged_asks, serve
from test_engine import STEPS, contiguous, shared_prompts, ties, tight
from tiny_models import COMMON, MODELS, build, draft_of

from pagedkv.allocation import KVPoolSettings
from pagedkv.errors import ConfigError
from pagedkv.runtime.engine import LLMEngine
from pagedkv.runtime.model_layers import model_layers
from pagedkv.runtime.sampling import Sampler, SamplingParams, distributions
from pagedkv.runtime.storage import PagedKVStorage
from pagedkv.runtime.storage_layout import plan_storage
from pagedkv.runtime.verification import Drafts, acceptance, residual, verify
from pagedkv.scheduling.waiting import NUM_ACCEPTED, NUM_DRAFTED

TINY = 5
"""Words of a vocabulary whose texts can all be enumerated."""


def counted(engine: LLMEngine) -> tuple[int, int]:
    """Return tokens drafted and accepted."""
    counts = engine.scheduler.arrays.counts
    return int(counts[NUM_DRAFTED]), int(counts[NUM_ACCEPTED])


@pytest.mark.parametrize(("name", "caching"), [*((name, True) for name in MODELS), ("llama", False)])
def test_greedy_tokens_are_those_of_the_contiguous_cache(name: str, *, caching: bool) -> None:
    model, prompts = build(name), shared_prompts()
    expected = contiguous(model, prompts, steps=STEPS)
    draft = draft_of(model, noise=0.005 if name in ("gpt_oss", "mixtral") else 0.03)  # a router takes little shaking
    engine = tight(model, enable_prefix_caching=caching, speculative_model=draft, num_speculative_tokens=3)
    texts: dict[int, list[int]] = {engine.add_request(prompt, max_tokens=STEPS): [] for prompt in prompts}  # type: ignore[misc]
    while engine.num_unfinished:
        for new in engine.step():
            texts[new.request].append(new.token)
        engine.scheduler.check_integrity()
    known = engine.scheduler.requests.arrays[: len(prompts)]
    preemptions, hits = int(known["num_preemptions"].sum()), int(known["num_hit_tokens"].sum())
    parted, (drafted, accepted) = ties(expected, list(texts.values())), counted(engine)
    sys.stdout.write(
        f"{name}, caching {caching}: {accepted} of {drafted} drafts accepted, {preemptions} preemptions, {hits} tokens found, "
        f"{parted} texts part at a tie\n"
    )
    assert 0.2 * drafted < accepted < 0.98 * drafted
    assert preemptions > 2
    assert (hits > 50) is caching
    assert engine.allocator.free_slots == engine.allocator.usable_slots


def test_a_draft_model_that_is_the_target_is_always_right() -> None:
    """Also where all drafts are accepted, and the draft model has a token to catch up with: none may differ from the cache's."""
    model, prompts = build("qwen3"), shared_prompts()
    expected = contiguous(model, prompts, steps=STEPS)
    roomy = {"num_blocks": 200, "max_num_seqs": 16, "max_num_batched_tokens": 400}
    engine = tight(model, speculative_model=copy.deepcopy(model), num_speculative_tokens=4, **roomy)
    engine.generate(prompts, max_tokens=STEPS)  # whose blocks are found by those that follow: of both models
    given = engine.generate(prompts, max_tokens=STEPS)
    assert ties(expected, [text.tokens for text in given]) == 0
    drafted, accepted = counted(engine)
    per_text = -(-(STEPS - 1) // 5) * 5 - (STEPS - 1)  # drafts behind the last token count as drafted
    assert drafted - accepted == 2 * len(prompts) * per_text
    assert engine.scheduler.requests.arrays["num_hit_tokens"][len(prompts) : 2 * len(prompts)].sum() > 50


def test_a_draft_model_of_another_architecture() -> None:
    model, prompts = build("llama"), shared_prompts()
    torch.manual_seed(1)
    small = transformers.Qwen3Config(**COMMON | {"num_hidden_layers": 1, "num_key_value_heads": 1, "head_dim": 32})
    draft = transformers.Qwen3ForCausalLM(small).eval()
    expected = contiguous(model, prompts, steps=STEPS)
    engine = tight(model, speculative_model=draft, num_speculative_tokens=2)
    assert ties(expected, [text.tokens for text in engine.generate(prompts, max_tokens=STEPS)]) == 0
    drafted, accepted = counted(engine)
    assert accepted < 0.3 * drafted


def test_both_models_keys_share_blocks_and_budget() -> None:
    model = build("llama")
    draft = transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON | {"num_hidden_layers": 1}))
    alone = LLMEngine(model, budget_bytes=10**6, block_size=4)
    both = LLMEngine(model, budget_bytes=10**6, block_size=4, speculative_model=draft, num_speculative_tokens=2)
    of_draft = PagedKVStorage(plan_storage(model_layers(draft.config), block_size=4), num_blocks=2)
    assert both.storage.block_bytes == alone.storage.block_bytes + of_draft.block_bytes
    assert both.storage.num_blocks == 10**6 // both.storage.block_bytes < alone.storage.num_blocks


def test_a_text_ends_at_its_end_token_though_more_was_accepted() -> None:
    model, prompts = build("llama"), shared_prompts()
    whole = contiguous(model, prompts, steps=STEPS).tokens.tolist()
    ends = {whole[0][7], whole[3][2]}
    engine = tight(model, speculative_model=copy.deepcopy(model), num_speculative_tokens=5)
    for text, all_tokens in zip(engine.generate(prompts, max_tokens=STEPS, eos_token_id=ends), whole, strict=True):
        first = next((i + 1 for i, token in enumerate(all_tokens) if token in ends), STEPS)
        assert text.tokens == all_tokens[:first]
        assert text.finish_reason == ("stop" if text.tokens[-1] in ends else "length")
    assert engine.allocator.free_slots == engine.allocator.usable_slots
    engine.scheduler.check_integrity()


@pytest.mark.parametrize("max_model_len", [None, 61])
def test_texts_as_long_as_can_be(max_model_len: int | None) -> None:
    """Drafts go no further than max-model-len, and the longest text that the pool holds can be asked for."""
    model = build("llama")
    engine = tight(model, num_blocks=16, max_model_len=max_model_len, speculative_model=draft_of(model), num_speculative_tokens=4)
    most = 60 if max_model_len is None else 57
    assert engine.scheduler.settings.max_model_len == (max_model_len or 60)
    assert engine.add_request([5] * 40, max_tokens=most - 39) is None
    assert f"room for {most} together" in engine.too_long(40, most - 39)
    assert len(engine.generate([[5] * 40], max_tokens=most - 40)[0].tokens) == most - 40
    engine.scheduler.check_integrity()


@pytest.mark.parametrize(("policy", "caching"), [("fcfs", True), ("priority", True), ("fcfs", False)])
def test_drafts_are_scheduled_as_the_simulator_schedules_them(*, caching: bool, policy: str) -> None:
    limits = {"max_num_seqs": 12, "max_num_batched_tokens": 48, "max_model_len": 120}
    model = build("llama")
    engine = tight(
        model,
        num_blocks=60,
        enable_prefix_caching=caching,
        policy=policy,
        speculative_model=draft_of(model),
        num_speculative_tokens=3,
        **limits,
    )
    pool = KVPoolSettings(
        num_blocks=60, block_size=4, max_num_seqs=12, max_model_len=120, enable_prefix_caching=caching, lookahead_slots=3
    )
    shadow, asks = Shadow(engine, pool), ragged_asks(64)
    texts = serve(engine, shadow, asks)
    assert [len(text) for text in texts] == [ask.max_tokens for ask in asks]
    assert counted(engine) == tuple(shadow.scheduler.arrays.counts[[NUM_DRAFTED, NUM_ACCEPTED]])
    assert shadow.preemptions > 5
    assert shadow.chunks > 5
    assert counted(engine)[1] > 100


def small_pair() -> tuple[Any, Any]:
    """Return a target and a draft model of a tiny vocabulary, which disagree."""
    torch.manual_seed(4)
    sizes = COMMON | {"vocab_size": TINY, "num_hidden_layers": 2, "bos_token_id": None, "pad_token_id": None}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    return model, draft_of(model, noise=0.15)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.8)])
def test_accepted_or_replaced_a_token_has_the_targets_distribution(top_k: int, top_p: float) -> None:
    """Exactly: the sum over all drafts of what becomes of each."""
    rng = torch.Generator().manual_seed(2)
    sampler = Sampler(SamplingParams(temperature=0.9, top_k=top_k, top_p=top_p))
    target, draft = (distributions(torch.randn(50, TINY, generator=rng) * 2, [sampler] * 50) for _ in range(2))
    chances, rest = acceptance(target, draft), residual(target, draft)
    out = draft * chances + (draft * (1 - chances)).sum(-1, keepdim=True) * rest
    torch.testing.assert_close(out, target, rtol=0, atol=1e-14)
    same = draft[:1]
    assert (acceptance(same, same)[same > 0] == 1).all()
    torch.testing.assert_close(residual(same, same), same)


def enumerated(model: Any, prompt: list[int], length: int, params: SamplingParams) -> Any:
    """Return the probability of each text of `length` tokens [TINY] * length, by the model's own cache-less forward."""
    texts = torch.cartesian_prod(*[torch.arange(TINY)] * length)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = model(torch.cat((torch.tensor(prompt).expand(len(texts), -1), texts), 1)).logits
    chances = torch.ones(len(texts), dtype=torch.float64)
    for i in range(length):
        row = distributions(logits[:, len(prompt) - 1 + i], [Sampler(params)] * len(texts))
        chances *= row.gather(-1, texts[:, i : i + 1])[:, 0]
    return chances.view((TINY,) * length)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 0.95)])
def test_drawn_texts_have_the_distribution_of_the_target_alone(top_k: int, top_p: float) -> None:
    model, draft = small_pair()
    count, length, prompt = 2000, 4, [1, 2, 3]

    def params(seed: int) -> SamplingParams:
        return SamplingParams(temperature=1.2, top_k=top_k, top_p=top_p, seed=seed)

    wanted = enumerated(model, prompt, length, params(0)).flatten()
    engine = LLMEngine(model, num_blocks=1000, block_size=4, speculative_model=draft, num_speculative_tokens=2)
    for seed in range(count):
        engine.add_request(prompt, max_tokens=length, sampling=params(seed))
    texts: list[list[int]] = [[] for _ in range(count)]
    while engine.num_unfinished:
        for new in engine.step():
            texts[new.request].append(new.token)
    places = (torch.tensor(texts) * TINY ** torch.arange(length - 1, -1, -1)).sum(1)
    drawn = torch.bincount(places, minlength=TINY**length).double()
    drafted, accepted = counted(engine)
    assert 0.2 * drafted < accepted < 0.9 * drafted
    assert not drawn[wanted == 0].any()
    often = count * wanted >= 5  # the others in one
    drawn = torch.cat((drawn[often], drawn[~often].sum()[None]))
    hoped = count * torch.cat((wanted[often], wanted[~often].sum()[None]))
    chi2, freedom = float(((drawn - hoped) ** 2 / hoped.clamp(min=1e-9)).sum()), len(hoped) - 1
    sys.stdout.write(f"{accepted} of {drafted} accepted, chi2 {chi2:.1f} with {freedom} degrees of freedom\n")
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5


def test_the_same_seed_gives_the_same_text_alone() -> None:
    model, prompt = build("llama"), shared_prompts()[1]
    params = SamplingParams(temperature=0.9, seed=3)
    first, second = (
        tight(model, num_blocks=60, speculative_model=draft_of(model), num_speculative_tokens=3).generate(
            [prompt], max_tokens=STEPS, sampling=params
        )
        for _ in range(2)
    )
    assert first == second


def test_greedy_and_drawn_texts_with_and_without_drafts_are_verified_together() -> None:
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(1))
    best = logits.argmax(-1).tolist()
    greedy, hot = Sampler(SamplingParams()), [Sampler(SamplingParams(temperature=2.0, seed=seed)) for seed in range(2)]
    right, wrong = Drafts(best[1:2]), Drafts([best[3], (best[4] + 1) % 50])
    drawn = Drafts([7], [torch.full((50,), -100.0).index_fill(0, torch.tensor([7]), 0.0)])
    texts = verify(logits, [Drafts(), right, wrong, drawn], [hot[0], greedy, greedy, hot[1]])
    assert texts[1] == best[1:3]
    assert texts[2] == best[3:5]
    assert len(texts[0]) == 1
    assert texts[3][0] != 7  # it was certain to be drafted, and is not certain to be said
    assert verify(logits[:0], [], []) == []


@pytest.mark.parametrize(
    ("change", "number", "message"),
    [
        ({"vocab_size": 96}, 2, "96 words, the target llama 97: a draft model needs the vocabulary"),
        ({}, 0, "num-speculative-tokens is 0: a draft model needs 1 to 64"),
        ({}, 65, "needs 1 to 64"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, 2, "depend on its company"),
        (None, 2, "num-speculative-tokens is 2: nothing drafts"),
        ({"dtype": "bfloat16"}, 2, "the draft model is torch.bfloat16, the target torch.float32: both share blocks"),
    ],
)
def test_drafts_that_cannot_be_are_refused(change: dict[str, Any] | None, number: int, message: str) -> None:
    model, draft = build("llama"), None
    if change is not None:
        dtype = getattr(torch, change.get("dtype", "float32"))
        draft = transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON | change)).to(dtype)
    with pytest.raises(ConfigError, match=message):
        LLMEngine(model, num_blocks=10, speculative_model=draft, num_speculative_tokens=number)


def test_numbers_of_the_two_clocks_stay_whole() -> None:
    """An interrupted step aside, tokens handed out are tokens counted."""
    model, prompts = build("llama"), shared_prompts()
    engine = tight(model, speculative_model=draft_of(model), num_speculative_tokens=3)
    for prompt in prompts:
        engine.add_request(prompt, max_tokens=STEPS)
    while engine.num_unfinished:
        given = len(engine.step())
        assert given == engine.scheduler.num_output_tokens
    requests = engine.scheduler.requests.arrays[: len(prompts)]
    np.testing.assert_array_equal(requests["num_known_tokens"] - requests["prompt_tokens"], STEPS)
