"""Several texts of one prompt and beams share its blocks until they write to them, and are what they would be alone."""

import sys
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("pagedkv.runtime")
transformers = pytest.importorskip("transformers", reason="the runtime's models are transformers'")

from shadow import Shadow, ragged_asks
from test_engine import STEPS, contiguous, shared_prompts, tight
from tiny_models import TIE, build, draft_of

from pagedkv.allocation import KVPoolSettings
from pagedkv.errors import ConfigError
from pagedkv.runtime import BeamParams
from pagedkv.runtime.beam_search import BeamSearch
from pagedkv.runtime.engine import LLMEngine
from pagedkv.runtime.sampling import SamplingParams
from pagedkv.scheduling.content import shared_segments

ROOMY: dict[str, Any] = {"num_blocks": 400, "max_num_seqs": 64, "max_num_batched_tokens": 400}
HOT = SamplingParams(temperature=1.0, seed=5)


def checked(engine: LLMEngine, *requests: int | None) -> dict[tuple[int, int], list[int]]:
    """Serve all that is there; after every step everything must be in order, and all blocks be free in the end."""
    texts: dict[tuple[int, int], list[int]] = {}
    while engine.num_unfinished:
        for new in engine.step():
            texts.setdefault((new.request, new.text), []).append(new.token)
        engine.scheduler.check_integrity()
    assert engine.allocator.free_slots == engine.allocator.usable_slots
    assert set(requests) <= {request for request, _ in texts}
    return texts


@pytest.mark.parametrize(("caching", "drafts"), [(True, 0), (False, 0), (True, 3)])
def test_greedy_forks_say_what_one_text_says(*, caching: bool, drafts: int) -> None:
    model, prompts = build("qwen3"), shared_prompts(8)
    whole = contiguous(model, prompts, steps=STEPS).tokens.tolist()
    more = {"speculative_model": draft_of(model), "num_speculative_tokens": drafts} if drafts else {}
    for limits in (ROOMY, {}):  # in the small pool forks are preempted, one by one
        engine = tight(model, enable_prefix_caching=caching, **limits, **more)
        numbers = [engine.add_request(prompt, max_tokens=STEPS, n=3) for prompt in prompts]
        texts = checked(engine, *numbers)
        assert [texts[number, place] for number in numbers for place in range(3)] == [text for text in whole for _ in range(3)]
        assert bool(engine.scheduler.requests.arrays["num_preemptions"].sum() > 2) is (limits is not ROOMY)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_each_of_several_texts_is_what_it_would_be_alone(name: str) -> None:
    model, prompts = build(name), shared_prompts(6)
    together = tight(model, **ROOMY).generate(prompts, max_tokens=STEPS, sampling=HOT, n=4)
    for place in range(4):
        params = SamplingParams(temperature=1.0, seed=5 + place)
        assert together[place::4] == tight(model, **ROOMY).generate(prompts, max_tokens=STEPS, sampling=params)
    assert len({tuple(text.tokens) for text in together}) > 12


def most_held(engine: LLMEngine) -> int:
    """Serve all, and return the most blocks that were held at once."""
    most = 0
    while engine.num_unfinished:
        engine.step()
        most = max(most, (engine.allocator.usable_slots - engine.allocator.free_slots) // engine.allocator.unit_slots)
    return most


@pytest.mark.parametrize("caching", [True, False])
def test_forks_hold_fewer_blocks_than_requests_of_their_own(*, caching: bool) -> None:
    model, prompt = build("llama"), shared_prompts()[1] * 3
    assert len(prompt) % 4
    options: dict[str, Any] = {"max_tokens": 6, "sampling": HOT}
    forked, apart = (tight(model, enable_prefix_caching=caching, **ROOMY) for _ in range(2))
    forked.add_request(prompt, n=5, **options)
    for _ in range(5):
        apart.add_request(prompt, **options)
    one = tight(model, enable_prefix_caching=caching, **ROOMY)
    one.add_request(prompt, **options)
    full, whole = len(prompt) // 4, most_held(one)
    held = most_held(forked), most_held(apart)
    sys.stdout.write(f"caching {caching}: one text {whole} blocks, five as forks {held[0]}, as requests {held[1]}\n")
    assert held[0] == full + 5 * (whole - full)
    assert held[1] == (held[0] if caching else 5 * whole)
    known = forked.scheduler.requests.arrays[:5]
    assert (known["num_known_tokens"] == len(prompt) + 6).all()
    computed = known["num_queried_tokens"][0] - known["num_hit_tokens"][0]
    assert computed == len(prompt)  # once, not five times


def test_a_tail_that_is_shared_is_copied_by_all_writers_but_one() -> None:
    model = build("llama")
    engine = tight(model, enable_prefix_caching=False, **ROOMY)
    engine.add_request([5, 6, 7, 8, 9, 10], max_tokens=4, sampling=HOT, n=4)
    engine.step()
    assert engine.allocator.free_slots == engine.allocator.usable_slots - 8
    engine.step()
    assert len(engine.allocator.copies) == 3
    assert engine.allocator.free_slots == engine.allocator.usable_slots - 4 * (1 + 4)
    checked(engine)


def test_texts_end_one_by_one_even_with_their_first_token() -> None:
    model, prompt = build("llama"), [5, 6, 7, 8, 9, 10]
    whole = tight(model, **ROOMY).generate([prompt], max_tokens=12, sampling=HOT, n=6)
    firsts = [text.tokens[0] for text in whole]
    ends = {firsts[0], whole[3].tokens[5]}
    assert firsts[3] not in ends
    engine = tight(model, **ROOMY)
    cut = engine.generate([prompt], max_tokens=12, sampling=HOT, n=6, eos_token_id=ends)
    for text, everything in zip(cut, whole, strict=True):
        first = next((i + 1 for i, token in enumerate(everything.tokens) if token in ends), 12)
        assert text.tokens == everything.tokens[:first]
        assert text.finish_reason == ("stop" if text.tokens[-1] in ends else "length")
    assert len(cut[0].tokens) == 1
    one_each = tight(model, **ROOMY).generate([prompt], max_tokens=1, sampling=HOT, n=6)
    assert [text.tokens for text in one_each] == [[token] for token in firsts]
    assert engine.allocator.free_slots == engine.allocator.usable_slots


def test_abort_takes_all_texts_and_numbers_survive_forgetting() -> None:
    model, prompts = build("llama"), shared_prompts(6)
    expected = tight(model, **ROOMY).generate(prompts, max_tokens=STEPS, sampling=HOT, n=3)
    engine = tight(model, **ROOMY)
    numbers = {engine.add_request(prompt, max_tokens=STEPS, sampling=HOT, n=3): i for i, prompt in enumerate(prompts)}
    searched = engine.add_request(prompts[0], max_tokens=STEPS, beams=BeamParams(width=3))
    assert searched is not None
    numbers[searched] = 6
    texts: dict[tuple[int, int], list[int]] = {}
    for step in range(60):
        for new in engine.step():
            texts.setdefault((numbers[new.request], new.text), []).append(new.token)
        if step == 4:
            victim = next(number for number, i in numbers.items() if i == 2)
            free = engine.allocator.free_slots
            assert engine.abort(victim)
            assert engine.allocator.free_slots > free
            assert not engine.abort(victim)
        if step % 5 == 3:
            numbers = {new: numbers[old] for old, new in engine.forget_done().items()}
        engine.scheduler.check_integrity()
    assert engine.num_unfinished == 0
    assert all(texts[i, place] == expected[3 * i + place].tokens for i in range(6) if i != 2 for place in range(3))
    assert texts[6, 0] == tight(model, **ROOMY).generate([prompts[0]], max_tokens=STEPS, beams=BeamParams(width=3))[0].tokens
    assert engine.allocator.free_slots == engine.allocator.usable_slots


@pytest.mark.parametrize("caching", [True, False])
def test_one_text_can_be_taken_out_before_and_after_it_forks(*, caching: bool) -> None:
    model, prompts = build("llama"), shared_prompts(5)
    expected = tight(model, **ROOMY).generate(prompts, max_tokens=STEPS, sampling=HOT, n=4)
    for limits in (ROOMY, {}):  # in the small pool some are out while they wait
        for at_step, goes in ((0, (0, 2)), (1, (1,)), (3, (3, 0)), (6, (0, 1, 2))):
            engine = tight(model, enable_prefix_caching=caching, **limits)
            numbers = [engine.add_request(prompt, max_tokens=STEPS, sampling=HOT, n=4) for prompt in prompts]
            texts: dict[tuple[int, int], list[int]] = {}
            step = 0
            while engine.num_unfinished:
                if step == at_step:
                    assert all(engine.abort(number, place) for number in numbers if number is not None for place in goes)
                    assert not any(engine.abort(number, place) for number in numbers if number is not None for place in goes)
                    engine.scheduler.check_integrity()
                for new in engine.step():
                    texts.setdefault((numbers.index(new.request), new.text), []).append(new.token)
                engine.scheduler.check_integrity()
                step += 1
            assert engine.allocator.free_slots == engine.allocator.usable_slots
            for (i, place), tokens in texts.items():
                whole = expected[4 * i + place].tokens
                assert tokens == (whole[: len(tokens)] if place in goes else whole), (i, place, at_step)
            assert {key for key in texts if key[1] not in goes} == {(i, place) for i in range(5) for place in {*range(4)} - {*goes}}
            assert not at_step or all(len(texts.get((i, place), ())) < STEPS for i in range(5) for place in goes)
    searching = tight(model, **ROOMY)
    request = searching.add_request(prompts[0], max_tokens=STEPS, beams=BeamParams(width=2))
    assert request is not None
    with pytest.raises(ConfigError, match="beam search"):
        searching.abort(request, 0)
    assert searching.abort(request)


@pytest.mark.parametrize(("name", "caching"), [("llama", True), ("llama", False), ("gpt_oss", True), ("gpt_oss", False)])
def test_forks_are_scheduled_as_a_scheduler_of_lengths_alone_schedules_them(name: str, *, caching: bool) -> None:
    limits = {"max_num_seqs": 12, "max_num_batched_tokens": 48, "max_model_len": 120}
    engine = tight(build(name), num_blocks=60 if name == "llama" else 40, enable_prefix_caching=caching, **limits)
    pool = KVPoolSettings(
        num_blocks=engine.storage.num_blocks,
        block_size=4,
        enable_prefix_caching=caching,
        layer_groups=engine.models.layers if engine.models.layers_apart else (),
        **limits,
    )
    shadow = Shadow(engine, pool)
    asks, arrived, step = ragged_asks(24), 0, 0
    while arrived < len(asks) or engine.num_unfinished:
        while arrived < len(asks) and asks[arrived].arrival_step <= step:
            ask, number = asks[arrived], engine.scheduler.requests.size
            # the whole prompt is shared with forks, and nothing else: no two forks draw alike for long
            content = shared_segments(np.array([100 + arrived]), np.array([len(ask.prompt)]))
            seed = SamplingParams(temperature=100.0, seed=50 * arrived)
            assert engine.add_request([2 + arrived, *ask.prompt[1:]], max_tokens=ask.max_tokens, sampling=seed, n=3) == number
            shadow.add(ask._replace(content=content), ask.max_tokens)
            arrived += 1
        engine.step()
        step += 1
    engine.scheduler.check_integrity()
    assert engine.allocator.free_slots == engine.allocator.usable_slots
    sys.stdout.write(f"caching {caching}: {shadow.forks} forks, {shadow.copies} copies, {shadow.preemptions} preemptions\n")
    assert shadow.forks > 30
    assert shadow.copies > 20
    assert shadow.preemptions > 5


def searched(model: Any, prompt: list[int], *, steps: int, width: int, ends: list[int], penalty: float, early: bool) -> Any:
    """Return what transformers' own beam search finds: texts by score."""
    model.set_attn_implementation("eager")
    options = {"num_beams": width, "num_return_sequences": width, "length_penalty": penalty, "early_stopping": early}
    found = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=steps,
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    rows = found.sequences[:, len(prompt) :].tolist()
    texts = [row[: next((i + 1 for i, token in enumerate(row) if token in ends), steps)] for row in rows]
    return texts, found.sequences_scores.tolist()


@pytest.mark.parametrize(
    ("name", "width", "num_ends", "penalty", "early"),
    [
        ("llama", 4, 0, 1.0, False),
        ("llama", 3, 3, 1.0, True),
        ("qwen3", 4, 4, 0.0, False),
        ("gemma3", 2, 5, 2.0, False),
        ("gpt_oss", 5, 6, 1.0, False),
        ("qwen3_next", 4, 4, 1.0, False),
        ("qwen3_next", 3, 0, 1.0, True),
    ],
)
def test_beams_are_those_of_transformers(name: str, width: int, num_ends: int, penalty: float, *, early: bool) -> None:
    model, prompts = build(name), [prompt[-7:] for prompt in shared_prompts(8)]
    ends = list(range(10, 10 + num_ends))
    wanted = [searched(model, prompt, steps=14, width=width, ends=ends, penalty=penalty, early=early) for prompt in prompts]
    beams = BeamParams(width=width, length_penalty=penalty, early_stopping=early)
    preemptions, held = 0, 0
    blocks_each = 7 if name in ("gemma3", "gpt_oss") else 5
    small = {"num_blocks": 1 + blocks_each * width, "max_num_seqs": 6 * width, "max_num_batched_tokens": 80}
    for limits in (ROOMY, small):
        engine = tight(model, **limits)
        numbers = [engine.add_request(prompt, max_tokens=14, eos_token_id=ends, beams=beams, n=width) for prompt in prompts]
        found: dict[tuple[int | None, int], Any] = {}
        texts: dict[tuple[int | None, int], list[int]] = {}
        while engine.num_unfinished:
            for new in engine.step():
                texts.setdefault((new.request, new.text), []).append(new.token)
                if new.finish_reason is not None:
                    found[new.request, new.text] = new.score
            held += int((engine.scheduler.step_arrays.batch["num_accepted_tokens"] < 0).any())
            engine.scheduler.check_integrity()
        assert engine.allocator.free_slots == engine.allocator.usable_slots
        preemptions += int(engine.scheduler.requests.arrays["num_preemptions"].sum())
        for number, (right, scores) in zip(numbers, wanted, strict=True):
            np.testing.assert_allclose([found[number, place] for place in range(width)], scores, atol=TIE)
            for place in range(width):
                clear = all(abs(scores[place] - other) > TIE for i, other in enumerate(scores) if i != place)
                assert texts[number, place] == right[place] or not clear
    sys.stdout.write(f"{name}: {preemptions} preemptions, {held} steps with beams that waited\n")
    assert preemptions > 0
    assert held > 0


def test_beams_that_hold_room_for_each_other_are_untangled() -> None:
    """The pool is just large enough for one search, and there are eight, and texts besides: all must end."""
    model, prompts = build("llama"), [[5 + i, 6 + 2 * i] for i in range(8)]
    beams = BeamParams(width=2)
    greedy = contiguous(model, prompts, steps=24).tokens.tolist()
    alone = tight(model, **ROOMY).generate(prompts, max_tokens=24, beams=beams)
    engine = tight(model, num_blocks=17, max_num_seqs=16, max_num_batched_tokens=60, enable_prefix_caching=False)
    untangled, untangle = [], engine.texts.untangle
    engine.texts.untangle = lambda: untangled.append(untangle())  # type: ignore[method-assign,func-returns-value]
    searches = [engine.add_request(prompt, max_tokens=24, beams=beams) for prompt in prompts]
    plain = [engine.add_request(prompt, max_tokens=24) for prompt in prompts]
    texts = checked(engine, *searches, *plain)
    assert [texts[number, 0] for number in searches] == [text.tokens for text in alone]  # type: ignore[index]
    assert [texts[number, 0] for number in plain] == greedy  # type: ignore[index]
    sys.stdout.write(f"untangled {len(untangled)} times\n")
    assert untangled


def test_all_beams_go_on_though_most_of_the_best_continuations_end() -> None:
    search = BeamSearch(params=BeamParams(width=2), ends=frozenset(range(5)), max_tokens=9)
    logits = torch.full((1, 40), -50.0)
    logits[0, [0, 5, 1, 2, 3, 6]] = -torch.arange(6.0)
    assert search.advance(logits) == [0, 0]
    assert search.texts == [[5], [6]]
    assert [each.tokens for each in search.finished] == [[0]]


def test_beams_share_blocks() -> None:
    model, prompt = build("llama"), shared_prompts()[1] * 3
    engine, one = (tight(model, enable_prefix_caching=False, **ROOMY) for _ in range(2))
    engine.add_request(prompt, max_tokens=8, beams=BeamParams(width=6))
    one.add_request(prompt, max_tokens=8)
    assert most_held(engine) <= len(prompt) // 4 + 6 * (most_held(one) - len(prompt) // 4)


@pytest.mark.parametrize(
    ("engine", "request_", "message"),
    [
        ({}, {"n": 0}, "n is 0: needs 1 or more"),
        ({}, {"beams": (2, HOT)}, "draws nothing; needs temperature 0"),
        ({}, {"beams": (2, None), "n": 3}, "3 texts of 2 beams"),
        ({"max_num_seqs": 3}, {"beams": (4, None)}, "max-num-seqs is 3, needs 4"),
        ({"max_num_batched_tokens": 4}, {"beams": (5, None)}, "max-num-batched-tokens is 4, needs 5"),
        ({"policy": "priority"}, {"beams": (2, None)}, "needs fcfs"),
        ({"max_num_seqs": 60, "max_num_batched_tokens": 60}, {"beams": (50, None)}, "look at 100 continuations: the model has 97"),
        ({"draft": True}, {"beams": (2, None)}, "use one of both"),
    ],
)
def test_forks_that_cannot_be_are_refused(engine: dict[str, Any], request_: dict[str, Any], message: str) -> None:
    model = build("llama")
    if engine.pop("draft", False):
        engine = {"speculative_model": draft_of(model), "num_speculative_tokens": 2}
    one, more = tight(model, **engine), dict(request_)
    if "beams" in more:
        width, sampling = more["beams"]
        more["beams"] = BeamParams(width=width)
        if sampling is not None:
            more["sampling"] = sampling
    with pytest.raises(ConfigError, match=message):
        one.add_request([5, 6], max_tokens=3, **more)
    assert one.num_unfinished == one.scheduler.num_waiting == 0
    with pytest.raises(ConfigError, match="beam-width is 1: needs 2 or more"):
        BeamParams(width=1)


def test_beams_that_never_fit_at_once_are_refused_with_what_would() -> None:
    engine = tight(build("llama"))  # 21 blocks of 4
    beams = BeamParams(width=4)
    assert engine.add_request([5] * 12, max_tokens=10, beams=beams) is None
    with pytest.raises(ConfigError, match="room for 21 together in each of 4 beams"):
        engine.generate([[5] * 12], max_tokens=10, beams=beams)
    assert len(engine.generate([[5] * 12], max_tokens=9, beams=beams)[0].tokens) == 9
    watched = tight(build("llama"), watermark=0.25)  # 5 blocks must be left free: 4 for each beam
    assert watched.add_request([5] * 12, max_tokens=6, beams=beams) is None
    assert len(watched.generate([[5] * 12], max_tokens=5, beams=beams)[0].tokens) == 5
