"""What a planner must know of a machine. Every number says whether it is a datasheet's, measured or estimated."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from pagedkv.errors import ConfigError, unknown_name
from pagedkv.row_rates import RowRates
from pagedkv.units import GIB
from pagedkv.weight_format import WeightFormat

Tag = Literal["spec", "measured", "estimated"]

_LARGE_MEMORY_BYTES = 70 * GIB
_NEXT_WIDER = {"fp4": "fp8", "fp8": "bf16", "fp32": "bf16"}


@dataclass(frozen=True, slots=True)
class Figure:
    """A number with its provenance."""

    value: float
    """In the unit of the field that holds it: bytes, seconds, bytes or operations per second, or a share."""
    tag: Tag
    """`spec` (a datasheet or a vendor's default), `measured` (somebody ran it) or `estimated` (reasoned)."""
    source: str
    """Where it comes from, or how it was derived."""

    def __post_init__(self) -> None:
        if self.tag not in get_args(Tag):
            raise unknown_name("tag", self.tag, get_args(Tag))
        if not self.source.strip():
            raise ConfigError(f"the figure {self.value:g} has no source")
        if not self.value >= 0:
            raise ConfigError(f"the figure {self.value:g} must not be negative")


_NOTHING = Figure(0.0, "spec", "memory of a discrete GPU: the operating system has its own")


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareSpec:
    """A machine with one accelerator. Figures carry their provenance; properties with a unit in their name do not."""

    name: str
    """Its name in the catalogue."""
    title: str
    """Its name for a reader."""
    aliases: tuple[str, ...] = ()
    """Other names in the catalogue."""
    memory_kind: Literal["unified", "discrete"]
    """`unified`: the operating system and other programs live in the same memory."""
    visible: Figure = field(metadata={"unit": "bytes"})
    """Memory that CUDA and the engine see."""
    memory_bandwidth: Figure = field(metadata={"unit": "bytes/s"})
    """The datasheet's bandwidth."""
    read_bandwidth: Figure = field(metadata={"unit": "bytes/s"})
    """What a kernel that streams weights reaches."""
    kv_read_bandwidth: Figure = field(metadata={"unit": "bytes/s"})
    """What decode attention reaches on the KV cache."""
    spec_flops: Mapping[str, Figure] = field(metadata={"unit": "flop/s"})
    """The datasheet's dense rate by compute dtype (bf16, fp8, fp4)."""
    reached_flops: Mapping[str, Figure] = field(metadata={"unit": "flop/s"})
    """What a prefill reaches by compute dtype, the output head not counted."""
    os_reserve: Figure = field(default=_NOTHING, metadata={"unit": "bytes"})
    """What the operating system and its services hold when no engine runs; 0 for a discrete GPU."""
    memory_floor: Figure = field(default=_NOTHING, metadata={"unit": "bytes"})
    """Available memory below which the machine may freeze; 0 for a discrete GPU."""
    engine_overhead: Figure = field(metadata={"unit": "bytes"})
    """Libraries and buffers of the engine: all but weights, KV, activations and CUDA graphs."""
    cuda_graphs: Figure = field(metadata={"unit": "bytes"})
    """Captured CUDA graphs; none with `--enforce-eager`."""
    step_overhead: Figure = field(metadata={"unit": "s"})
    """Host and launch time that every step adds, with CUDA graphs."""
    sequence_overhead: Figure = field(metadata={"unit": "s"})
    """Time that every sequence adds to a step: input preparation, sampling, detokenization."""
    default_utilization: Figure = field(metadata={"unit": "share of visible memory"})
    """`--gpu-memory-utilization` where the user names none."""
    max_utilization_seen: Figure = field(metadata={"unit": "share of visible memory"})
    """The highest `--gpu-memory-utilization` known to start; planning above it is refused."""
    disk_read_bandwidth: Figure | None = field(default=None, metadata={"unit": "bytes/s"})
    """What one thread reads from the machine's disk, one large block after the other; None: nobody said. A GPU has no disk."""
    disk_read_latency: Figure | None = field(default=None, metadata={"unit": "s"})
    """What one small read from that disk takes when nothing else is under way; None: nobody said."""
    nvcc_jobs: Figure | None = field(default=None, metadata={"unit": "processes"})
    """Processes of nvcc at once where nobody limits them: one for each core; 0 without CUDA. None for a discrete GPU, whose memory
    they do not use."""
    small_compute_device: bool = False
    """Whether vLLM keeps its small batch defaults in spite of much memory: GB10 (by compute) and A100 (by name)."""
    linear_by_rows: Mapping[str, RowRates] = field(default_factory=dict)
    """By weight type, of those that are multiplied as they are stored: what products of a few rows reach. Without one a product
    takes what its operations take at `reached_flops`, or reading its weights."""
    like: str = ""
    """The catalogue's machine whose figures and fitted step times stand in for what a file does not give; empty: none."""
    step_constants: tuple[Mapping[str, Any], ...] = ()
    """Step times fitted on this very machine, as its file has them; `pagedkv.sims.step_groups` says what is in them."""

    def __post_init__(self) -> None:
        if self.memory_kind not in ("unified", "discrete"):
            raise unknown_name("memory_kind", self.memory_kind, ("unified", "discrete"))
        if "bf16" not in self.reached_flops:
            raise ConfigError("reached_flops.bf16 is missing: every other type falls back on it")
        for label, figure in self.figures():
            if figure.value == 0 and any(unit in label for unit in ("bytes/s", "flop/s", "share")):
                raise ConfigError(f"{label} is 0: it must be above 0")
            if figure.value > 1 and "share" in label:
                raise ConfigError(f"{label} is {figure.value:g}: a share is at most 1")
        if self.visible.value < 1:
            raise ConfigError("visible is 0: a machine without memory serves nobody")

    def derated(self, share: float) -> "HardwareSpec":
        """Return this machine with its compute clock at `share` of what it was, as when it throttles.

        Compute rates fall with the clock. Memory bandwidth does not, for memory has a clock of its own, and even a quarter of the
        compute clock asks for data faster than memory delivers it. Host time per step does not either: it is the processor's.

        Raises:
            ConfigError: If the share is not above 0 and at most 1.
        """
        if not 0 < share <= 1:
            raise ConfigError(
                f"--clock-derate {share:g} is the share of the clock that is left: needs more than 0, at most 1, e.g. 0.5"
            )
        if share == 1:
            return self
        slower = {
            dtype: Figure(figure.value * share, "estimated", f"--clock-derate {share:g} of {figure.value:g}: {figure.source}")
            for dtype, figure in self.reached_flops.items()
        }
        title = f"{self.title} at {share:.0%} of its clock"
        return replace(self, title=title, reached_flops=slower, linear_by_rows={})  # nobody knows what of a time by rows is reading

    def beside_cpu_work(self, bytes_per_s: float) -> "HardwareSpec":
        """Return this machine with its processor moving `bytes_per_s` to and from the memory that the GPU works on, too.

        The GPU keeps the rest of what a kernel can read: all of its rates of memory fall by the same share. On a discrete GPU
        the processor has a memory of its own.

        Raises:
            ConfigError: On a discrete GPU, or if the processor would leave nothing; with what would work.
        """
        work, most = f"--cpu-bandwidth {bytes_per_s / 1e9:g}GB/s", self.read_bandwidth.value
        if not self.unified:
            raise ConfigError(f"{work}: the processor beside {self.title} has memory of its own and takes nothing: leave it out")
        if bytes_per_s >= most:
            raise ConfigError(f"{work} leaves the GPU nothing of the {most / 1e9:g} GB/s that can be read: needs less, e.g. 50GB/s")
        if not bytes_per_s:
            return self
        share = 1 - bytes_per_s / most

        def left(figure: Figure) -> Figure:
            source = f"{work} leaves {share:.0%} of {figure.value / 1e9:g} GB/s: {figure.source}"
            return Figure(figure.value * share, "estimated", source)

        return replace(
            self,
            title=f"{self.title} beside {bytes_per_s / 1e9:g} GB/s of CPU work",
            read_bandwidth=left(self.read_bandwidth),
            kv_read_bandwidth=left(self.kv_read_bandwidth),
        )

    @property
    def unified(self) -> bool:
        """Whether the operating system shares the memory."""
        return self.memory_kind == "unified"

    @property
    def visible_bytes(self) -> int:
        """Memory that CUDA and the engine see."""
        return int(self.visible.value)

    @property
    def read_bandwidth_bytes_per_s(self) -> float:
        """What a kernel that streams weights reaches."""
        return self.read_bandwidth.value

    @property
    def kv_read_bandwidth_bytes_per_s(self) -> float:
        """What decode attention reaches on the KV cache."""
        return self.kv_read_bandwidth.value

    @property
    def step_overhead_s(self) -> float:
        """Host and launch time that every step adds, with CUDA graphs."""
        return self.step_overhead.value

    @property
    def sequence_overhead_s(self) -> float:
        """Time that every sequence adds to a step."""
        return self.sequence_overhead.value

    @property
    def default_max_num_batched_tokens(self) -> int:
        """Token budget per step that vLLM gives a server on this device.

        Source: vLLM 0.33, EngineArgs: 8,192 from 70 GiB on, but for the A100 and GB10; 2,048 elsewhere.
        """
        return 8192 if self._large else 2048

    @property
    def default_max_num_seqs(self) -> int:
        """Limit of running requests that vLLM gives a server on this device. Source: as above, 1,024 or 256."""
        return 1024 if self._large else 256

    @property
    def _large(self) -> bool:
        return self.visible_bytes >= _LARGE_MEMORY_BYTES and not self.small_compute_device

    def effective_flops(self, weight_format: WeightFormat | None) -> float:
        """Return the operations per second reached with weights in `weight_format`; None is attention, in 16 bits.

        A type that the device does not multiply in falls back on the next wider one; fp32 counts as bf16, too fast.
        """
        return self.reached_flops[self._multiplies_in(weight_format)].value

    def peak_flops(self, weight_format: WeightFormat | None) -> float:
        """Return the datasheet's rate for the type that `effective_flops` is about; what is reached if the datasheet has none."""
        dtype = self._multiplies_in(weight_format)
        return self.spec_flops.get(dtype, self.reached_flops[dtype]).value

    def _multiplies_in(self, weight_format: WeightFormat | None) -> str:
        dtype: str = "bf16" if weight_format is None else weight_format.compute_dtype
        while dtype not in self.reached_flops:
            dtype = _NEXT_WIDER[dtype]
        return dtype

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """Yield every number with its label and unit, for a table of assumptions; rates by rows are a table of their own."""
        for spec in fields(self):
            value = getattr(self, spec.name)
            label, unit = spec.name.replace("_", " "), spec.metadata.get("unit")
            if isinstance(value, Figure):
                yield f"{label} ({unit})", value
            elif isinstance(value, Mapping):
                for dtype, figure in value.items():
                    if isinstance(figure, Figure):
                        yield f"{label}, {dtype} ({unit})", figure
