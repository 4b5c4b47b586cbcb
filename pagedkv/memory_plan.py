"""A memory request, planned: its budget, or an error that names settings that fit."""

from pagedkv.budget_advice import settings_that_fit
from pagedkv.errors import ConfigError
from pagedkv.memory_budget import MemoryBudget, Shortage
from pagedkv.memory_request import MemoryRequest


def plan(request: MemoryRequest) -> MemoryBudget:
    """Return the budget that the request's engine would come to.

    Raises:
        ConfigError: If a value is invalid, or the model or one request of `max_model_len` tokens does not fit. The message says
            what is missing and names settings that fit; each was planned too.
    """
    request.check()
    outcome = request.attempt()
    if isinstance(outcome, Shortage):
        raise refuse(request, outcome)
    return outcome


def refuse(request: MemoryRequest, shortage: Shortage) -> ConfigError:
    """Return the error that says what is missing, and which settings fit."""
    found = settings_that_fit(request)
    listed = "; or ".join(found.fit) or "nothing in the catalogue"
    not_so = "" if found.dangerous is None else f" {found.dangerous}."
    return ConfigError(f"{request.ledger.reason(request, shortage)}.{not_so} What fits: {listed}")
