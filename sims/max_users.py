"""The largest number of users that a deployment serves within goals."""

from collections.abc import Callable

from pagedkv.errors import ConfigError
from pagedkv.sims.capacity_answer import CapacityAnswer, answer, check_attain
from pagedkv.sims.command import changed
from pagedkv.sims.config import SimulationConfig
from pagedkv.sims.deployment import deploy

MOST_USERS = 1 << 14


def max_users(
    config: SimulationConfig, allocator: str, *, attain: float, progress: Callable[[float], None] | None = None
) -> CapacityAnswer:
    """Return the largest number of closed-loop users of whose requests a share `attain` meets the goals of `config`.

    Without goals: the largest that is stable. Same seeds at every number of users, so that an answer can be repeated; each user has
    a random stream of its own, so that N + 1 users are the same N and one more.

    Raises:
        ConfigError: If `config` has a load of another kind, or cannot work.
    """
    for name in ("users", "request_rate", "trace"):
        if getattr(config.load, name) is not None:
            flag = name.replace("_", "-")
            raise ConfigError(
                f"--{flag} contradicts max-users, which looks for the number of users: leave it out; "
                f"simulate --{flag} {getattr(config.load, name)} says how that load fares"
            )
    check_attain(attain)
    slots = deploy(config.serving).scheduler.max_num_seqs
    return answer(
        lambda users: changed(config, users=users),
        allocator,
        attain=attain,
        first=1,
        most=MOST_USERS,
        preemption_most=lambda users: 2 * max(slots, users),
        progress=progress,
    )
