import tomllib
from pathlib import Path
from typing import Any

import pytest

from pagedkv.catalogue import hardware_names, load_hardware, load_model, model_names
from pagedkv.errors import ConfigError
from pagedkv.model_table import markdown
from pagedkv.model_toml import model_from_table
from pagedkv.weight_format import WEIGHT_FORMATS

MODELS_TOML = Path(__file__).parents[1] / "pagedkv" / "models.toml"
MODELS_PAGE = Path(__file__).parents[1] / "docs" / "models.md"
MODEL_TABLE: dict[str, Any] = {
    "title": "A model",
    "hf_id": "some/Model",
    "source": "its config.json",
    "config": {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 10,
        "max_position_embeddings": 64,
    },
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
        ("h100", 8192, 1024),
        ("l40s", 2048, 256),
        ("rtx-5090", 2048, 256),
        ("rtx-pro-6000", 8192, 1024),
        ("b200", 8192, 1024),
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


def test_the_catalogue_has_the_models_that_people_serve() -> None:
    assert len(model_names()) >= 45
    families = (
        "llama-2 llama-3 llama-3.1 llama-3.2 llama-3.3 qwen2.5 qwen3- qwen3.5 qwen3.6 mistral mixtral gemma-3 gemma-4 gpt-oss "
        "deepseek glm kimi minimax nemotron-3 phi-4 opt"
    )
    for family in families.split():
        assert any(name.startswith(family) for name in model_names()), family


@pytest.mark.parametrize("name", model_names())
def test_every_model_is_whole(name: str) -> None:
    model = load_model(name)
    assert model.native_format == WEIGHT_FORMATS[model.native_format.name], "advice prints it after --quantization"
    assert model.params_active <= model.params_total
    assert (model.params_active < model.params_total) == (model.num_experts > 0)
    assert model.kv_spec("auto").sequence_bytes(model.max_context) > 0
    assert model.hf_id.count("/") == 1


def test_published_parameters_check_the_count() -> None:
    tables = tomllib.loads(MODELS_TOML.read_text(encoding="utf-8"))
    published = {name: table["params_published"] for name, table in tables.items() if "params_published" in table}
    assert len(published) > 60
    for name, params in published.items():
        assert load_model(name).params_total == pytest.approx(params, rel=0.01)
    with pytest.raises(ConfigError, match=r"m: 824 parameters counted, but params_published is 1,000"):
        model_from_table("m", {**MODEL_TABLE, "params_published": 1000.0})


def test_the_page_of_models_is_up_to_date() -> None:
    _, _, generated = MODELS_PAGE.read_text(encoding="utf-8").partition("<!-- generated by python -m pagedkv.model_table -->\n")
    assert generated.partition("<!-- end of the generated part -->")[0] == markdown()


def test_well_formed_tables_load() -> None:
    model = model_from_table("m", MODEL_TABLE)
    assert (model.linear_params, model.params_total, model.native_format.name) == (4 * 64 + 3 * 128, 640 + 160 + 24, "bf16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"title": 8}, r"m\.title must be of type str, not 8"),
        ({"titel": "A model"}, r"unknown field 'm\.titel': did you mean m\.title"),
        ({"source": None}, r"m\.source is missing"),
        ({"source": " "}, r"m\.source is empty"),
        ({"config": 8}, r"m\.config must be of type dict"),
        ({"aliases": "other/Model"}, r"m\.aliases must be of type list"),
        ({"params_published": 824}, r"m\.params_published must be of type float"),
        ({"config": {**MODEL_TABLE["config"], "hidden_size": "8"}}, r"m, config\.json: hidden_size is '8'"),
        ({"config": {"model_type": "llama"}}, r"num_hidden_layers is missing"),
    ],
)
def test_a_bad_model_is_refused_with_the_field(change: dict[str, object], message: str) -> None:
    table = {key: value for key, value in {**MODEL_TABLE, **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        model_from_table("m", table)
