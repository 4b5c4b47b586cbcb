"""Several replicas of a deployment behind a router, on one clock, and their faults.

A replica is a process of the engine. When it dies its recorder closes, and whoever it served has failed; when it is back it is
a new process with a new scheduler, an empty memory and a recorder of its own. So nothing is ever reset.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy

from pagedkv.arrays import Float64Array, Int64Array
from pagedkv.errors import ConfigError
from pagedkv.scheduling.content import NO_SEGMENTS, Contents, Segments
from pagedkv.scheduling.step import StepScheduler
from pagedkv.sims.clock import Clock
from pagedkv.sims.compiled_engine import CompiledEngine
from pagedkv.sims.config import time_text
from pagedkv.sims.engine import Engine, submit_in_time
from pagedkv.sims.faults import Fault
from pagedkv.sims.recorder import Recorder
from pagedkv.sims.records import Outcome, RequestLog
from pagedkv.sims.routing import ReplicaState, RoutingPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingProcess:
    """An engine from its start to its end."""

    scheduler: StepScheduler
    recorder: Recorder
    engine: Engine | CompiledEngine


StartProcess = Callable[[float], ServingProcess]
"""Starts a process, told when its recorder's window ends: at its death, or with the run."""


@dataclass(slots=True, kw_only=True)
class Replica:
    """One place behind the router: the process that runs there now, and those that ran there before."""

    processes: list[ServingProcess] = field(default_factory=list)
    """In order; never empty."""
    up: bool = False
    """Whether the last of them runs."""

    @property
    def now(self) -> ServingProcess:
        """The process that runs, or ran last."""
        return self.processes[-1]

    @property
    def state(self) -> ReplicaState:
        """What the router sees."""
        scheduler = self.now.scheduler
        return ReplicaState(self.up, scheduler.num_running + scheduler.num_waiting if self.up else 0)

    @property
    def num_running(self) -> int:
        """Requests in its running batch now."""
        return self.now.scheduler.num_running if self.up else 0

    @property
    def recorders(self) -> list[Recorder]:
        """What was measured, process by process."""
        return [process.recorder for process in self.processes]

    def log(self) -> RequestLog:
        """Return what happened to each request that was sent here, once the run is over."""
        return RequestLog.joined([recorder.log() for recorder in self.recorders])


class Fleet:
    """Takes requests as an engine does, and hands each to the replica that the router chooses."""

    def __init__(
        self,
        env: Clock,
        start: StartProcess,
        routing: RoutingPolicy,
        faults: Sequence[Fault],
        *,
        num_replicas: int,
        end_s: float,
    ) -> None:
        """Start the replicas on `env`, and the clocks of their faults; the run ends at `end_s` at the latest."""
        self._env, self._start, self._routing, self._faults, self._end_s = env, start, routing, faults, end_s
        self._refused: list[tuple[float, int, int, int]] = []
        self.replicas = [Replica() for _ in range(num_replicas)]
        self.num_timers = len(faults)
        """Events to come that are faults, or ends of faults: they keep no run going."""
        for fault in faults:
            env.process(self._strike(fault))
        for i in range(num_replicas):
            self._bring_up(i)

    def submit(
        self, prompt_tokens: int, output_tokens: int, *, content: Segments | None = None, user_class: int = 0, model: int = 0
    ) -> simpy.Event | None:
        """Queue a request at a replica; return the event of its end, or None if it could never run there, or no replica is up."""
        del model
        states = [replica.state for replica in self.replicas]
        if not any(state.up for state in states):
            self._refused.append((self._env.now, prompt_tokens, output_tokens, user_class))
            return None
        chosen = self._routing.choose(states, NO_SEGMENTS if content is None else content)
        return self.replicas[chosen].now.engine.submit(prompt_tokens, output_tokens, content=content, user_class=user_class)

    def submit_all(
        self,
        arrival_s: Float64Array,
        prompt_tokens: Int64Array,
        output_tokens: Int64Array,
        *,
        contents: Contents | None = None,
        models: Int64Array | None = None,
    ) -> None:
        """Let requests arrive at these times, ascending; nobody waits for their end."""
        del models
        self._env.process(submit_in_time(self._env, self, arrival_s, prompt_tokens, output_tokens, contents))

    def close(self) -> None:
        """End the run.

        Raises:
            ConfigError: If a fault has not come: every request was answered before.
        """
        now_s = self._env.now
        for fault in self._faults:
            if fault.at_s > now_s:
                raise ConfigError(
                    f"--fault at {time_text(fault.at_s)} comes too late: every request was answered {now_s:.1f} s after the start. "
                    "Let it come earlier, or let more requests arrive"
                )
        for replica in self.replicas:
            if replica.up:
                replica.now.engine.close()
                replica.now.recorder.close(now_s)

    @property
    def recorders(self) -> list[Recorder]:
        """What was measured, replica by replica."""
        return [recorder for replica in self.replicas for recorder in replica.recorders]

    @property
    def num_completed(self) -> int:
        """Requests that have finished within the window."""
        return sum(recorder.num_completed for recorder in self.recorders)

    def log(self) -> RequestLog:
        """Return what happened to every request, once the run is over: those that found no replica up have failed."""
        refused = np.array(self._refused).reshape(-1, 4)
        turned_away = RequestLog.refused(refused[:, 0], refused[:, 1:].astype(np.int64), Outcome.FAILED)
        return RequestLog.joined([*(replica.log() for replica in self.replicas), turned_away])

    def _bring_up(self, index: int) -> None:
        deaths_s = [fault.at_s for fault in self._faults if fault.replica == index and fault.at_s >= self._env.now]
        process = self._start(min(deaths_s, default=self._end_s))
        replica = self.replicas[index]
        process.recorder.running_elsewhere = lambda: sum(other.num_running for other in self.replicas if other is not replica)
        replica.processes.append(process)
        replica.up = True

    def _strike(self, fault: Fault) -> Generator[simpy.Event, Any, None]:
        replica = self.replicas[fault.replica]
        yield self._env.timeout(fault.at_s)
        replica.up = False
        replica.now.engine.stop()
        replica.now.recorder.crash(self._env.now)
        yield self._env.timeout(fault.down_s)
        self._bring_up(fault.replica)
        self.num_timers -= 1
