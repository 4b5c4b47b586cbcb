"""SGLang's scheduler refuses what cannot be, and notices corruption."""

from typing import Any

import pytest
from sglang_scheduling import scheduler
from steps import advance

from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.scheduling.sglang_scheduler import SGLangScheduler
from pagedkv.scheduling.sglang_settings import SGLangSettings


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_running_requests": 0}, "max-running-requests is 0"),
        ({"max_running_requests": 9}, "the allocator was built for 8"),
        ({"max_model_len": 300}, "the allocator was built for 256"),
        ({"schedule_policy": "lmp"}, "did you mean lpm"),
        ({"chunked_prefill_size": 0}, "None is no limit"),
        ({"chunked_prefill_size": 30, "block_size": 4}, "28 would work"),
        ({"schedule_conservativeness": 0.0}, "schedule-conservativeness is 0.0"),
        ({"enable_mixed_chunk": True, "chunked_prefill_size": None}, "needs chunked prefill"),
        ({"schedule_policy": "shortest-prefill-first", "caching": False}, "needs prefix caching"),
    ],
)
def test_settings_that_cannot_work_are_refused(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scheduler(**limits)


def test_random_needs_a_source_of_chance() -> None:
    one = scheduler()
    with pytest.raises(ConfigError, match="source of chance"):
        SGLangScheduler(SGLangSettings(max_running_requests=8, max_model_len=256, schedule_policy="random"), one.allocator)


@pytest.mark.parametrize("request_", [{"prompt_tokens": 0}, {"output_tokens": 0}, {"max_new_tokens": 2}])
def test_requests_that_cannot_be_are_refused(request_: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        scheduler().add(**{"prompt_tokens": 4, "output_tokens": 4, **request_})


def test_what_can_never_run_is_refused_at_once() -> None:
    one = scheduler(slots=64)
    assert one.add(prompt_tokens=250, output_tokens=7) is None
    assert one.add(prompt_tokens=60, output_tokens=4) is None
    assert one.num_waiting == 0


def test_corruption_is_noticed() -> None:
    one = scheduler()
    one.add(prompt_tokens=4, output_tokens=4)
    advance(one)
    one.allocator.num_shared[0] = 3
    with pytest.raises(IntegrityError):
        one.check_integrity()
