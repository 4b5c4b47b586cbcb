import csv
from pathlib import Path
from typing import Any

import pytest

from pagedkv.catalogue import (
    hardware_from_table,
    hardware_names,
    load_hardware,
    load_model,
    model_from_table,
    model_names,
)
from pagedkv.errors import ConfigError

FIGURE = {"value": 1, "tag": "spec", "source": "a datasheet"}
HARDWARE_TABLE: dict[str, Any] = {
    "title": "A machine",
    "memory_kind": "discrete",
    **dict.fromkeys(
        (
            "visible",
            "memory_bandwidth",
            "read_bandwidth",
            "kv_read_bandwidth",
            "engine_overhead",
            "cuda_graphs",
            "step_overhead",
            "sequence_overhead",
            "default_utilization",
            "max_utilization_seen",
        ),
        FIGURE,
    ),
    "spec_flops": {"bf16": FIGURE},
    "reached_flops": {"bf16": FIGURE},
}
MODEL_TABLE: dict[str, Any] = {
    "title": "A model",
    "hf_id": "some/Model",
    "source": "its config.json",
    "hidden_size": 8,
    "num_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 10,
    "max_context": 64,
    "params_total": 1000,
    "params_active": 1000,
    "embedding_params": 80,
    "head_params": 80,
    "tied_embeddings": False,
    "wide_params": 8,
    "native_format": "bf16",
    "layer_groups": [{"kind": "full", "num_layers": 1, "num_kv_heads": 1, "key_dim": 8, "value_dim": 8}],
}


@pytest.mark.parametrize("name", model_names())
def test_every_model_loads_by_name_and_by_hugging_face_id_in_any_case(name: str) -> None:
    model = load_model(name)
    assert model.name == name
    assert model.source
    for other_name in (name.upper(), model.hf_id, model.hf_id.lower(), *model.aliases):
        assert load_model(other_name) == model


def test_no_name_means_two_models() -> None:
    names = [n.lower() for m in map(load_model, model_names()) for n in (m.name, m.hf_id, *m.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", hardware_names())
def test_every_figure_of_every_machine_has_a_source_and_a_unit(name: str) -> None:
    hardware = load_hardware(name.upper())
    assert hardware.name == name
    figures = dict(hardware.figures())
    assert len(figures) >= 14
    for label, figure in figures.items():
        assert figure.source.strip(), label
        assert label.endswith(")"), label
        assert "None" not in label


@pytest.mark.parametrize("name", hardware_names())
def test_no_machine_exceeds_its_datasheet(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.kv_read_bandwidth.value <= hardware.read_bandwidth.value <= hardware.memory_bandwidth.value
    for dtype, reached in hardware.reached_flops.items():
        assert reached.value <= hardware.spec_flops[dtype].value
    assert hardware.default_utilization.value <= hardware.max_utilization_seen.value <= 1


@pytest.mark.parametrize(
    ("name", "tokens", "sequences"),
    [
        ("dgx-spark", 2048, 256),
        ("rtx-4090", 2048, 256),
        ("a100-40gb", 2048, 256),
        ("a100-80gb", 2048, 256),
        ("h100-80gb", 8192, 1024),
    ],
)
def test_batch_defaults_are_those_of_vllm(name: str, tokens: int, sequences: int) -> None:
    hardware = load_hardware(name)
    assert (hardware.default_max_num_batched_tokens, hardware.default_max_num_seqs) == (tokens, sequences)


def test_a_spark_shows_what_vllm_prints() -> None:
    spark = load_hardware("dgx-spark")
    assert spark.unified
    assert round(spark.visible_bytes / 2**30, 2) == 121.69
    assert spark.os_reserve.value == 4 * 2**30
    assert spark.memory_floor.value == 8 * 2**30


def test_unknown_names_bring_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'llama-3\.1-8'.*llama-3\.1-8b"):
        load_model("llama-3.1-8")
    with pytest.raises(ConfigError, match=r"unknown hardware 'dgxspark'.*dgx-spark"):
        load_hardware("dgxspark")


def test_well_formed_tables_load() -> None:
    assert model_from_table("m", MODEL_TABLE).linear_params == 832
    assert hardware_from_table("h", HARDWARE_TABLE).visible_bytes == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "8"}, r"m\.hidden_size must be of type int, not '8'"),
        ({"hidden_size": True}, r"m\.hidden_size must be of type int"),
        ({"hiden_size": 8}, r"unknown field 'm\.hiden_size': did you mean m\.hidden_size"),
        ({"hidden_size": None}, r"m\.hidden_size is missing"),
        ({"layer_groups": [8]}, r"m\.layer_groups must be a table"),
        ({"layer_groups": [{"kind": "full"}]}, r"m\.layer_groups\.key_dim is missing"),
        ({"layer_groups": [{**MODEL_TABLE["layer_groups"][0], "kind": "sliding_window"}]}, r"m\.layer_groups: window"),
        ({"layer_groups": [{**MODEL_TABLE["layer_groups"][0], "num_layers": 2}]}, r"m: layer_groups of m"),
        ({"native_format": "bf61"}, r"'bf61'.*bf16"),
        ({"params_total": 10}, r"params_total 10 of m"),
        ({"num_experts": 8}, r"num_experts.*contradict"),
    ],
)
def test_a_bad_model_is_refused_with_the_field(change: dict[str, object], message: str) -> None:
    table = {key: value for key, value in {**MODEL_TABLE, **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        model_from_table("m", table)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visible": 24}, r"h\.visible must be of type Figure, not 24"),
        ({"visible": {**FIGURE, "value": "24 GB"}}, r"h\.visible\.value must be a number, not '24 GB'"),
        ({"visible": {"value": 1, "tag": "spec"}}, r"h\.visible\.source is missing"),
        ({"visible": {**FIGURE, "source": " "}}, r"h\.visible: .*no source"),
        ({"visible": {**FIGURE, "tag": "guess"}}, r"h\.visible: unknown tag 'guess'"),
        ({"visible": {**FIGURE, "value": -1}}, r"h\.visible: .*negative"),
        ({"reached_flops": {"fp8": FIGURE}}, r"reached_flops\.bf16 is missing"),
        ({"reached_flops": {"bf16": 1}}, r"h\.reached_flops must be a table"),
        ({"spec_flops": 1}, r"h\.spec_flops must be of type dict"),
        ({"memory_kind": "shared"}, r"unknown memory_kind 'shared'"),
    ],
)
def test_a_bad_machine_is_refused_with_the_field(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hardware_from_table("h", {**HARDWARE_TABLE, **change})


def test_models_agree_with_the_published_table(shared_data: Path) -> None:
    with (shared_data / "models.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["hf_id"].lower(): row for row in csv.DictReader(file)}
    for model in map(load_model, model_names()):
        row = rows[model.hf_id.lower()]
        groups = model.kv_spec("bf16").group_bytes_per_token
        windowed = sum(b for b, group in zip(groups, model.layer_groups, strict=True) if group.window)
        assert windowed == int(row["swa_bytes_per_token_bf16_capped"])
        assert sum(groups) - windowed == int(row["kv_bytes_per_token_bf16"])
        assert model.params_total == pytest.approx(int(row["params_total"]), rel=0.01)
        assert model.params_active == pytest.approx(int(row["params_active"]), rel=0.01)
        shape = (model.num_layers, model.hidden_size, model.num_attention_heads, model.vocab_size, model.max_context)
        assert shape == tuple(int(row[column]) for column in ("layers", "hidden", "heads", "vocab", "max_ctx"))
        assert model.tied_embeddings == bool(int(row["tied_embeddings"]))
