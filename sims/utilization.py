"""How much of the machine a run uses: what monitors of GPUs show. docs/metrics.md has the formulas."""

from pagedkv.sims.recording import Integrals
from pagedkv.sims.step_time import StepCost


def machine_shares(sums: Integrals, *, of_one_s: float | None = None) -> dict[str, float | None]:
    """Return `busy_share`, `memory_bandwidth_share` and `compute_share` over the time watched; None if there was none.

    Seconds by blocker add up to all the time in which any machine was watched: of several, the shares are of all their time.
    Where several processes have one machine, `of_one_s` is the time in which that was watched.
    """
    watched_s = float(sums.blocked_s.sum()) if of_one_s is None else of_one_s
    cost = StepCost(*sums.cost_s.tolist())
    shares = {"busy_share": cost.total_s, "memory_bandwidth_share": cost.traffic_s, "compute_share": cost.arithmetic_s}
    return {name: seconds / watched_s if watched_s else None for name, seconds in shares.items()}
