"""Speculative decoding: what drafts, what that holds in memory and costs in time, and which drafts are accepted.

A step verifies k drafts of each request that decodes, and gives it the accepted ones and one token more. With a chance of a for
each token, that is (1 - a^(k+1)) / (1 - a) tokens on average. Source: Leviathan et al., Fast Inference from Transformers via
Speculative Decoding, ICML 2023, equation 1.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from pagedkv.arrays import Float64Array
from pagedkv.catalogue import load_model, model_names
from pagedkv.errors import ConfigError, unknown_name
from pagedkv.jit import lean_jit
from pagedkv.kv_spec import LayerGroup
from pagedkv.memory_request import DraftMemory
from pagedkv.model_spec import ModelSpec
from pagedkv.sims.config import ServingConfig
from pagedkv.splitmix import mixed_one
from pagedkv.step_batch import StepBatch
from pagedkv.weight_format import WeightFormat

METHODS = ("draft-model", "mtp", "eagle", "medusa", "ngram")
"""What drafts: a small model; a layer that the weights bring (MTP), or that somebody trained (EAGLE); heads that each guess one
token further, trained likewise (Medusa); the prompt."""
DEFAULT_ACCEPTANCE = 0.7
"""Of a token. Between 0.6 and 0.8 are reported for drafts of the same family on chat. Source: Leviathan et al. 2023, table 3."""
MOST_DRAFTS = 64
_NUM_RATES = 4096
"""Requests draw their rates from so many, again and again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafting:
    """How drafts are made."""

    method: str
    """One of `METHODS`."""
    num_tokens: int
    """Drafts of a request per step."""
    acceptance_rate: float
    """Mean chance that a draft is accepted if those before it are."""
    acceptance_spread: float
    """Standard deviation of a request's own rate; 0: all have the mean."""
    model: ModelSpec | None
    """What runs besides the target, as a model: the draft model, or the layer or heads; None if nothing does."""
    num_passes: int
    """Forward passes of it per step."""
    shares_tables: bool
    """Its embedding and output head are the target's: read, but not held twice."""
    weight_format: WeightFormat

    @property
    def memory(self) -> DraftMemory:
        """Return what it holds."""
        if self.model is None:
            return DraftMemory(weight_bytes=0, kv_groups=())
        weights = self.model.weight_bytes(self.weight_format)
        if self.shares_tables:
            alone = replace(self.model, head_params=0, params_total=self.model.params_total - self.model.head_params)
            weights = alone.weight_bytes(self.weight_format)
        return DraftMemory(weight_bytes=weights, kv_groups=self.model.layer_groups if self.method != "medusa" else ())

    @property
    def title(self) -> str:
        """E.g. "3 drafts a step by Llama 3.2 1B, accepted at 0.7"."""
        by = {
            "ngram": "the prompt's own n-grams",
            "medusa": "Medusa heads",
            "mtp": "the model's own layer",
            "eagle": "an EAGLE layer",
        }
        who = self.model.title if self.method == "draft-model" and self.model is not None else by[self.method]
        spread = f" ± {self.acceptance_spread:g}" if self.acceptance_spread else ""
        drafts = f"{self.num_tokens} draft{'s' if self.num_tokens > 1 else ''}"
        return f"{drafts} a step by {who}, accepted at {self.acceptance_rate:g}{spread}"

    def expected_tokens(self) -> float:
        """Return the mean output tokens of a request per step, if its acceptance rate is the mean one."""
        rate = self.acceptance_rate
        return self.num_tokens + 1.0 if rate == 1.0 else (1.0 - rate ** (self.num_tokens + 1)) / (1.0 - rate)


def drafting_of(serving: ServingConfig, target: ModelSpec, weight_format: WeightFormat) -> Drafting | None:
    """Return how `serving` lets drafts be made; None if it does not.

    Raises:
        ConfigError: For settings that contradict each other or cannot be, with what would work.
    """
    method = serving.speculative_method or (None if serving.speculative_model is None else "draft-model")
    settings = ("num_speculative_tokens", "acceptance_rate", "acceptance_spread")
    if method is None:
        for name in settings:
            if getattr(serving, name) is not None:
                flag = f"--{name.replace('_', '-')} {getattr(serving, name)}"
                raise ConfigError(
                    f"{flag}: nothing drafts; add --speculative-model MODEL, or --speculative-method {' or '.join(METHODS[1:])}"
                )
        return None
    if method not in METHODS:
        raise unknown_name("speculative-method", method, METHODS)
    number = serving.num_speculative_tokens
    if number is None:
        raise ConfigError("speculative decoding needs a number of drafts: give --num-speculative-tokens, e.g. 3")
    if not 1 <= number <= MOST_DRAFTS:
        raise ConfigError(f"num-speculative-tokens is {number}: needs 1 to {MOST_DRAFTS}")
    rate = DEFAULT_ACCEPTANCE if serving.acceptance_rate is None else serving.acceptance_rate
    spread = serving.acceptance_spread or 0.0
    if not 0 <= rate <= 1:
        raise ConfigError(f"acceptance-rate is {rate}: needs 0 to 1")
    most = (rate * (1 - rate)) ** 0.5
    if not 0 <= spread < max(most, 1e-12):
        raise ConfigError(f"acceptance-spread is {spread}: around a rate of {rate} it needs 0 to below {most:.3g}")
    if (serving.speculative_model is not None) != (method == "draft-model"):
        needs = (
            "needs --speculative-model MODEL"
            if method == "draft-model"
            else "has no model of its own: leave --speculative-model out"
        )
        raise ConfigError(f"--speculative-method {method} {needs}")
    model, shares = None, False
    if method == "draft-model":
        model = load_model(serving.speculative_model or "")
        if model.vocab_size != target.vocab_size:
            raise ConfigError(
                f"--speculative-model {serving.speculative_model}: {model.title} has {model.vocab_size:,} words, {target.title} "
                f"{target.vocab_size:,}: a draft model needs the vocabulary of its target"
            )
    elif method in ("mtp", "eagle"):
        if method == "mtp" and not target.draft_layers:
            raise ConfigError(_no_layer(target))
        model, shares = _one_layer(target), True
    elif method == "medusa":
        model = _heads(target, number)
    return Drafting(
        method=method,
        num_tokens=number,
        acceptance_rate=rate,
        acceptance_spread=spread,
        model=model,
        num_passes=0 if model is None else 1 if method == "medusa" else number,
        shares_tables=shares,
        weight_format=weight_format if shares or model is None or method == "medusa" else model.native_format,
    )


def _no_layer(target: ModelSpec) -> str:
    """Return that the weights of `target` bring no layer for drafting, and what would draft."""
    drafts = [model for model in map(load_model, model_names()) if 0 < 5 * model.params_total <= target.params_total]
    same_words = [model.name for model in drafts if model.vocab_size == target.vocab_size]
    draft = f"--speculative-model {same_words[0]}, " if same_words else ""
    return (
        f"--speculative-method mtp: the weights of {target.title} bring no layer for drafting (config.json names none, as "
        f"num_nextn_predict_layers or mtp_num_hidden_layers). Use {draft}--speculative-method ngram, or eagle or medusa if "
        "somebody has trained one for it"
    )


def _one_layer(target: ModelSpec) -> ModelSpec:
    """Return one more layer of the target's kind, behind a projection of hidden state and embedding to a hidden state.

    Source: DeepSeek-V3 technical report, section 2.2 (MTP); EAGLE has the same parts.
    """
    layers = target.num_layers
    widest = max(target.layer_groups, key=lambda group: group.num_kv_heads * (group.key_dim + group.value_dim))
    linear, experts = target.linear_params // layers + 2 * target.hidden_size**2, target.expert_params // layers
    wide = target.wide_params // layers
    active = linear + wide + target.head_params + (experts * target.experts_per_token // target.num_experts if experts else 0)
    return replace(
        target,
        title=f"a layer of {target.title}",
        num_layers=1,
        layer_groups=(_alone(widest),),
        params_total=linear + experts + wide + target.head_params,
        params_active=active,
        embedding_params=0,
        tied_embeddings=False,
        wide_params=wide,
        expert_params=experts,
        num_experts=target.num_experts if experts else 0,
        experts_per_token=target.experts_per_token if experts else 0,
    )


def _heads(target: ModelSpec, number: int) -> ModelSpec:
    """Return `number` heads, each a square layer and an output matrix of its own. Source: Cai et al., Medusa, 2024, section 2.1."""
    linear = number * (target.hidden_size**2 + target.hidden_size * target.vocab_size)
    return replace(
        target,
        title=f"{number} Medusa heads on {target.title}",
        num_layers=1,
        layer_groups=(_alone(target.layer_groups[0]),),
        params_total=linear,
        params_active=linear,
        embedding_params=0,
        head_params=0,
        tied_embeddings=False,
        wide_params=0,
        num_experts=0,
        experts_per_token=0,
        expert_params=0,
    )


def _alone(group: LayerGroup) -> LayerGroup:
    return replace(group, num_layers=1, num_sharing_layers=0)


class Acceptance(NamedTuple):
    """Which drafts are accepted: decided by the request and the place in its text, not by the step that verifies it."""

    rates: Float64Array
    """By request, modulo their number."""
    seed: int

    @classmethod
    def of(cls, drafting: Drafting, seed: int) -> "Acceptance":
        """Return the acceptance of a run: a request's rate is fixed, or drawn from a beta distribution."""
        mean, spread = drafting.acceptance_rate, drafting.acceptance_spread
        if spread == 0:
            return cls(np.full(1, mean), seed)
        weight = mean * (1 - mean) / spread**2 - 1
        rng = np.random.default_rng([seed, _NUM_RATES])
        return cls(rng.beta(mean * weight, (1 - mean) * weight, _NUM_RATES), seed)


NOTHING_ACCEPTED = Acceptance(np.zeros(1), 0)


@lean_jit
def accept_drafts(acceptance: Acceptance, batch: StepBatch, num_entries: int) -> None:
    """Write into the first entries of `batch` how many of their drafts are accepted: those before one that is not."""
    for i in range(num_entries):
        request, known = batch["request"][i], batch["num_known_tokens"][i]
        rate, accepted = acceptance.rates[request % acceptance.rates.size], 0
        for k in range(batch["num_slots_needed"][i] - known):
            if _chance(acceptance.seed, request, known + k) >= rate:
                break
            accepted += 1
        batch["num_accepted_tokens"][i] = accepted


@lean_jit
def _chance(seed: int, request: int, place: int) -> float:
    """Return a number from 0 to below 1, as good as random. Source: SplitMix64 (Steele et al., OOPSLA 2014), three times."""
    word = mixed_one(np.uint64(place) ^ mixed_one(np.uint64(request) ^ mixed_one(np.uint64(seed))))
    return float(word >> np.uint64(11)) * 2.0**-53
