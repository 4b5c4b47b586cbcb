"""Conversations that begin alike, and what it means that two runs come to the same."""

from collections.abc import Generator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import simpy
from hypothesis import strategies as st

from pagedkv.scheduling.content import Segments, shared_segments
from pagedkv.sims.clock import Clock
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.deployment import deploy
from pagedkv.sims.engine import ServingEngine
from pagedkv.sims.metrics import measure
from pagedkv.sims.simulation import Run
from pagedkv.sims.step_time import RooflineStepTime

MAX_MODEL_LEN = 96


class Question(NamedTuple):
    """What somebody asks after a pause. Its prompt begins with the first tokens of a text that others may begin with too."""

    think_s: float
    text: int
    known_tokens: int
    """Those of the text."""
    own_tokens: int
    output_tokens: int

    @property
    def prompt_tokens(self) -> int:
        return self.known_tokens + self.own_tokens

    def content(self, asker: int) -> Segments:
        """Return the text, then what the asker says and is told about so much of it: the same every time."""
        answer = 1000 + 10_000 * asker + 100 * self.known_tokens + self.text
        return shared_segments(
            np.array([self.text, answer]), np.array([self.known_tokens, self.prompt_tokens + self.output_tokens])
        )


QUESTIONS = st.lists(
    st.builds(
        Question,
        st.sampled_from([0.0, 0.02, 0.5]),
        st.integers(0, 2),
        st.sampled_from([7, 16, 33, 48]),
        st.integers(1, 20),
        st.integers(1, 28),
    ),
    max_size=4,
)


@cache
def step_time() -> RooflineStepTime:
    model = deploy(ServingConfig(offload_size="1GiB")).step_time  # copies take time, where there are some
    assert isinstance(model, RooflineStepTime)
    return model


def user(env: Clock, engine: ServingEngine, asker: int, questions: tuple[Question, ...]) -> Generator[simpy.Event, Any, None]:
    for question in questions:
        yield env.timeout(question.think_s)
        answered = engine.submit(question.prompt_tokens, question.output_tokens, content=question.content(asker))
        if answered is not None:
            yield answered


def records_agree(one: Run, other: Run) -> None:
    """Assert that requests, records and figures of two runs are the same, bit for bit."""
    requests, others = (each.recorder._scheduler.requests for each in (one, other))
    np.testing.assert_array_equal(requests.arrays[: others.size], others.arrays[: others.size])  # compiled knows who will arrive
    for name in ("sums", "itl_bins", "counters"):
        np.testing.assert_array_equal(getattr(one.recorder.arrays, name), getattr(other.recorder.arrays, name), err_msg=name)
    for mine, its in zip(one.recorder.timeline, other.recorder.timeline, strict=True):
        np.testing.assert_array_equal(mine, its)
    assert one.end_s == other.end_s
    for name in ("arrival_s", "scheduled_s", "first_token_s", "last_token_s", "num_output_tokens", "num_preemptions", "outcome"):
        np.testing.assert_array_equal(getattr(one.log, name), getattr(other.log, name), err_msg=name)
    assert measure(one, ()) == measure(other, ())
