"""What helps requests that run short of slots or cells: llama.cpp's server splits its cells among slots, or lets all share them."""

from typing import Any

from pagedkv.errors import ConfigError
from pagedkv.ledgers.llama_cpp import LlamaCppLedger, padded
from pagedkv.sims.command import changed
from pagedkv.sims.config import SimulationConfig
from pagedkv.sims.scenario import Scenario, resolve


def more_at_once(scenario: Scenario, longest: int) -> list[dict[str, Any]]:
    """Return twice the requests at once, with what keeps the longest allowed one, and cells for `longest` tokens in each slot."""
    config, limits = scenario.config, scenario.deployment.scheduler
    name, slots = _slots_flag(config), 2 * limits.max_num_seqs
    if not _has_slots(scenario):
        return [{name: slots}]
    cells = _cells(scenario)
    found: list[dict[str, Any]] = [{name: slots}, {name: slots, "ctx_size": 2 * cells}, {name: slots, "kv_unified": True}]
    if _unified(scenario):
        more = {"ctx_size": padded(slots * longest)} if slots * longest > cells else {}
        shared = {} if config.serving.kv_unified else {"kv_unified": True}
        found = [{name: slots} | shared | more]
    return [each for each in found if _longest_allowed(config, each) >= limits.max_model_len]


def enough_cells(scenario: Scenario, longest: int) -> list[dict[str, Any]]:
    """Return cells for requests of `longest` tokens in all slots; or no more slots than the present cells hold of them."""
    config, limits = scenario.config, scenario.deployment.scheduler
    found: list[dict[str, Any]] = [{"ctx_size": padded(limits.max_num_seqs * longest)}]
    if (slots := _cells(scenario) // longest) and _unified(scenario):
        found.append({_slots_flag(config): slots} | ({} if config.serving.kv_unified else {"kv_unified": True}))
    return found


def longer_slots(scenario: Scenario, longest: int) -> list[dict[str, Any]]:
    """Return the cells with which a slot takes `longest` tokens; none where no slots have cells."""
    if not _has_slots(scenario):
        return []
    return [{"ctx_size": padded(longest) * (1 if _unified(scenario) else scenario.deployment.scheduler.max_num_seqs)}]


def _slots_flag(config: SimulationConfig) -> str:
    return "max_num_seqs" if config.serving.parallel is None else "parallel"  # which wins, where it is given


def _has_slots(scenario: Scenario) -> bool:
    return "kv_unified" in scenario.deployment.engine.derived_settings(scenario.config.serving)


def _unified(scenario: Scenario) -> bool:
    ledger = _ledger(scenario)
    return isinstance(ledger, LlamaCppLedger) and ledger.unified


def _cells(scenario: Scenario) -> int:
    return scenario.config.serving.ctx_size or scenario.deployment.model.max_context


def _ledger(scenario: Scenario) -> Any:
    deployment = scenario.deployment
    return deployment.engine.ledger(scenario.config.serving, deployment.hardware, deployment.scheduler)


def _longest_allowed(config: SimulationConfig, remedy: dict[str, Any]) -> int:
    """Return the longest request with `remedy`; 0 if it cannot be."""
    try:
        return resolve(changed(config, **remedy)).deployment.scheduler.max_model_len
    except ConfigError:
        return 0
