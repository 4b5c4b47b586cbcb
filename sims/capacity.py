"""How many users a deployment serves within goals: the largest N that fits."""

from pagedkv.sims.bisection import largest
from pagedkv.sims.command import changed
from pagedkv.sims.config import SimulationConfig
from pagedkv.sims.results import simulate
from pagedkv.sims.scenario import resolve

MOST_USERS = 1 << 14


def largest_users(config: SimulationConfig, allocator: str) -> int:
    """Return the largest number of users that fits with `allocator`: stable, and within the goals of `config` if it has any.

    By doubling, then bisection; supposes that whoever fits N fits fewer. 0 if not even one fits; at most `MOST_USERS`.

    Raises:
        ConfigError: If `config` cannot work.
    """

    def fits(users: int) -> bool:
        one = changed(config, users=users, allocator=(allocator,))
        return simulate(resolve(one)).by_allocator[allocator].verdict.fits

    return largest(fits, most=MOST_USERS).good
