"""The section `train` of a run file."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from ftk.configs.section import Device, RegularExpression, Section, require_default, require_text


class SigmaConfig(Section):
    """How noise levels are drawn; 1 is pure noise."""

    sampling: Literal["uniform", "logit_normal", "sigmoid", "mode", "beta"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = Field(default=1.0, gt=0)
    sigmoid_scale: float = Field(default=1.0, gt=0, description="sigma = sigmoid(scale n), n standard normal: kohya's name")
    mode_scale: float = Field(default=1.29, ge=-1.0, le=1.75)
    beta_alpha: float = Field(default=1.0, gt=0, description="of sigma's beta distribution; above 1 thins out clean images")
    beta_beta: float = Field(default=1.0, gt=0, description="above 1 thins out noise")
    shift: float | Literal["resolution"] | None = Field(
        default=None,
        description="s maps sigma to s sigma / (1 + (s - 1) sigma); resolution: it grows with an image's tokens",
    )
    minimum: float = Field(default=0.0, ge=0, lt=1, description="sigmas are squeezed into [minimum, maximum]")
    maximum: float = Field(default=1.0, gt=0, le=1)
    stratified: bool = Field(default=False, description="one draw from each of as many equal shares as a step has samples")
    continuous: bool = Field(default=False, description="any sigma, not those of the family's training table alone")
    weighting: Literal["none", "sigma_sqrt", "cosmap", "min_snr", "soft_min_snr", "debiased", "like_epsilon"] = "none"
    min_snr_gamma: float = Field(
        default=5.0, gt=0, description="signal-to-noise ratio above which min_snr and soft_min_snr weigh less"
    )

    @field_validator("shift")
    @classmethod
    def _shift_is_positive(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, float) and value <= 0:
            raise ValueError("a shift is a number above 0, or `resolution`")
        return value

    @model_validator(mode="after")
    def _settings_take_effect(self) -> Self:
        owners = {"logit_mean": "logit_normal", "logit_std": "logit_normal", "sigmoid_scale": "sigmoid",
                  "mode_scale": "mode", "beta_alpha": "beta", "beta_beta": "beta"}  # fmt: skip
        for name, owner in owners.items():
            if self.sampling != owner:
                require_default(self, name, f"sampling: {owner}")
        if self.weighting not in ("min_snr", "soft_min_snr"):
            require_default(self, "min_snr_gamma", "weighting: min_snr")
        if self.minimum >= self.maximum:
            raise ValueError(f"`minimum` {self.minimum} is not below `maximum` {self.maximum}")
        return self


class PreservationConfig(Section):
    """Texts for which the adapted model is to predict what the base model predicts, on the images that are trained on."""

    prompt: str | None = Field(default=None, description="the text, for every sample: the class, or the empty text")
    replace: dict[str, str] = Field(
        default={}, description="words of the captions and what stands for them, {sks dog: dog}: each sample's own caption then"
    )
    weight: float = Field(default=1.0, gt=0, le=1000, description="of this loss beside that of the images")
    every: int = Field(default=1, ge=1, description="steps from one that preserves to the next")

    @field_validator("prompt")
    @classmethod
    def _prompt_is_text(cls, value: str | None) -> str | None:
        require_text(value or "")
        return value

    @field_validator("replace")
    @classmethod
    def _words_are_replaced(cls, value: dict[str, str]) -> dict[str, str]:
        for word, other in value.items():
            require_text(word + other)
            if not word.strip() or word == other:
                raise ValueError(f"{word!r} cannot be replaced by {other!r}: name a word of the captions, and its class")
        return value

    @model_validator(mode="after")
    def _has_one_kind_of_text(self) -> Self:
        if (self.prompt is None) == (not self.replace):
            raise ValueError("one of `prompt` (a text for all samples) and `replace` ({sks dog: dog}) is needed")
        return self

    @property
    def texts(self) -> dict[str, Any]:
        """What decides about the texts, and so about the cache."""
        return {"replace": dict(self.replace)} if self.replace else {"prompt": self.prompt}

    def text(self, caption: str) -> str | None:
        """The text that goes with a caption; None where none of the words is in it: there is nothing to tell apart."""
        if not self.replace:
            return self.prompt
        # Longer words first: one may begin with another. Whole words alone.
        words = "|".join(map(re.escape, sorted(self.replace, key=len, reverse=True)))
        text, count = re.subn(rf"(?<!\w)(?:{words})(?!\w)", lambda match: self.replace[match[0]], caption)
        return text if count else None


class LossConfig(Section):
    """How a prediction is compared with its target."""

    kind: Literal["mse", "l1", "huber", "smooth_l1"] = Field(
        default="mse",
        description="squared or absolute errors; huber: squared up to huber_delta; smooth_l1: huber / huber_delta",
    )
    huber_delta: float = Field(default=0.1, gt=0, description="errors above it count linearly; a latent's deviation is about 1")
    huber_schedule: Literal["constant", "exponential", "snr"] = Field(
        default="constant", description="huber_delta over the noise levels: it is that of pure noise, and 1 without noise"
    )
    prior_weight: float = Field(default=1.0, ge=0, description="weight of samples with `role: class` (prior preservation)")
    unmasked_weight: float = Field(
        default=0.0, ge=0, le=1, description="weight of what a sample's mask leaves out; 1 ignores masks"
    )
    preservation: PreservationConfig | None = Field(
        default=None,
        description="keep what the base model predicts for other texts: {prompt: a dog} or {replace: {sks dog: dog}}",
    )

    @model_serializer(mode="wrap")
    def _without_what_is_not_preserved(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Checkpoints of runs without the setting keep their bytes.
        tree: dict[str, Any] = handler(self)
        return {name: value for name, value in tree.items() if name != "preservation" or value is not None}

    @model_validator(mode="after")
    def _settings_take_effect(self) -> Self:
        if self.kind not in ("huber", "smooth_l1"):
            require_default(self, "huber_delta", "kind: huber")
            require_default(self, "huber_schedule", "kind: huber")
        return self


class NoiseConfig(Section):
    """What noise is added to images, beside plain Gaussian noise."""

    offset: float = Field(default=0.0, ge=0, le=1, description="deviation of a random constant added to each channel")
    pyramid_levels: int = Field(default=0, ge=0, le=16, description="coarser layers of noise that are added; 0 adds none")
    pyramid_discount: float = Field(default=0.4, gt=0, le=1, description="weight of each layer over that of the finer one")
    perturbation: float = Field(
        default=0.0, ge=0, le=1, description="deviation of noise that the model sees and is not told to predict"
    )

    @model_validator(mode="after")
    def _settings_take_effect(self) -> Self:
        if not self.pyramid_levels:
            require_default(self, "pyramid_discount", "pyramid_levels")
        elif self.offset:
            raise ValueError("`offset` and `pyramid_levels` both add coarse noise: leave one of them out")
        return self


class ParameterGroupConfig(Section):
    """Trained parameters that are treated otherwise than the rest."""

    match: RegularExpression = Field(description="a regular expression, searched in parameter names; the first match counts")
    learning_rate: float | None = Field(default=None, ge=0)
    weight_decay: float | None = Field(default=None, ge=0)


class OptimizerConfig(BaseModel):
    """The optimizer: its name, and arguments of its own, which `ftk.train.optim` checks against its signature."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field(default="adamw", min_length=1, description="a name that ftk knows, or a dotted class")
    groups: tuple[ParameterGroupConfig, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _a_name_will_do(cls, tree: Any) -> Any:
        return {"name": tree} if isinstance(tree, str) else tree

    @property
    def settings(self) -> dict[str, Any]:
        """The optimizer's own arguments."""
        return dict(self.model_extra or {})


_HAS_NO_END = ("constant", "piecewise_constant")


class ScheduleConfig(Section):
    """The learning rate over the steps; the curves of diffusers' `get_scheduler`."""

    name: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "piecewise_constant"] = "constant"
    steps: int | None = Field(default=None, ge=1, description="length of the curve; that of the run by default")
    warmup: Annotated[int, Field(strict=True, ge=0)] | Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0, description="steps in which the rate rises from 0, or a share of the curve's length: 0.05"
    )
    minimum: float = Field(
        default=0.0, ge=0, lt=1, description="where the curve ends, as a share of the learning rate: 0.1 is a tenth of it"
    )
    cycles: int = Field(default=1, ge=1, description="of cosine_with_restarts")
    power: float = Field(default=1.0, gt=0, description="of polynomial")
    rules: str = Field(default="", description="of piecewise_constant: `1:100,0.1:200,0.01` is factor 1 up to step 100, ...")

    @model_validator(mode="before")
    @classmethod
    def _a_name_will_do(cls, tree: Any) -> Any:
        if isinstance(tree, str):
            return {"name": tree}
        if not isinstance(tree, dict) or "warmup_steps" not in tree:
            return tree
        # The name that `warmup` had when it was a number of steps alone.
        if "warmup" in tree:
            raise ValueError("`warmup_steps` is another name of `warmup`: leave it out")
        return {"warmup" if key == "warmup_steps" else key: value for key, value in tree.items()}

    @model_validator(mode="after")
    def _settings_take_effect(self) -> Self:
        for name, owner in (("cycles", "cosine_with_restarts"), ("power", "polynomial"), ("rules", "piecewise_constant")):
            if self.name != owner:
                require_default(self, name, f"name: {owner}")
        if self.name == "piecewise_constant":
            self._check_rules()
        if self.name in _HAS_NO_END:
            require_default(self, "minimum", f"a schedule that falls; {self.name} does not")
            if not self._warms_up_by_share:
                require_default(self, "steps", f"a schedule that has an end; {self.name} has none")
        if self.steps is not None and self.num_warmup(self.steps) >= self.steps:
            raise ValueError(f"`warmup` {self.warmup} takes all of the schedule's `steps`, {self.steps}")
        return self

    def _check_rules(self) -> None:
        if not re.fullmatch(r"(\d+(\.\d+)?:\d+,)*\d+(\.\d+)?", self.rules):
            raise ValueError("`rules` is FACTOR:STEP,FACTOR:STEP,...,FACTOR, for example 1:100,0.1")
        ends = [int(rule.split(":")[1]) for rule in self.rules.split(",")[:-1]]
        if ends != sorted(set(ends)):
            raise ValueError(f"the steps in `rules` must grow; they are {', '.join(map(str, ends))}")
        require_default(self, "warmup", "a schedule other than piecewise_constant, which says its own")

    @property
    def _warms_up_by_share(self) -> bool:
        return isinstance(self.warmup, float) and self.warmup > 0

    @property
    def depends_on_run(self) -> bool:
        """Whether another number of steps of the run makes another curve of it."""
        return self.steps is None and (self.name not in _HAS_NO_END or self._warms_up_by_share)

    def num_warmup(self, run_steps: int) -> int:
        """Steps of the warm-up."""
        return self.warmup if isinstance(self.warmup, int) else round(self.warmup * (self.steps or run_steps))


class ValidationConfig(Section):
    """Samples that are not trained on and measured instead, with noise that never changes."""

    share: float = Field(default=0.0, ge=0, le=0.5, description="of the samples that are held out; 0 turns validation off")
    every: int = Field(default=100, ge=1, description="steps between two measurements; the last step is always measured")
    samples: int = Field(default=64, ge=1, description="held-out samples that are measured at most")
    sigmas: int = Field(default=4, ge=1, le=64, description="noise levels of each, spread evenly over the drawn distribution")
    patience: int | None = Field(default=None, ge=1, description="measurements without a better one after which training ends")

    @model_validator(mode="after")
    def _settings_take_effect(self) -> Self:
        if not self.share:
            for name in ("every", "samples", "sigmas", "patience"):
                require_default(self, name, "share")
        return self


class MemoryConfig(Section):
    """What is done so that training fits the device. `auto` is decided by the plan that `--dry-run` and `ftk doctor` print."""

    device_gib: float | None = Field(default=None, gt=0, description="memory to plan for; what the device has free by default")
    checkpointing: Literal["auto", "all", "none"] | Annotated[int, Field(ge=0)] = Field(
        default="auto", description="blocks whose activations are computed again in the backward pass"
    )
    offload: Literal["auto", "none"] | Annotated[int, Field(ge=0)] = Field(
        default="auto", description="blocks whose frozen weights wait in host memory until they are needed"
    )
    base: Literal["auto", "full", "int8"] = Field(
        default="auto", description="frozen weights: as train.precision says, or 8-bit integers (needs torchao)"
    )
    attention: Literal["auto", "native", "flash", "cudnn", "efficient", "math"] = "auto"
    compile: bool = Field(default=False, description="compile the repeated block; buckets are warmed up before the first step")


class TrainConfig(Section):
    """The training loop."""

    start_from: str | None = Field(
        default=None, min_length=1, description="an adapter to go on from: a .safetensors file or a folder, of ftk or others"
    )
    steps: int = Field(default=1000, ge=1, description="updates in all")
    epochs: float | None = Field(
        default=None,
        gt=0,
        le=1_000_000,
        description="length of the run in place of `steps`, which are computed from it when training begins",
    )
    global_batch_size: int = Field(default=1, ge=1, description="samples per optimizer step, over all processes")
    micro_batch_size: int = Field(
        default=1, ge=1, description="samples per forward pass, of one bucket; a step is cut into such parts"
    )
    remainder: Literal["smaller", "drop", "fill"] = Field(
        default="smaller", description="what becomes of the incomplete step at the end of an epoch"
    )
    group_by: Literal["bucket", "text_length"] = Field(
        default="bucket", description="text_length: a micro-batch's captions have equal lengths too, so attention needs no mask"
    )
    class_ratio: float | None = Field(
        default=None, gt=0, description="uses of class images for each use of an instance image; by their repeats by default"
    )
    learning_rate: float = Field(default=1e-4, gt=0)
    schedule: ScheduleConfig = ScheduleConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="of a moving average of the weights, which is then delivered, drawn and validated",
    )
    sigma: SigmaConfig = SigmaConfig()
    loss: LossConfig = LossConfig()
    noise: NoiseConfig = NoiseConfig()
    posterior: Literal["sample", "mean", "frozen"] = Field(
        default="sample", description="draw latents afresh each epoch, use the mean, or one draw for good"
    )
    caption_dropout: float = Field(default=0.0, ge=0, le=1, description="share of samples that train without their caption")
    caption_dropout_text: str | None = Field(
        default=None, description="what these train on; the family's own text for no prompt by default"
    )
    controls: Literal["one", "all"] = Field(
        default="one", description="of a sample's control images: one, drawn anew for each use, or all together"
    )
    control_dropout: float = Field(
        default=0.0, ge=0, le=1, description="share of samples that train without their control images"
    )
    validation: ValidationConfig = ValidationConfig()
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        default="bf16",
        description="of the frozen weights and the computation; auto: bf16 where the device computes in it, fp16 on other GPUs",
    )
    memory: MemoryConfig = MemoryConfig()
    device: Device = "auto"
    sharding: Literal["auto", "none", "fsdp"] = Field(
        default="auto",
        description="fsdp: frozen weights, and what `full` trains, split over processes (FSDP2); auto: where they do not fit",
    )
    timeout_seconds: float = Field(default=600.0, gt=0, description="after which a process that waits for another gives up")
    seed: int = Field(default=0, ge=0)
    checkpoint_every: int = Field(default=250, ge=1)
    keep_last: int = Field(default=3, ge=1, description="checkpoints kept")
    keep_every: int | None = Field(default=None, ge=1, description="checkpoints at multiples of it are kept for good")
    max_bad_steps: int = Field(
        default=5, ge=1, description="steps in a row without a finite loss and gradient, after which training stops"
    )
    log_every: int = Field(default=10, ge=1, description="steps between log lines; the only times the device is waited for")
    trackers: tuple[str, ...] = Field(
        default=("tensorboard",), description="services that show the run, by the names that accelerate gives them"
    )
    project: str = Field(default="ftk", min_length=1, description="under which trackers list the run")

    @model_validator(mode="before")
    @classmethod
    def _null_is_no_length(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or tree.get("steps", 0) is not None:
            return tree
        return {name: value for name, value in tree.items() if name != "steps"}

    @model_validator(mode="after")
    def _has_one_length(self) -> Self:
        if self.epochs is not None and "steps" in self.model_fields_set:
            raise ValueError(
                "`steps` and `epochs` are two ways to give the length of a run: leave one of them out (on the command line "
                "`--set train.steps=null` takes out what the run file has)"
            )
        return self

    @model_serializer(mode="wrap")
    def _with_one_length(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Steps that are still to be computed are not written out: what is written can be read again."""
        tree: dict[str, Any] = handler(self)
        return tree if self.epochs is None else {name: value for name, value in tree.items() if name != "steps"}

    @field_validator("caption_dropout_text")
    @classmethod
    def _dropped_text_is_text(cls, value: str | None) -> str | None:
        require_text(value or "")
        return value

    @model_validator(mode="after")
    def _dropped_text_takes_effect(self) -> Self:
        if not self.caption_dropout:
            require_default(self, "caption_dropout_text", "caption_dropout")
        return self

    @model_validator(mode="after")
    def _micro_batch_is_part_of_a_step(self) -> Self:
        if self.micro_batch_size > self.global_batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} is larger than global_batch_size {self.global_batch_size}: a step "
                f"is cut into micro-batches. Raise global_batch_size, or lower micro_batch_size."
            )
        return self
