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
        suggestions = settings_that_fit(request)
        listed = "; or ".join(suggestions) or "nothing in the catalogue"
        raise ConfigError(f"{request.ledger.reason(request, outcome)}. What fits: {listed}")
    return outcome
