"""How many users a model really serves at once in the same KV memory: over blocks, and with a cache for each user.

python -m pagedkv.runtime.users_held
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import transformers

from pagedkv.errors import ConfigError
from pagedkv.runtime.cache_meter import CacheMeter
from pagedkv.runtime.engine import LLMEngine
from pagedkv.runtime.memory_study import ragged_lengths, study_models
from pagedkv.runtime.study_command import run_study, study_parser
from pagedkv.scheduling.step import Step
from pagedkv.units import parse_bytes

Prompts = Sequence[npt.NDArray[np.int64]]


class Attempt(NamedTuple):
    """Users who asked at the same moment."""

    held: bool
    """Whether all of them were served side by side, within the memory."""
    peak_bytes: int
    """What their keys and values took at the worst moment until then."""
    texts: list[list[int]]
    """What they were answered; empty if they were not held."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What one way of keeping keys and values came to."""

    way: str
    max_users: int
    """Served side by side; with one more, memory ran out."""
    peak_bytes: int
    """What they took at the worst moment."""
    failed_peak_bytes: int
    """What one user more had taken when it failed; of blocks, all that there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UsersHeld:
    """Several ways in the same memory."""

    model: str
    budget_bytes: int
    max_model_len: int
    """Tokens for which a StaticCache is made: a user may ask that much."""
    lengths: tuple[int, ...]
    """Tokens of the prompts, in the order in which users are added."""
    new_tokens: int
    holdings: tuple[Holding, ...]
    num_texts_alike: int
    """Of the texts of the way with the fewest users, how many all ways agree on."""

    def table(self) -> str:
        """Return it for a reader."""
        tokens = f"{min(self.lengths)} to {max(self.lengths)} prompt tokens, mean {np.mean(self.lengths):.0f}"
        memory = f"{self.budget_bytes / 1024:,.0f} KiB of keys and values"
        lines = [
            f"{self.model}: users of {tokens}, {self.new_tokens} new ones each, in {memory}",
            f"{'':34}{'users':>6}{'peak':>14}   one more failed at",
        ]
        for each in self.holdings:
            sizes = f"{each.peak_bytes / 1024:10,.0f} KiB{each.failed_peak_bytes / 1024:14,.0f} KiB"
            lines.append(f"{each.way:34}{each.max_users:6}{sizes}")
        fewest = min(each.max_users for each in self.holdings)
        lines.append(f"texts of the first {fewest} users on which all agree: {self.num_texts_alike}")
        return "\n".join(lines)


def study_users(
    model: Any,
    lengths: Sequence[int],
    *,
    new_tokens: int = 32,
    budget_bytes: int,
    max_model_len: int,
    block_size: int = 16,
    seed: int = 0,
) -> UsersHeld:
    """Let more and more users ask at the same moment, over each way of keeping keys and values, until memory runs out.

    Blocks are `LLMEngine`'s, which takes `budget_bytes` for them; it holds users if all run at once and none is preempted. The
    others give each user a cache of transformers, of its own length (`DynamicCache`) or for `max_model_len` tokens
    (`StaticCache`), and compute a token of each in turn; they fail where what these caches made is more than `budget_bytes`.

    Args:
        model: A causal model of transformers that `LLMEngine` takes; its attention is eager afterwards.
        lengths: Prompt tokens of the first user, the second and so on: enough for any way to fail.
        new_tokens: Tokens that each is answered.
        budget_bytes: For keys and values.
        max_model_len: Longest prompt + answer that a user may ask for.
        block_size: Tokens per block.
        seed: Of the prompts.

    Raises:
        ConfigError: If all of them are held, or not even one is, or one is longer than `max_model_len`.
    """
    if not lengths or max(lengths) + new_tokens > max_model_len:
        raise ConfigError(
            f"prompts of up to {max(lengths, default=0)} tokens, {new_tokens} new ones: max_model_len is {max_model_len}"
        )
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(2, model.config.vocab_size, length) for length in lengths]

    def over_blocks(asked: Prompts) -> Attempt:
        return _over_blocks(model, asked, new_tokens, budget_bytes, max_model_len, block_size)

    def over(make: Callable[[], Any]) -> Callable[[Prompts], Attempt]:
        return lambda asked: _over_caches(model, asked, new_tokens, budget_bytes, make)

    ways = {
        f"blocks of {block_size} (LLMEngine)": over_blocks,
        "a DynamicCache for each": over(lambda: transformers.DynamicCache(config=model.config)),
        "a StaticCache for each": over(lambda: transformers.StaticCache(model.config, max_cache_len=max_model_len)),
    }
    holdings, texts = [], []
    for way, attempt in ways.items():
        holding, answered = _most(way, attempt, prompts)
        holdings.append(holding)
        texts.append(answered)
    return UsersHeld(
        model=model.config.model_type,
        budget_bytes=budget_bytes,
        max_model_len=max_model_len,
        lengths=tuple(lengths),
        new_tokens=new_tokens,
        holdings=tuple(holdings),
        num_texts_alike=sum(all(text == each[0] for text in each) for each in zip(*texts, strict=False)),
    )


def _most(way: str, attempt: Callable[[Prompts], Attempt], prompts: Prompts) -> tuple[Holding, list[list[int]]]:
    """Return what `way` holds at most, by bisection: whoever holds some users holds fewer."""
    best, failed = Attempt(False, 0, []), attempt(prompts)  # noqa: FBT003
    if failed.held:
        raise ConfigError(f"{way}: all {len(prompts)} users are held; give more of them, or less memory")
    fits, fails = 0, len(prompts)
    while fails - fits > 1:
        middle = (fits + fails) // 2
        tried = attempt(prompts[:middle])
        if tried.held:
            fits, best = middle, tried
        else:
            fails, failed = middle, tried
    if not fits:
        raise ConfigError(f"{way}: not even one user is held; give more memory")
    holding = Holding(way=way, max_users=fits, peak_bytes=best.peak_bytes, failed_peak_bytes=failed.peak_bytes)
    return holding, best.texts


def _over_blocks(model: Any, prompts: Prompts, new_tokens: int, budget_bytes: int, max_model_len: int, block_size: int) -> Attempt:
    with CacheMeter() as meter:
        engine = LLMEngine(
            model, budget_bytes=budget_bytes, block_size=block_size, max_num_seqs=len(prompts), enable_prefix_caching=False
        )
    if max(map(len, prompts)) + new_tokens > min(max_model_len, engine.scheduler.settings.max_model_len):
        return Attempt(False, meter.live_bytes, [])  # noqa: FBT003
    numbers = [engine.add_request(prompt, max_tokens=new_tokens) for prompt in prompts]
    texts: dict[int | None, list[int]] = {number: [] for number in numbers}
    engine.observer = most = _Most(engine)
    while engine.num_unfinished:
        for new in engine.step():
            texts[new.request].append(new.token)
    if most.preempted or most.running < len(prompts):
        return Attempt(False, meter.live_bytes, [])  # noqa: FBT003
    peak_bytes = (most.blocks + 1) * engine.storage.block_bytes  # and the null block
    return Attempt(True, peak_bytes, [texts[number] for number in numbers])  # noqa: FBT003


class _Most:
    """Watches the steps of an engine: most requests that ran in one, most blocks held."""

    def __init__(self, engine: LLMEngine) -> None:
        self.running = self.blocks = 0
        self.preempted = False
        self._engine = engine

    def launched(self, step: Step) -> None:
        """Look, while all slots of a step are taken."""
        scheduler, pool = self._engine.scheduler, self._engine.allocator
        self.running = max(self.running, scheduler.num_running)
        self.blocks = max(self.blocks, (pool.usable_slots - pool.free_slots) // pool.unit_slots)
        self.preempted = self.preempted or step.num_preempted > 0

    def computed(self, step: Step) -> None:
        """Nothing is given back yet."""

    def completed(self) -> None:
        """Who is done has given back."""

    def forked(self, parent: int, child: int) -> None:
        """Nobody asks for several texts."""


def _over_caches(model: Any, prompts: Prompts, new_tokens: int, budget_bytes: int, make: Callable[[], Any]) -> Attempt:
    model.set_attn_implementation("eager")
    meter, caches = CacheMeter(), list[Any]()
    given = [torch.from_numpy(prompt)[None] for prompt in prompts]
    texts: list[list[int]] = [[] for _ in prompts]
    for i in [i for _ in range(new_tokens) for i in range(len(prompts))]:  # a token of each in turn
        if i == len(caches):
            caches.append(make())
            meter.watch(caches[i])
        with torch.inference_mode():
            logits = model(input_ids=given[i], cache=caches[i], use_cache=True).logits
        token = int(logits[0, -1].argmax())
        texts[i].append(token)
        given[i] = torch.tensor([[token]])
        if meter.peak_bytes > budget_bytes:
            return Attempt(False, meter.peak_bytes, [])  # noqa: FBT003
    return Attempt(True, meter.peak_bytes, texts)  # noqa: FBT003


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and print it."""
    parser = study_parser("users_held", __doc__, budget="memory for keys and values")
    parser.add_argument("--num-users", type=int, default=96, help="as many as may ask: more than any way holds")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--model", choices=("llama", "gemma3"), default="llama", help="gemma3 has windows")

    def study(given: Namespace) -> UsersHeld:
        return study_users(
            study_models()[given.model],
            ragged_lengths(given.num_users, seed=given.seed),
            new_tokens=given.new_tokens,
            budget_bytes=parse_bytes(given.budget, name="--budget"),
            max_model_len=given.max_model_len,
            block_size=given.block_size,
            seed=given.seed,
        )

    return run_study(parser, arguments, study)


if __name__ == "__main__":
    sys.exit(main())
