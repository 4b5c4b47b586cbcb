"""A model that is not there, on a machine that is not there: the scheduler of `simulate`, and steps as long as its model says."""

from collections.abc import Iterator
from dataclasses import dataclass

from pagedkv.block_hash import BlockHashChain
from pagedkv.errors import ConfigError
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.scheduling.step import Step
from pagedkv.sims.deployment import Deployment
from pagedkv.sims.drafting import NOTHING_ACCEPTED, Acceptance, accept_drafts
from pagedkv.sims.serve.errors import BAD_REQUEST, ApiError
from pagedkv.sims.serve.filler import FillerTokenizer, filler_tokens
from pagedkv.sims.serve.served_engine import (
    ERROR,
    LENGTH,
    STOP,
    Admission,
    Ask,
    Output,
    StepReport,
    check_room,
    longest_output,
)
from pagedkv.sims.serve.wall_clock import ServeClock
from pagedkv.sims.step_time import total_cost

_MOST_TOKEN = 2**31 - 1
"""Largest token id: ids are int32."""


@dataclass(slots=True)
class _Answer:
    """What a request will be given."""

    tokens: list[int]
    finish_reason: str
    num_given: int = 0


class SimulatedEngine:
    """Answers with filler words at the simulator's speed. An answer's length is known to it beforehand, as to the simulator."""

    def __init__(
        self, deployment: Deployment, clock: ServeClock, *, drawn_lengths: Iterator[int], draws_all: bool = False, seed: int = 0
    ) -> None:
        """Take the memory of `deployment`.

        Args:
            deployment: Model, machine and settings.
            clock: Passes simulated time.
            drawn_lengths: Lengths of answers, without end, for requests that do not say how long.
            draws_all: Every answer ends at a drawn length, if its limit does not come first and it does not ignore ends.
            seed: Decides which drafts are accepted.

        Raises:
            ConfigError: If the engine is not vLLM, or is to have a second tier.
        """
        if deployment.tier is not None:
            raise ConfigError("--offload-size: serve has no second tier; simulate has")
        scheduler = deployment.scheduler_over(deployment.own_allocator)
        if not deployment.engine.name.startswith("vllm") or not isinstance(scheduler, Scheduler):
            raise ConfigError(f"--engine {deployment.engine.name} cannot be served yet: use --engine vllm")
        self.scheduler, self.tokenizer = scheduler, FillerTokenizer()
        self.can_fork = False  # as vLLM, to which n answers are n requests that find each other's blocks
        self._clock, self._step_time = clock, deployment.step_time
        self._drawn_lengths, self._draws_all = drawn_lengths, draws_all
        drafting = deployment.drafting
        self._acceptance = NOTHING_ACCEPTED if drafting is None else Acceptance.of(drafting, seed)
        self._begin_s = clock.now()
        """When the next step begins, at the earliest; the end of the one in flight."""
        self._in_flight = False
        self._answers = dict[int, _Answer]()

    def now(self) -> float:
        """Return the time; whoever comes while the loop is late comes before the step's end, when the loop will look."""
        return min(self._clock.now(), self._begin_s) if self._in_flight else self._clock.now()

    def check(self, ask: Ask) -> None:
        """Refuse what can never be answered here.

        Raises:
            ApiError: With why.
        """
        if not ask.prompt:
            raise ApiError(BAD_REQUEST, "the prompt has no tokens", param="prompt")
        if not 0 <= min(ask.prompt) <= max(ask.prompt) <= _MOST_TOKEN:
            raise ApiError(BAD_REQUEST, f"token ids must be 0 to {_MOST_TOKEN}", param="prompt")
        check_room(self.scheduler, len(ask.prompt), ask.max_tokens or max(ask.min_tokens, 1))

    def add(self, ask: Ask, arrived_s: float) -> int:
        """Put a request into the queue and return its number."""
        self._begin_s = max(self._begin_s, arrived_s)
        length, reason = self._length(ask)
        answer = filler_tokens(ask.prompt, length)
        keys = None
        if self.scheduler.caches_prefixes:
            chain = BlockHashChain(block_size=self.scheduler.allocator.unit_slots, salt=ask.cache_salt)
            chain.extend(ask.prompt)
            chain.extend(answer[:-1])  # the last token is never computed
            keys = chain.keys
        request = self.scheduler.add(prompt_tokens=len(ask.prompt), output_tokens=length, keys=keys)
        assert request is not None, "check() said that there is room"
        self._answers[request] = _Answer(answer, reason)
        return request

    def _length(self, ask: Ask) -> tuple[int, str]:
        """Return how many tokens the answer has, and why it ends."""
        if ask.max_tokens is not None and (ask.ignore_eos or not self._draws_all):
            return ask.max_tokens, LENGTH
        most = longest_output(self.scheduler, len(ask.prompt)) if ask.max_tokens is None else ask.max_tokens
        drawn = most if ask.ignore_eos else max(next(self._drawn_lengths), ask.min_tokens)
        return (drawn, STOP) if drawn < most else (most, LENGTH)

    def abort(self, request: int, place: int) -> None:
        """Take a request out; its blocks are free at once."""
        del place
        self.scheduler.abort(request)
        del self._answers[request]

    def forget_done(self) -> dict[int, int]:
        """Forget requests that are done; return the others' new numbers by their old ones."""
        new = {old: i for i, old in enumerate(self.scheduler.forget_done().tolist())}
        self._answers = {new[old]: answer for old, answer in self._answers.items()}
        return new

    async def step(self) -> StepReport:
        """Decide a step, wait until it would be computed, and return what came out."""
        scheduler, began_s = self.scheduler, self._begin_s
        step = scheduler.schedule()
        admitted, num_preempted = admissions(step), step.num_preempted
        if not step.num_entries:  # nobody runs, and the head of the queue does not fit: waiting cannot help it
            request = scheduler.drop_head()
            del self._answers[request]
            return StepReport(began_s, began_s, [], num_preempted, [Output(request, [], ERROR)])
        cost = total_cost(self._step_time.cost(batch, batch.size) for batch in scheduler.forward_passes())
        self._begin_s, self._in_flight = began_s + cost.total_s, True
        try:
            await self._clock.sleep_until(self._begin_s)
        finally:  # also where the loop is cancelled: nobody may find a step in flight that never ends
            self._in_flight = False
            accept_drafts(self._acceptance, step.batch, step.num_entries)
            scheduler.complete()
        return StepReport(began_s, self._begin_s, admitted, num_preempted, self._outputs())

    def _outputs(self) -> list[Output]:
        scheduler = self.scheduler
        sampled = scheduler.sampled
        records = scheduler.requests.arrays[sampled]
        counts = (records["num_known_tokens"] - records["prompt_tokens"]).tolist()
        finished, outputs = set(scheduler.finished.tolist()), []
        for request, count in zip(sampled.tolist(), counts, strict=True):
            answer = self._answers[request]
            new, answer.num_given = answer.tokens[answer.num_given : count], count
            if request in finished:
                del self._answers[request]
            outputs.append(Output(request, new, answer.finish_reason if request in finished else None))
        return outputs

    def close(self) -> None:
        """Do nothing: there are no threads."""


def admissions(step: Step) -> list[Admission]:
    """Return whom `step` took from the queue."""
    batch = step.batch[step.num_running_before : step.num_entries]
    hits = (batch["num_slots_needed"] - batch["num_scheduled_tokens"]).tolist()
    return list(map(Admission, batch["request"].tolist(), batch["num_known_tokens"].tolist(), hits))


def compile_steps(deployment: Deployment) -> None:
    """Let all that a step needs be compiled now, so that no request waits for it."""
    scheduler = deployment.scheduler_over(deployment.own_allocator)
    scheduler.add(prompt_tokens=1, output_tokens=2)
    for _ in range(2):
        step = scheduler.schedule()
        deployment.step_time.cost(step.batch, step.num_entries)
        scheduler.complete()
    BlockHashChain(block_size=1).extend([0])
