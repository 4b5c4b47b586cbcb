"""Whom measurements are about: the deployment that flags describe, with what files say of it, or a contradiction named."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from pagedkv.catalogue import known_model, load_hardware, load_model, quantized_repository
from pagedkv.errors import ConfigError
from pagedkv.ledgers.llama_cpp import LlamaCppLedger
from pagedkv.memory_request import MemoryRequest
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.deployment import memory_request
from pagedkv.sims.engines import load_engine
from pagedkv.sims.measurements import Claims, Measurements
from pagedkv.sims.vllm_versions import VLLMVersion, vllm_version

PARAMS_SPREAD = 0.03
"""How far a file's number of parameters may be from the model's: tables of norms and tied heads are counted or not."""
_GRAPHS_SET_ASIDE_SINCE = (0, 21)
"""The version of vLLM from which on memory is divided as in the current one. Source: `VLLMVersion.cuda_graphs_set_aside`."""
_OLDEST = (0, 8)
"""Versions before it start another engine by default (V0), whose memory is not modelled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What was measured."""

    serving: ServingConfig
    """The flags, with what files say besides."""
    request: MemoryRequest
    """Model, machine and settings of the same."""
    engine: str
    """The preset's name."""
    notes: tuple[str, ...]
    """What is taken from files, and what cannot be checked."""

    @property
    def chunk_tokens(self) -> int:
        """Most tokens that the engine computes together."""
        if self.engine in ("llama-cpp", "ollama"):
            return self.serving.ubatch_size or LlamaCppLedger().ubatch_size
        return self.request.max_num_batched_tokens


def subject_of(serving: ServingConfig, files: Sequence[Measurements]) -> Subject:
    """Return what the flags and the files describe together.

    Raises:
        ConfigError: If they contradict each other, or describe what cannot be calibrated; with what to give instead.
    """
    if "," in serving.engine:
        raise ConfigError(f"--engine {serving.engine}: a measurement is of one engine; name it")
    if serving.num_speculative_tokens or serving.speculative_method or serving.speculative_model:
        raise ConfigError("calibrate measures steps without drafts: leave speculative flags out, and measure without them")
    if serving.clock_derate is not None:
        raise ConfigError(f"--clock-derate {serving.clock_derate:g}: a measurement has the clock in it already; leave it out")
    if serving.cpu_bandwidth is not None:
        raise ConfigError(
            f"--cpu-bandwidth {serving.cpu_bandwidth}: a measurement has what others read in it already; leave it out"
        )
    engine = load_engine(serving.engine)
    notes: list[str] = []
    for each in files:
        _check_engine(each, engine.name)
        _check_model(each, serving, notes)
        if each.claims.weights is not None:
            serving = _with(serving, "quantization", each.claims.weights, str(each.path), notes)
        if each.start_up is not None:
            serving = _with_settings(serving, each, notes)
    request = memory_request(serving)
    if serving.tensor_parallel_size != 1:
        request.check()  # which says what is supported
    return Subject(serving=serving, request=request, engine=engine.name, notes=tuple(notes))


def _check_engine(file: Measurements, engine: str) -> None:
    """Refuse a file of another engine, or of a version of vLLM whose memory is divided by another rule."""
    claims, base = file.claims, engine.partition("@")[0]
    same = {"llama-cpp": ("llama-cpp", "ollama")}.get(claims.engine or "", (claims.engine,))
    if claims.engine is not None and base not in same:
        raise ConfigError(f"{file.path} is of {claims.engine}, and --engine is {engine}: give --engine {claims.engine}")
    if claims.version is None or base != "vllm":
        return
    preset = _preset_of(claims.version, file)
    if vllm_version(engine).cuda_graphs_set_aside != preset.cuda_graphs_set_aside:
        needed = "vllm" if preset is vllm_version("vllm") else f"vllm@{preset.name}"
        raise ConfigError(
            f"{file.path} is of vLLM {claims.version}, and --engine {engine} is {vllm_version(engine).name}, which divides memory "
            f"otherwise: give --engine {needed}"
        )


def _preset_of(version: str, file: Measurements) -> VLLMVersion:
    parts = version.split(".")
    if len(parts) < 2 or not (parts[0].isdecimal() and parts[1].isdecimal()):
        raise ConfigError(f"{file.path}: vLLM version {version!r} is not understood; needs one such as 0.19.0")
    number = (int(parts[0]), int(parts[1]))
    if number < _OLDEST:
        raise ConfigError(
            f"{file.path} is of vLLM {version}: versions before {'.'.join(map(str, _OLDEST))} are not "
            "modelled; measure with a newer one"
        )
    return vllm_version("vllm" if number >= _GRAPHS_SET_ASIDE_SINCE else "vllm@0.19")


def _check_model(file: Measurements, serving: ServingConfig, notes: list[str]) -> None:
    """Refuse a file of another model, as far as it can be told."""
    claims, model = file.claims, load_model(serving.model)
    if claims.num_params is not None and abs(claims.num_params / model.params_total - 1) > PARAMS_SPREAD:
        raise ConfigError(
            f"{file.path} is of {_quoted(claims)}, {claims.num_params / 1e9:.2f} billion parameters, and --model {serving.model} "
            f"has {model.params_total / 1e9:.2f}: give the --model that ran, a name of simulate models or a config.json"
        )
    name = claims.model or ""
    if known_model(name) or quantized_repository(name) is not None:
        entry = name if known_model(name) else (quantized_repository(name) or ("",))[0]
        if load_model(entry).name != model.name:
            raise ConfigError(f"{file.path} is of {name}, and --model is {serving.model}: give --model {entry}")
    elif name and claims.num_params is None:
        notes.append(f"{file.path} is of {name!r}, which is no name here: taken to be {model.title}")
    elif not name and claims.num_params is None and file.rates:
        notes.append(f"{file.path} names no model: taken to be {model.title}")


def _quoted(claims: Claims) -> str:
    return repr(claims.model) if claims.model else "a model"


def _with_settings(serving: ServingConfig, file: Measurements, notes: list[str]) -> ServingConfig:
    """Return `serving` with what a start-up log says of how memory is divided; a share that it does not name is vLLM's own."""
    assert file.start_up is not None
    stated: list[str] = []
    settings = dict(file.start_up.settings)
    for name, text in settings.items():
        serving = _with(serving, name, text, str(file.path), stated)
    if stated:
        notes.append(f"{file.path} says " + ", ".join(note.partition(" says ")[2] for note in stated))
    if serving.gpu_memory_utilization is None and serving.engine.startswith("vllm"):
        usual = vllm_version(serving.engine).gpu_memory_utilization
        notes.append(f"{file.path} names no gpu_memory_utilization: taken to be vLLM's default, {usual:g}")
        serving = replace(serving, gpu_memory_utilization=usual)
    return serving


def _with(serving: ServingConfig, name: str, text: str, where: str, notes: list[str]) -> ServingConfig:
    """Return `serving` with what a file says of a setting.

    Raises:
        ConfigError: If a flag says something else, or the value is none.
    """
    value, now = _typed(name, text, where), getattr(serving, name)
    usual = next(spec.default for spec in fields(ServingConfig) if spec.name == name)
    flag = f"--{name.replace('_', '-')}"
    if now == usual:
        if value != now:
            notes.append(f"{where} says {flag} {text}")
        return replace(serving, **{name: value})
    if str(now) != str(value) and now != value:
        raise ConfigError(f"{flag} is {now}, and {where} says {text}: leave the flag out, or give the file of that run")
    return serving


def _typed(name: str, text: str, where: str) -> Any:
    try:
        if name in ("quantization", "kv_cache_dtype", "kv_cache_memory_bytes"):
            return text
        if name == "enforce_eager":
            return text.lower() == "true"
        return float(text) if name == "gpu_memory_utilization" else int(text)
    except ValueError as error:
        raise ConfigError(f"{where}: {name} is {text!r}; needs a number") from error


def check_devices(files: Sequence[Measurements], hardware: str) -> None:
    """Refuse a file that names another device than the machine is, where both are known.

    Raises:
        ConfigError: With both names.
    """
    machine = load_hardware(hardware)
    title = machine.title.partition(" (")[0].lower()
    for file in files:
        device = file.claims.device
        if device is not None and not hardware.endswith(".toml") and title != device.lower():
            raise ConfigError(
                f"{file.path} is of {device!r}, and --hardware {hardware} is {machine.title}: give the machine that ran"
            )
