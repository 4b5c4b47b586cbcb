"""From the config.json of a Hugging Face repository to a `ModelSpec`."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from pagedkv.errors import ConfigError
from pagedkv.hf_family import Family, family_of
from pagedkv.hf_fields import ConfigFields
from pagedkv.hf_layers import plan_layers
from pagedkv.hf_mixers import mixer_cost
from pagedkv.hf_params import feed_forward_cost, norm_params, read_experts, tables
from pagedkv.hf_quantization import LinearParams, native_format
from pagedkv.kv_spec import LAYER_KINDS, LayerGroup
from pagedkv.layer_plan import LayerPlan
from pagedkv.model_spec import ModelSpec

MAX_PARAMS = 10**15
"""No model has more; a file that says so is wrong."""

_OF_THE_WHOLE = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config", "expert_dtype")
"""Fields that count for a nested text_config too."""

_DRAFT_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
"""How DeepSeek, GLM and Nemotron, Qwen and MiniMax name the number of their layers for drafting."""


def model_from_config(
    config: Mapping[str, object], *, name: str, title: str, source: str, hf_id: str = "", aliases: tuple[str, ...] = ()
) -> ModelSpec:
    """Return the model that a config.json describes. Its parameters are counted from the shapes of its layers.

    Args:
        config: The parsed file.
        name: What `--model` takes.
        title: Its name for a reader.
        source: Where the file comes from.
        hf_id: Its repository.
        aliases: Other repositories of the same shape.

    Raises:
        ConfigError: If the architecture is not supported, a field is missing or out of range, or one about attention is
            not understood; the message names it.
    """
    where = name if name.endswith(".json") else f"{name}, config.json"
    whole = ConfigFields(config, where=where)
    family = family_of(whole)
    nested = whole.section("text_config")
    fields = _text_fields(whole, nested, family)
    plans = Counter(plan_layers(fields, family))
    num_layers = sum(plans.values())
    groups, mixers, mixer_wide = _mixers(fields, family, plans)
    feeds = [(feed_forward_cost(fields, family, plan), count) for plan, count in plans.items()]
    ends = tables(fields, family, num_layers)
    experts = read_experts(fields)
    feed_linear = sum(count * cost.linear_params for cost, count in feeds)
    wide = mixer_wide + sum(count * cost.wide_params for cost, count in feeds)
    wide += norm_params(fields, family, num_layers) + ends.wide_params
    routed = sum(count * cost.expert_params for cost, count in feeds)
    tied = fields.flag("tie_word_embeddings")
    total = mixers + feed_linear + ends.linear_params + wide + routed + ends.embedding_params + (0 if tied else ends.head_params)
    if total > MAX_PARAMS:
        raise ConfigError(f"{where}: its sizes give {total:.3g} parameters, more than {MAX_PARAMS:.0e}: is one of them wrong?")
    linear = LinearParams(
        mixers=mixers,
        feed_forwards=feed_linear + ends.linear_params,
        num_layers=num_layers,
        mixer_layers=sum(count for plan, count in plans.items() if plan.mixer != "none"),
        feed_forward_layers=sum(count for plan, count in plans.items() if plan.feed_forward != "none"),
        has_experts=bool(routed),
    )
    weights = native_format(fields, fields.section("quantization_config"), linear)
    draft_layers = fields.integer(*_DRAFT_LAYERS, default=0, minimum=0)
    max_context, heads = fields.integer("max_position_embeddings"), fields.integer("num_attention_heads")
    fields.check_all_understood()
    if nested is not None:
        whole.check_all_understood()
    return ModelSpec(
        name=name,
        title=title,
        hf_id=hf_id,
        source=source,
        aliases=aliases,
        hidden_size=fields.integer("hidden_size"),
        num_layers=num_layers,
        num_attention_heads=heads,
        vocab_size=fields.integer("vocab_size"),
        max_context=max_context,
        layer_groups=groups,
        params_total=total,
        params_active=total - (routed // experts.total * (experts.total - experts.per_token) if routed else 0),
        embedding_params=ends.embedding_params,
        head_params=ends.head_params,
        tied_embeddings=tied,
        wide_params=wide,
        num_experts=experts.total if routed else 0,
        experts_per_token=experts.per_token if routed else 0,
        expert_params=routed,
        num_parts=linear.mixer_layers + linear.feed_forward_layers,
        draft_layers=draft_layers,
        native_format=weights,
    )


def _text_fields(whole: ConfigFields, nested: ConfigFields | None, family: Family) -> ConfigFields:
    """Return the language model's fields, with what its family leaves out filled in."""
    table = whole.table
    if nested is not None:
        table = {**nested.table, **{key: whole.table[key] for key in _OF_THE_WHOLE if whole.has(key)}}
    return ConfigFields({**family.defaults, **table}, where=whole.where if nested is None else nested.where)


def _mixers(fields: ConfigFields, family: Family, plans: Counter[LayerPlan]) -> tuple[tuple[LayerGroup, ...], int, int]:
    """Return the layer groups by kind, and the linear and the wide parameters of all mixers."""
    owners: Counter[LayerGroup] = Counter()
    readers: Counter[LayerGroup] = Counter()
    linear = wide = 0
    for plan, count in plans.items():
        cost = mixer_cost(fields, family, plan)
        linear += count * cost.linear_params
        wide += count * cost.wide_params
        for cache in cost.caches:
            (owners if plan.owns_cache else readers)[cache] += count
    if not owners:
        raise fields.error("num_hidden_layers", "gives no layer that caches anything: needs attention, linear or Mamba layers")
    groups = [replace(cache, num_layers=count, num_sharing_layers=readers[cache]) for cache, count in owners.items()]
    return tuple(sorted(groups, key=lambda group: LAYER_KINDS.index(group.kind))), linear, wide
