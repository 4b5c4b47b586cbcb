"""Several texts and beams of a model with linear attention: a fork has a copy of the state, and says what it would say alone."""

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("pagedkv.runtime")
transformers = pytest.importorskip("transformers", reason="the runtime's models are transformers'")

from test_engine_forks import HOT, checked
from test_hybrid_engine import STEPS, alone, ragged_prompts, ties, tight
from tiny_models import HYBRIDS, build

from pagedkv.runtime import BeamParams
from pagedkv.runtime.engine import LLMEngine
from pagedkv.runtime.sampling import SamplingParams
from pagedkv.runtime.state_layers import state_bytes

ROOMY: dict[str, Any] = {"num_blocks": 400, "max_num_seqs": 64, "max_num_batched_tokens": 400}
LIMITS: dict[str, dict[str, Any]] = {
    "room for all": ROOMY | {"max_num_batched_tokens": 50},
    "preempted, in chunks": {"max_num_batched_tokens": 7},
    "fewer rows than texts": {"num_blocks": 60, "max_num_seqs": 3},
}
"""In some of them forks start at once, in others they wait and compute their state anew."""


def num_preemptions(engine: LLMEngine) -> int:
    return int(engine.scheduler.requests.arrays["num_preemptions"].sum())


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("limits", LIMITS)
def test_greedy_forks_say_what_one_text_says(name: str, limits: str) -> None:
    model, prompts = build(name), ragged_prompts(5)
    expected = [alone(model, prompt) for prompt in prompts]
    engine = tight(model, **LIMITS[limits])
    numbers = [engine.add_request(prompt, max_tokens=STEPS, n=3) for prompt in prompts]
    texts = checked(engine, *numbers)
    given = [texts[number, place] for number in numbers if number is not None for place in range(3)]
    assert ties([answer for answer in expected for _ in range(3)], given) <= 1
    assert (num_preemptions(engine) > 2) is limits.startswith("preempted")


@pytest.mark.parametrize("name", HYBRIDS)
def test_each_of_several_drawn_texts_is_that_of_a_request_of_its_own(name: str) -> None:
    model, prompts = build(name), ragged_prompts(5)
    apart = tight(model, **ROOMY)
    for prompt in prompts:
        for place in range(4):
            apart.add_request(prompt, max_tokens=STEPS, sampling=SamplingParams(temperature=1.0, seed=HOT.seed + place))
    expected = {divmod(request, 4): text for (request, _), text in checked(apart).items()}
    assert len({tuple(text) for text in expected.values()}) > 12
    for limits in LIMITS.values():
        engine = tight(model, **limits)
        numbers = [engine.add_request(prompt, max_tokens=STEPS, sampling=HOT, n=4) for prompt in prompts]
        assert {(numbers.index(request), place): text for (request, place), text in checked(engine).items()} == expected


def test_texts_that_are_taken_out_leave_the_states_of_others_alone() -> None:
    model, prompts = build("qwen3_next"), ragged_prompts(3)
    expected = tight(model, **ROOMY).generate(prompts, max_tokens=STEPS, sampling=HOT, n=4)
    for at_step, goes in ((0, (0, 2)), (1, (0,)), (6, (3, 0, 2))):
        engine = tight(model, max_num_seqs=7)
        numbers = [engine.add_request(prompt, max_tokens=STEPS, sampling=HOT, n=4) for prompt in prompts]
        texts: dict[tuple[int, int], list[int]] = {}
        for _ in range(at_step):
            for new in engine.step():
                texts.setdefault((new.request, new.text), []).append(new.token)
        for number in numbers:
            assert all(engine.abort(number or 0, place) for place in goes if len(texts.get((number or 0, place), ())) < STEPS)
        for key, more in checked(engine).items():
            texts.setdefault(key, []).extend(more)
        for (number, place), tokens in texts.items():
            whole = expected[4 * numbers.index(number) + place].tokens
            assert tokens == whole[: len(tokens)]
            assert len(tokens) == STEPS or place in goes


def test_states_of_forks_and_beams_stay_within_those_of_all_rows() -> None:
    model = build("qwen3_next")
    each = state_bytes(model)
    engine = LLMEngine(model, budget_bytes=400_000, block_size=4, max_num_seqs=5)
    cache = engine.models.runner._cache
    for more in ({"n": 4, "sampling": HOT}, {"n": 8, "sampling": HOT}, {"beams": BeamParams(width=5), "n": 2}):
        engine.add_request([5, 6, 7, 8, 9, 10], max_tokens=6, **more)  # type: ignore[arg-type]
        most = 0
        while engine.num_unfinished:
            engine.step()
            most = max(most, cache.state_bytes)
        assert most <= 5 * each
        assert most + engine.storage.num_bytes <= 400_000
    assert cache.state_bytes == 5 * each


def test_beams_that_wait_for_others_compute_their_last_token_again_from_the_same_state() -> None:
    """The pool is just large enough for one search, and there are four, and texts besides: all must end."""
    model, prompts = build("qwen3_next"), [[5 + i, 6 + 2 * i, 7][: 2 + i % 2] for i in range(4)]
    greedy = [alone(model, prompt, 24) for prompt in prompts]
    beams = BeamParams(width=2)
    expected = [tight(model, **ROOMY).generate([prompt], max_tokens=24, beams=beams)[0].tokens for prompt in prompts]
    engine = tight(model, num_blocks=17, max_num_seqs=16, max_num_batched_tokens=60)
    searches = [engine.add_request(prompt, max_tokens=24, beams=beams) for prompt in prompts]
    plain = [engine.add_request(prompt, max_tokens=24) for prompt in prompts]
    held, texts = 0, dict[tuple[int, int], list[int]]()
    while engine.num_unfinished:
        for new in engine.step():
            texts.setdefault((new.request, new.text), []).append(new.token)
        held += int((engine.scheduler.step_arrays.batch["num_accepted_tokens"] < 0).any())
        engine.scheduler.check_integrity()
    assert [texts[number or 0, 0] for number in searches] == expected
    assert ties(greedy, [texts[number or 0, 0] for number in plain]) <= 1
    assert held > 0
    assert num_preemptions(engine) > 0
