"""The config of a run: one pydantic model per section, YAML in, dotted overrides, and errors that name the nearest key."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from moe.errors import nearest
from moe.layer import MoESpec
from moe.parallel.exchange.config import ExchangeConfig
from moe.routers import ROUTERS
from moe.routers.balance import BalanceConfig
from moe.train.data import DataConfig


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelConfig(_Section):
    """The dense decoder around the experts."""

    decoder: dict[str, Any] = Field(
        default_factory=lambda: {"model_type": "llama"},
        description="a transformers decoder config: model_type and its fields; vocab_size defaults to the tokenizer's",
    )
    init_from: str | None = Field(
        default=None, description="folder of a saved model to continue from; decoder and moe are then read from it"
    )

    @field_validator("decoder")
    @classmethod
    def _known_fields(cls, decoder: dict[str, Any]) -> dict[str, Any]:
        from huggingface_hub.errors import StrictDataclassError
        from transformers import CONFIG_MAPPING

        model_type = str(decoder.get("model_type"))
        if model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"model.decoder.model_type={model_type!r} is unknown to transformers; use e.g. llama or qwen3"
            )
        known = {field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type])} | {"model_type"}
        for key in decoder:
            if key not in known:
                raise ValueError(f"model.decoder.{key} is not a field of {model_type}; {nearest(key, known)}")
        try:
            CONFIG_MAPPING[model_type](**{key: value for key, value in decoder.items() if key != "model_type"})
        except StrictDataclassError as problem:
            _, _, reason = str(problem).splitlines()[-1].partition(": ")  # after the exception's name
            raise ValueError(f"model.decoder: {reason}") from None
        return decoder


class OptimConfig(_Section):
    """The optimizer and its learning rate over time."""

    name: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="muon: Muon for the matrices of attention, FFNs and experts, AdamW for the rest; needs ZeRO 0",
    )
    lr: float = Field(default=1e-3, gt=0, description="peak learning rate")
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    muon_momentum: float = Field(default=0.95, ge=0, lt=1, description="of Muon, with Nesterov's correction")
    weight_decay: float = Field(default=0.1, ge=0, description="of matrices; norms and biases have none")
    clip: float = Field(default=1.0, ge=0, description="largest global gradient norm; 0 does not clip")
    freeze_routers: bool = Field(
        default=False,
        description="do not train routers; for carved models, whose gates are far smaller than a step of AdamW",
    )
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_steps: int = Field(default=20, ge=0, description="linear warm-up from 0")
    decay_fraction: float = Field(default=0.2, ge=0, le=1, description="wsd: last share of the steps that decays")
    final_lr_fraction: float = Field(default=0.0, ge=0, le=1, description="learning rate at the end over its peak")


class TrainConfig(_Section):
    """How long, in which batches, and what happens along the way."""

    steps: int = Field(default=200, ge=1, description="optimizer steps")
    batch_size: int = Field(default=32, ge=1, description="sequences per optimizer step, over all processes")
    micro_batch_size: int = Field(default=16, ge=1, description="sequences per process and forward pass")
    precision: Literal["fp32", "bf16"] = "fp32"
    expert_precision: Literal["same", "fp8"] = Field(
        default="same", description="of the experts' forward products; fp8 (e4m3) needs compute capability 8.9 to pay"
    )
    activation_checkpointing: bool = Field(
        default=False, description="keep layers' inputs only, run layers again in backward"
    )
    recompute_experts: bool = Field(default=False, description="make the experts' pre-activation again in backward")
    eval_every: int = Field(default=0, ge=0, description="steps between evaluations; 0: only at the end")
    eval_windows: int = Field(default=64, ge=1, description="held-out windows per evaluation")
    checkpoint_every: int = Field(default=0, ge=0, description="steps between checkpoints; 0: only at the end")
    keep_last: int = Field(default=2, ge=1, description="checkpoints that stay")
    async_checkpoints: bool = Field(
        default=True,
        description="write them while training goes on; holds 12 bytes of host memory per parameter over the processes",
    )
    max_nonfinite_steps: int = Field(default=5, ge=1, description="skipped steps in a row after which the run stops")
    log_every: int = Field(default=1, ge=1, description="steps between lines of metrics")
    sample_prompt: str = "def "
    sample_tokens: int = Field(default=64, ge=0, description="length of the sample at the end; 0: none")


class ParallelConfig(_Section):
    """Processes and how the model is spread over them."""

    processes: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto", description="processes that `moe train` starts on this machine; auto: one per GPU, else one"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: GPUs if there is one for each process of this machine, else CPU"
    )
    ep_size: int = Field(default=1, ge=1, description="processes that share one set of experts")
    sp_size: int = Field(default=1, ge=1, description="processes that share each sequence (DeepSpeed's Ulysses)")
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: Literal["none", "cpu", "nvme"] = Field(
        default="none", description="where optimizer states and fp32 weights live; cpu from ZeRO 1 on, nvme at ZeRO 3"
    )
    offload_parameters: Literal["none", "cpu", "nvme"] = Field(
        default="none", description="where parameters live that no layer needs at the moment; ZeRO 3"
    )
    nvme_path: str | None = Field(default=None, description="folder on a fast local disk, for nvme")
    timeout_seconds: float = Field(default=600, gt=0, description="after which a stuck collective fails")
    stall_seconds: float = Field(
        default=90, ge=0, description="within which a rank that keeps the others waiting is named; 0: never"
    )
    max_restarts: int = Field(
        default=0,
        ge=0,
        description="how often `moe train` starts again from the last checkpoint after losing a process",
    )
    exchange: ExchangeConfig = Field(default=ExchangeConfig(), description="how tokens travel between those processes")
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="merged into the generated DeepSpeed config")

    @model_validator(mode="after")
    def _combines(self) -> "ParallelConfig":
        """What DeepSpeed would refuse later, or take and do otherwise than asked."""
        stage = self.zero_stage
        for name, place, needed in (
            ("offload_optimizer", self.offload_optimizer, 3 if self.offload_optimizer == "nvme" else 1),
            ("offload_parameters", self.offload_parameters, 3),
        ):
            if place != "none" and stage < needed:
                raise ValueError(
                    f"parallel.{name}={place} needs parallel.zero_stage={needed}{' or more' if needed < 3 else ''}, and it "
                    f"is {stage}: DeepSpeed moves only what it has partitioned"
                )
        if "nvme" in (self.offload_optimizer, self.offload_parameters) and self.nvme_path is None:
            raise ValueError("parallel.nvme_path is not set, and nvme needs a folder on a fast local disk")
        return self

    @property
    def zero_optimization(self) -> dict[str, Any]:
        """DeepSpeed's section of that name."""
        section: dict[str, Any] = {"stage": self.zero_stage}
        for key, place in (("offload_optimizer", self.offload_optimizer), ("offload_param", self.offload_parameters)):
            if place != "none":
                section[key] = {"device": place, "pin_memory": self.device != "cpu"}
            if place == "nvme":
                section[key]["nvme_path"] = self.nvme_path
        return section


class LogConfig(_Section):
    """Where runs and their metrics go."""

    run_root: str = "runs"
    wandb: Literal["auto", "offline", "off"] = Field(
        default="auto", description="auto: online if you are logged in, else offline files in the run folder"
    )
    wandb_project: str = "moe"

    @field_validator("wandb", mode="before")
    @classmethod
    def _yaml_off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare `off` as false


class ParametrizationConfig(_Section):
    """How initial values and learning rates follow the width; `docs/mup.md`."""

    name: Literal["standard", "mup"] = "standard"
    base: dict[str, int] | None = Field(
        default=None,
        description="mup: hidden_size, intermediate_size, num_attention_heads, ... of the tuned narrow model",
    )

    @model_validator(mode="after")
    def _has_base(self) -> "ParametrizationConfig":
        if self.name == "mup" and not self.base:
            raise ValueError(
                "parametrization.name=mup needs parametrization.base: the widths of the model whose hyper-parameters these "
                "are, such as {hidden_size: 128, intermediate_size: 384, num_attention_heads: 4}"
            )
        if self.name == "standard" and self.base is not None:
            raise ValueError("parametrization.base is for parametrization.name=mup; set that name, or remove the base")
        return self


class RunConfig(_Section):
    """Everything about a run."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the run folder")
    seed: int = Field(default=0, ge=0, description="of the initial weights; data has its own")
    model: ModelConfig = ModelConfig()
    moe: dict[str, Any] | None = Field(default=None, description="an MoESpec; null trains the dense decoder")
    parametrization: ParametrizationConfig = ParametrizationConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    log: LogConfig = LogConfig()

    @field_validator("moe")
    @classmethod
    def _checked_moe(cls, moe: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if moe is None else MoESpec.from_dict(_typed_moe(moe)).to_dict()

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        ep_size, moe, processes = self.parallel.ep_size, self.moe, self.parallel.processes
        if ep_size > 1 and moe is not None and moe["num_experts"] % ep_size:
            raise ValueError(
                f"moe.num_experts={moe['num_experts']} is not divisible by parallel.ep_size={ep_size}; change one of them"
            )
        if ep_size > 1 and moe is None and self.model.init_from is None:
            raise ValueError(f"parallel.ep_size={ep_size} needs experts, and moe is null; set parallel.ep_size=1")
        sp_size, length = self.parallel.sp_size, self.data.seq_len
        for name, size in (("ep_size", ep_size), ("sp_size", sp_size)):
            if isinstance(processes, int) and processes % size:
                raise ValueError(f"parallel.{name}={size} does not divide parallel.processes={processes}")
        if length % sp_size:
            raise ValueError(
                f"data.seq_len={length} is not divisible by parallel.sp_size={sp_size}; change one of them"
            )
        if self.parallel.stall_seconds >= self.parallel.timeout_seconds:
            raise ValueError(
                f"parallel.stall_seconds={self.parallel.stall_seconds:g} must be below parallel.timeout_seconds="
                f"{self.parallel.timeout_seconds:g}: who waits must still be there to name who is late; 0 turns it off"
            )
        if self.optim.name == "muon" and self.parallel.zero_stage:
            raise ValueError(
                f"optim.name=muon needs parallel.zero_stage=0, and it is {self.parallel.zero_stage}: Muon steps whole matrices, "
                "and from ZeRO 1 on DeepSpeed gives an optimizer flat pieces of them; set parallel.zero_stage=0 (with any "
                "parallel.ep_size), or optim.name=adamw"
            )
        if self.optim.warmup_steps >= self.train.steps:
            raise ValueError(
                f"optim.warmup_steps={self.optim.warmup_steps} must be below train.steps={self.train.steps}"
            )
        return self

    def grad_accum(self, world_size: int) -> int:
        """Micro-batches per process and step."""
        sp_size = self.parallel.sp_size
        if world_size % sp_size:
            raise ValueError(f"parallel.sp_size={sp_size} does not divide the {world_size} processes")
        per_pass = self.train.micro_batch_size * (world_size // sp_size)
        if self.train.batch_size % per_pass:
            shared = f" that share sequences by {sp_size}" if sp_size > 1 else ""
            raise ValueError(
                f"train.batch_size={self.train.batch_size} is not divisible by train.micro_batch_size="
                f"{self.train.micro_batch_size} times {world_size} processes{shared}; make it a multiple of {per_pass}"
            )
        return self.train.batch_size // per_pass

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.log.run_root) / self.name


def load_config(path: Path | str, overrides: list[str] | None = None) -> RunConfig:
    """Read YAML and apply ``key.path=value`` overrides (values are YAML).

    Raises:
        ValueError: the file is missing or no mapping, an override is malformed, or a key or value is wrong; every problem
            is listed with its key, and an unknown key with the nearest known one.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"config file {str(path)!r} does not exist")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as problem:
        raise ValueError(f"config file {str(path)!r} is not YAML: {problem}") from problem
    if not isinstance(values, dict):
        raise ValueError(f"config file {str(path)!r} must hold a mapping of sections")
    for override in overrides or []:
        _apply(values, override)
    return parse_config(values)


def parse_config(values: dict[str, Any]) -> RunConfig:
    """A checked config from plain data; see `load_config`."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as problem:
        raise ValueError("\n".join(_explain(error) for error in problem.errors())) from None


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r} must read key.path=value, such as train.steps=100")
    *parents, last = key.split(".")
    node = values
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ValueError(f"override {override!r}: {parent!r} is a value, not a section")
        node = child
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as problem:
        raise ValueError(f"override {override!r}: {text!r} is not YAML: {problem}") from problem


def _typed_moe(moe: dict[str, Any]) -> dict[str, Any]:
    for key in ("router", "balance"):
        if not isinstance(moe.get(key, {}), dict):
            raise ValueError(f"moe.{key}={moe[key]!r} must be a mapping of options")
    owners: dict[str, type] = {"balance": BalanceConfig}
    if router := ROUTERS.get(str(moe.get("router", {}).get("name", "topk"))):  # else `MoESpec` says what there is
        owners["router"] = router.Config
    nested = {key: _typed(f"moe.{key}", owner, moe[key]) for key, owner in owners.items() if key in moe}
    plain = {key: value for key, value in moe.items() if key not in ("router", "balance")}
    return moe | _typed("moe", MoESpec, plain) | nested


def _typed(path: str, owner: type, values: dict[str, Any]) -> dict[str, Any]:
    """Values as a dataclass declares them, converted as in the sections: to YAML, 1e-3 is a text. Unknown keys stay."""
    types, typed = get_type_hints(owner), dict(values)
    for key in values.keys() & types.keys():
        try:
            typed[key] = TypeAdapter(types[key]).validate_python(values[key])
        except ValidationError as problem:
            raise ValueError(f"config key {path}.{key}={values[key]!r}: {problem.errors()[0]['msg']}") from None
    return typed


def _fields(section: Any) -> dict[str, Any]:
    """Annotations of a section's fields by name; none for what is no section."""
    if isinstance(section, type) and issubclass(section, BaseModel):
        return {name: field.annotation for name, field in section.model_fields.items()}
    return get_type_hints(section) if dataclasses.is_dataclass(section) else {}


def _explain(error: Any) -> str:
    location: list[str] = []
    section: Any = RunConfig
    owners = []
    for part in error["loc"]:
        fields = _fields(section)
        if fields or isinstance(part, int):  # what else follows a field names a branch of its union
            location.append(str(part))
            owners.append(fields)
        section = fields.get(part)
    key = ".".join(location)
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):  # of a model, of a dataclass
        return f"config key {key} is unknown; {nearest(location[-1], owners[-1])}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message
    return f"config key {key}={error['input']!r}: {message}"
