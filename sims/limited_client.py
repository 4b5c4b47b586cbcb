"""A client that has only so many requests under way: what else is to be sent waits its turn, as in `vllm bench serve`."""

import simpy

from pagedkv.arrays import Float64Array, Int64Array
from pagedkv.scheduling.content import Contents, Segments
from pagedkv.sims.engine import ServingEngine, submit_in_time


class LimitedClient:
    """Stands before an engine; a request arrives there, and its times count, when it is sent."""

    def __init__(self, env: simpy.Environment, engine: ServingEngine, max_concurrency: int) -> None:
        """Let at most `max_concurrency` requests be under way, in the order in which they are to be sent."""
        self._env, self._engine = env, engine
        self._places = simpy.Resource(env, capacity=max_concurrency)

    def submit(
        self, prompt_tokens: int, output_tokens: int, *, content: Segments | None = None, user_class: int = 0, model: int = 0
    ) -> simpy.Event | None:
        """Send a request as soon as there is a place; return the event of its end, whose value is as the engine's."""

        def send() -> simpy.events.ProcessGenerator:
            with self._places.request() as place:
                yield place
                answered = self._engine.submit(prompt_tokens, output_tokens, content=content, user_class=user_class, model=model)
                return None if answered is None else (yield answered)

        return self._env.process(send())

    def submit_all(
        self,
        arrival_s: Float64Array,
        prompt_tokens: Int64Array,
        output_tokens: Int64Array,
        *,
        contents: Contents | None = None,
        models: Int64Array | None = None,
    ) -> None:
        """Have requests to send at these times, ascending."""
        self._env.process(submit_in_time(self._env, self, arrival_s, prompt_tokens, output_tokens, contents, models))
