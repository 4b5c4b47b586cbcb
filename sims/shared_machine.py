"""One accelerator under several processes: it serves all that have work in turns, each in slices far shorter than a step."""

import simpy


class SharedMachine:
    """Processor sharing: with k processes at work each goes on at 1/k of the speed that it would have alone.

    Without MPS a GPU gives processes time slices one after the other, and memory bandwidth is divided as well.
    Source: NVIDIA, Multi-Process Service, "When to use MPS": work of different processes is time-sliced.

    Example:
        >>> env = simpy.Environment()
        >>> machine = SharedMachine(env)
        >>> first, second = machine.work(2.0), machine.work(1.0)
        >>> env.run(until=second), env.now
        (1.0, 2.0)
        >>> env.run(until=first), env.now
        (2.0, 3.0)
    """

    def __init__(self, env: simpy.Environment, *, from_s: float = 0.0) -> None:
        """Measure what is done from `from_s` on."""
        self._env = env
        self._from_s = from_s
        self._measured_s: dict[simpy.Event, float] = {}
        """Of work that goes on: the seconds done since `from_s`."""
        self._left_s: dict[simpy.Event, float] = {}
        self._since_s = env.now
        self._turn = 0

    def work(self, seconds: float) -> simpy.Event:
        """Return the event of the end of work that would take `seconds` alone. O(processes at work).

        Its value is `measured_s` of it.
        """
        self._pass_time()
        done = self._env.event()
        self._left_s[done], self._measured_s[done] = seconds, 0.0
        self._look_ahead()
        return done

    def measured_s(self, work: simpy.Event) -> float:
        """Return how many seconds of `work`, as it would take alone, have been done from `from_s` on. O(processes at work)."""
        if work.triggered:
            return float(work.value or 0.0)
        self._pass_time()
        return self._measured_s[work]

    def _pass_time(self) -> None:
        passed_s = self._env.now - self._since_s
        if self._left_s and passed_s > 0:
            share_s = passed_s / len(self._left_s)
            self._left_s = {done: left_s - share_s for done, left_s in self._left_s.items()}
            if (counts_s := self._env.now - max(self._since_s, self._from_s)) > 0:
                share_s = counts_s / len(self._left_s)
                self._measured_s = {done: so_far_s + share_s for done, so_far_s in self._measured_s.items()}
        self._since_s = self._env.now

    def _look_ahead(self) -> None:
        self._turn += 1
        turn, next_done = self._turn, min(self._left_s, key=self._left_s.__getitem__)
        in_s = max(self._left_s[next_done] * len(self._left_s), 0.0)

        def end(_: simpy.Event) -> None:
            if turn != self._turn:  # somebody has come since
                return
            self._pass_time()
            del self._left_s[next_done]
            next_done.succeed(self._measured_s.pop(next_done))
            if self._left_s:
                self._look_ahead()

        self._env.timeout(in_s).callbacks.append(end)
