"""A configuration with every question answered: who serves, who asks, what is measured. Built once, run many times."""

from dataclasses import dataclass, replace

from pagedkv.allocators import ALLOCATORS
from pagedkv.errors import ConfigError, unknown_name
from pagedkv.sims.config import MeasurementConfig, ServingConfig, SimulationConfig, parse_seconds
from pagedkv.sims.deployment import Deployment, deploy
from pagedkv.sims.engine_flags import refuse_flags_of_others
from pagedkv.sims.goodput import Goal, parse_goals
from pagedkv.sims.load import Load
from pagedkv.sims.load_flags import check_load_flags, resolve_load, without_defaults
from pagedkv.sims.model_names import ModelNames, is_model_server, model_names
from pagedkv.sims.model_serving import ModelServing, model_serving
from pagedkv.sims.replication import Replication, replication
from pagedkv.sims.routing import DEFAULT_ROUTING

DEFAULT_DURATION_S = 600.0
DEFAULT_WARMUP_S = 60.0
MOST_REPEATS = 10_000
"""Of one answer: intervals shrink with the square root, and the log of every run is held until the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What a simulation runs on."""

    config: SimulationConfig
    """As asked for; a setting that says what would be so anyway is left out, so that equal scenarios have equal ones."""
    deployment: Deployment
    load: Load
    allocators: tuple[str, ...]
    goals: tuple[Goal, ...]
    warmup_s: float
    duration_s: float | None
    """Measured time after the warm-up; None: until all requests of the load are answered."""
    replication: Replication
    """How many replicas of the deployment there are, and their faults."""
    model_serving: ModelServing | None = None
    """How several models come and go, of which the deployment is the first; None: there is one, and it stays."""

    @property
    def model_name(self) -> str:
        """The model's, or those of all with commas."""
        return ",".join(deployment.model.name for deployment in self.deployments)

    @property
    def model_titles(self) -> str:
        """What a sentence calls the model, or all of them."""
        return ", ".join(deployment.model.title for deployment in self.deployments)

    @property
    def deployments(self) -> tuple[Deployment, ...]:
        """By model."""
        return (self.deployment,) if self.model_serving is None else self.model_serving.deployments


def resolve(config: SimulationConfig) -> Scenario:
    """Return the scenario that `config` describes.

    Raises:
        ConfigError: For anything that cannot work, with what would.
    """
    check_load_flags(config.load)
    refuse_flags_of_others(config.serving)
    names, server = model_names(config), None
    if is_model_server(config.serving, names.served):
        server = model_serving(config.serving, names.served)
    deployment = _deployment(config.serving, names, server)
    usual_allocators = deployment.engine.allocators(config.serving)
    allocators = asked_allocators(config.measurement, usual=usual_allocators)
    goals = parse_goals(config.measurement.goodput)
    load = resolve_load(config.load, (deployment,) if server is None else server.deployments, names.of_class)
    warmup_s, duration_s = _window(config.measurement, load)
    usual = _usual_window(load)
    replicas = replication(config.serving, end_s=None if duration_s is None else warmup_s + duration_s)
    return Scenario(
        config=SimulationConfig(
            load=without_defaults(config.load, load),
            serving=replace(deployment.config, routing=None if replicas.routing == DEFAULT_ROUTING else replicas.routing),
            measurement=replace(
                config.measurement,
                allocator=None if allocators == usual_allocators else allocators,
                warmup=None if warmup_s == usual[0] else config.measurement.warmup,
                duration=None if duration_s == usual[1] else config.measurement.duration,
            ),
        ),
        deployment=deployment,
        load=load,
        allocators=allocators,
        goals=goals,
        warmup_s=warmup_s,
        duration_s=duration_s,
        replication=replicas,
        model_serving=server,
    )


def _deployment(serving: ServingConfig, names: ModelNames, server: ModelServing | None) -> Deployment:
    if server is None:
        same = names.served == names.asked
        return deploy(serving if same else replace(serving, model=names.served[0]))
    first = server.models[0].usual
    asked = {name: getattr(serving, name) for name in ("max_queue", "ctx_size", "max_model_len")}
    return replace(first, config=replace(first.config, model=names.in_words, **asked))


def asked_allocators(measurement: MeasurementConfig, *, usual: tuple[str, ...]) -> tuple[str, ...]:
    """Return the allocators that `measurement` names, each once; `usual` if it leaves them open.

    Raises:
        ConfigError: If it names none, or one that there is not.
    """
    if measurement.allocator is None:
        return usual
    names = [name.strip() for text in measurement.allocator for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"no allocator given: choose from {', '.join(ALLOCATORS.names())}")
    for name in names:
        if name not in ALLOCATORS.names():
            raise unknown_name("allocator", name, ALLOCATORS.names())
    return tuple(dict.fromkeys(names))


def _usual_window(load: Load) -> tuple[float, float | None]:
    return (0.0, None) if load.num_requests is not None else (DEFAULT_WARMUP_S, DEFAULT_DURATION_S)


def _window(measurement: MeasurementConfig, load: Load) -> tuple[float, float | None]:
    if not 1 <= measurement.repeats <= MOST_REPEATS:
        raise ConfigError(f"repeats is {measurement.repeats}: needs 1 to {MOST_REPEATS:,}; each is a run, all of which are kept")
    if measurement.seed < 0:
        raise ConfigError(f"seed is {measurement.seed}: needs 0 or more")
    warmup_s, duration_s = _usual_window(load)
    if measurement.warmup is not None:
        warmup_s = parse_seconds(measurement.warmup, name="warmup")
    if measurement.duration is not None:
        duration_s = parse_seconds(measurement.duration, name="duration")
        if duration_s <= 0:
            raise ConfigError(f"duration is {measurement.duration}: needs more than 0, e.g. 600s")
    return warmup_s, duration_s
