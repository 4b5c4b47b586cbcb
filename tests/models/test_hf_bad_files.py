"""Files that describe no model, or say what is not understood: with the reason."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hf_configs import LATENT, LLAMA, MIXTURE, WINDOWED, parse

from pagedkv.catalogue import load_model, model_names
from pagedkv.errors import ConfigError
from pagedkv.hf_family import family_of
from pagedkv.hf_fields import ConfigFields


def test_a_file_or_its_folder_is_a_model(tmp_path: Path) -> None:
    folder = tmp_path / "my-llama"
    folder.mkdir()
    path = folder / "config.json"
    path.write_text(json.dumps(LLAMA), encoding="utf-8")
    model = load_model(str(path))
    assert (model.name, model.title, model.source) == (str(path), "my-llama", str(path))
    assert load_model(str(folder)).layer_groups == model.layer_groups
    assert load_model(model.name) == model, "its name can be given to --model again"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{'hidden_size': 8}", r"is not JSON: .*line 1 column 2"),
        ("", r"is not JSON"),
        ("[1, 2]", r"holds \[1, 2\]: needs an object"),
        ("[" * 100_000, r"is not JSON"),
        ('{"hidden_size": ' + "9" * 5000 + "}", r"is not JSON"),
        ("{}", r"architectures and model_type are missing: needs one of .*LlamaForCausalLM"),
        ('{"text_config": 5, "model_type": "llama"}', r"text_config is 5: needs an object"),
        ('{"architectures": "LlamaForCausalLM"}', r"architectures is 'LlamaForCausalLM': needs a list"),
        ("\x00\x01", r"is not JSON"),
    ],
)
def test_a_file_that_describes_no_model_says_why(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        load_model(str(path))
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read_say_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*missing\.json"):
        load_model(str(tmp_path / "missing.json"))
    with pytest.raises(ConfigError, match=r"the folder .* has no config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"cannot read"):
        load_model(str(tmp_path / "config.json"))
    (tmp_path / "config.json").write_bytes(b" " * (2**24 + 1))
    with pytest.raises(ConfigError, match=r"is larger than"):
        load_model(str(tmp_path / "config.json"))
    for name in ("a" * 5000, "nul\0byte", "", "no/such/repository"):
        with pytest.raises(ConfigError, match="unknown model"):
            load_model(name)


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (LLAMA, {"hidden_size": ...}, r"m, config\.json: hidden_size is missing: needs a whole number from 1"),
        (LLAMA, {"num_hidden_layers": -3}, r"num_hidden_layers is -3: needs a whole number from 1 to 10,000"),
        (LLAMA, {"num_hidden_layers": 0}, r"num_hidden_layers is 0"),
        (LLAMA, {"num_hidden_layers": 10**9}, r"num_hidden_layers is 1000000000"),
        (LLAMA, {"hidden_size": 512.0}, r"hidden_size is 512\.0: needs a whole number"),
        (LLAMA, {"hidden_size": True}, r"hidden_size is True"),
        (LLAMA, {"hidden_size": "512"}, r"hidden_size is '512'"),
        (LLAMA, {"hidden_size": 10**40}, r"hidden_size is 1000\S*0000: needs a whole number"),
        (LLAMA, {"hidden_size": 10**9, "intermediate_size": 10**9}, r"parameters, more than 1e\+15"),
        (LLAMA, {"vocab_size": None}, r"vocab_size is missing"),
        (LLAMA, {"max_position_embeddings": ...}, r"max_position_embeddings is missing"),
        (LLAMA, {"num_key_value_heads": 3}, r"num_attention_heads is 8: needs a multiple of the 3 num_key_value_heads"),
        (LLAMA, {"num_attention_heads": 7, "num_key_value_heads": 7}, r"hidden_size of 512 does not divide into 7 parts"),
        (LLAMA, {"tie_word_embeddings": 1}, r"tie_word_embeddings is 1: needs true or false"),
        (LLAMA, {"torch_dtype": "int3"}, r"torch_dtype is 'int3': needs bfloat16"),
        (LLAMA, {"architectures": ["MambaForCausalLM"]}, r"\['MambaForCausalLM'\], which is not supported: needs one"),
        (LLAMA, {"architectures": ..., "model_type": "rwkv7"}, r"model_type is 'rwkv7', which is not supported: .*llama"),
        (LLAMA, {"layer_types": ["full_attention"]}, r"layer_types has 1 entries: needs one for each of 4 layers"),
        (LLAMA, {"layer_types": ["lightning"] * 4}, r"layer_types has 'lightning': needs one of full_attention"),
        (LLAMA, {"layer_types": ["sliding_attention"] * 4}, r"sliding_window is missing: 4 layers need it"),
        (LLAMA, {"sliding_window": -1}, r"sliding_window is -1"),
        (LLAMA, {"attn_type_list": [1, 0, 1, 0]}, r"attn_type_list .*only 1, full attention"),
        (LLAMA, {"quantization_config": {"quant_method": "quip"}}, r"quantization_config: quant_method is 'quip': .*awq"),
        (LLAMA, {"quantization_config": {"quant_method": "awq"}}, r"bits or w_bit is missing"),
        (LLAMA, {"quantization_config": []}, r"quantization_config is \[\]: needs an object"),
        (LLAMA, {"attention_chunk_size": 512}, r"no_rope_layer_interval is missing"),
        (LLAMA, {"num_kv_shared_layers": 4}, r"num_kv_shared_layers is 4: needs a whole number from 0 to 3"),
        (MIXTURE, {"num_experts_per_tok": 17}, r"text_config: num_experts_per_tok is 17: needs a whole number from 1 to 16"),
        (MIXTURE, {"linear_num_value_heads": ...}, r"text_config: linear_num_value_heads is missing"),
        (MIXTURE, {"mamba_ssm_dtype": "int8"}, r"mamba_ssm_dtype .* is 'int8'"),
        (LATENT, {"q_lora_rank": None}, r"q_lora_rank is missing: the indexer"),
        (LATENT, {"qk_head_dim": 7}, r"qk_head_dim is 7, but qk_nope_head_dim \+ qk_rope_head_dim is 48"),
        (LATENT, {"sliding_window": 64}, r"kv_lora_rank does not go with sliding_window layers"),
        (LATENT, {"indexer_types": ["full"] * 3}, r"indexer_types has 3 entries"),
        (LATENT, {"index_topk_pattern": "FSSF"}, r"index_topk_pattern is not understood"),
        (WINDOWED, {"sliding_window": None}, r"sliding_window is missing: 2 layers need it"),
    ],
)
def test_a_bad_field_is_named_with_what_it_needs(base: dict[str, Any], change: dict[str, Any], message: str) -> None:
    config = copy.deepcopy(base)
    inner = config.get("text_config", config)
    inner.update(change)
    for key in [key for key, value in inner.items() if value is ...]:
        del inner[key]
    with pytest.raises(ConfigError, match=message):
        parse(config)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kv_compression", 4),
        ("swa_num_key_value_heads", 8),
        ("attn_output_gate", True),
        ("sparse_attention_config", {"sparse_block_size": 128}),
        ("linear_attn_config", {"num_heads": 8}),
        ("index_topk", 2048),
        ("index_topk_freq", 4),
        ("indexer_types", ["full"] * 4),
        ("mamba_num_heads", 8),
        ("conv_kernel", 4),
        ("attention_sink_size", 4),
        ("v_head_dim", 128),
        ("qk_rope_head_dim", 64),
        ("cross_attention_layers", [3]),
        ("compress_ratios", [4, 4, 4, 4]),
        ("latent_size", 8),
        ("cache_every_n_layers", 2),
        ("num_memory_blocks", 2),
    ],
)
def test_a_field_about_attention_that_is_not_understood_is_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is .*: a field about attention that is not understood"):
        parse({**LLAMA, name: value})
    nested = {**MIXTURE, "text_config": {**MIXTURE["text_config"], f"new_{name}": value}}
    with pytest.raises(ConfigError, match=rf"text_config: new_{name} is"):
        parse(nested)
    parse({**LLAMA, name: None})
    parse({**LLAMA, name: False})


@pytest.mark.parametrize(
    "name", ["attention_dropout", "attn_implementation", "final_logit_softcapping", "rope_theta", "hidden_act", "head_token_id"]
)
def test_fields_about_other_things_are_not_in_the_way(name: str) -> None:
    assert parse({**LLAMA, name: 0.5}) == parse(LLAMA)


def test_every_catalogue_model_is_of_a_family() -> None:
    assert len(model_names()) >= 45
    for model_type in ("llama", "qwen3_5_text", "gemma4", "deepseek_v4", "nemotron_h"):
        assert model_type in family_of(ConfigFields({"model_type": model_type}, where="a test")).model_types
