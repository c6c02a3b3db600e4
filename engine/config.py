"""The schema of the engine's tables in a recipe: frozen models, a field a line, with unit and effect.

Rules that connect several fields are validators here; they raise ValueError, which ``recipe_file`` turns into a
UserError that names the place in the recipe. ``engine.recipe_file`` reads TOML files and overrides.
"""

from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from isomorph.engine.effect import KeyPath


class UserError(ValueError):
    """The user's input is wrong: says what must hold, what was found and where, and what to do. Exit code 2."""


class Section(BaseModel):
    """Base of all tables of a recipe: frozen; unknown keys, numbers in quotes and the like are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    renamed: ClassVar[dict[str, str]] = {}  # key, or key = "value", of earlier versions -> what to write now

    def idle(self) -> dict[KeyPath, str]:
        """Returns the keys, as paths from this table, that have no effect with the values of the other keys, and why.

        ``load_recipe`` refuses a recipe that sets one of them.
        """
        return {}

    @model_validator(mode="before")
    @classmethod
    def _of_its_kind(cls, table: Any) -> Any:
        """Refuses old keys, and values of another TOML type, which pydantic would convert."""
        for key, value in table.items() if isinstance(table, dict) else ():
            for old in (key, f'{key} = "{value}"'):
                if old in cls.renamed:
                    raise ValueError(f"{old} has a new name: write {cls.renamed[old]}")
            field = cls.model_fields.get(key)
            if field is None or any(isinstance(rule, BeforeValidator) for rule in field.metadata):
                continue
            if isinstance(value, int) and not -(2**63) <= value < 2**63:  # as TOML has it; a float has no room for all
                raise ValueError(f"{key} must be a number of 64 bits, got one of {value.bit_length()}")
            kinds = _scalars_in(field.annotation)
            if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
                raise ValueError(f"{key} must be a number, got {value!r}")
            if isinstance(value, str) and kinds and kinds <= {int, float}:
                raise ValueError(f"{key} must be a number, without quotes, got {value!r}")
            if kinds == {bool} and not isinstance(value, bool):
                raise ValueError(f"{key} must be true or false, got {value!r}")
        return table


def _scalars_in(annotation: Any) -> set[type]:
    """Returns the scalar types that ``annotation`` allows, without None; empty if it is a table or a list."""
    if get_origin(annotation) is Literal:
        return {type(choice) for choice in get_args(annotation)}
    if get_origin(annotation) in (Union, UnionType):
        return {kind for part in get_args(annotation) for kind in _scalars_in(part)}
    return {annotation} if annotation in (int, float, bool, str) else set()


MAX_NAME_BYTES = 120  # file systems allow 255, and names of files have more in them


def _short_name(name: str) -> str:
    if len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"must have at most {MAX_NAME_BYTES} bytes, because it is part of file names")
    return name


FileName = Annotated[str, AfterValidator(_short_name)]


MAX_TINY = 2_000_000_000


class TinyModel(Section):
    """A Llama decoder with random weights and a tokenizer of its own, built at the start of the run: no download."""

    renamed = {"max_tok": "max_model_len"}

    hidden_size: int = Field(128, ge=8)
    num_layers: int = Field(4, ge=1, le=1000)
    num_heads: int = Field(4, ge=1)
    num_kv_heads: int = Field(2, ge=1)
    intermediate_size: int = Field(384, ge=8)
    max_model_len: int = Field(512, ge=16)  # longest sequence, prompt and response
    # words: one token for each word of the training data; bytes: one for each byte of UTF-8, which reads any text
    tokenizer: Literal["words", "bytes"] = "words"
    max_words: int = Field(8192, ge=16)  # words: the most frequent ones of files; others are read as [UNK]

    def idle(self) -> dict[KeyPath, str]:
        return {("max_words",): 'model.tiny.tokenizer is "bytes"'} if self.tokenizer == "bytes" else {}

    @model_validator(mode="after")
    def _is_tiny(self) -> "TinyModel":
        size = self.num_layers * self.hidden_size * (4 * self.hidden_size + 3 * self.intermediate_size)
        if size > MAX_TINY:
            raise ValueError(
                f"the layers of model.tiny must have fewer than 2 billion weights, got {size:,}: lower hidden_size, "
                "intermediate_size or num_layers"
            )
        return self

    @model_validator(mode="after")
    def _heads_divide(self) -> "TinyModel":
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must divide hidden_size and be a multiple of num_kv_heads, "
                f"got hidden_size={self.hidden_size} num_heads={self.num_heads} num_kv_heads={self.num_kv_heads}"
            )
        if (self.hidden_size // self.num_heads) % 2:
            raise ValueError(
                f"hidden_size / num_heads must be even (rotary pairs), got {self.hidden_size // self.num_heads}"
            )
        return self


class ModelConfig(Section):
    """Exactly one of ``path`` and ``tiny``."""

    renamed = {
        "recompute_every": "gradient_checkpointing_every",
        "optimizer": 'offload_optimizer = true (was optimizer = "host") or nothing ("device")',
    }

    path: str | None = None  # a folder, a .gguf file, or a hub name
    tiny: TinyModel | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights; the optimizer's masters are always float32
    # n: activations of every n-th layer are recomputed in backward; 1: of all layers; None: of none
    gradient_checkpointing_every: int | None = Field(None, ge=1)
    offload_optimizer: bool = False  # float32 masters, moments and gradients in host memory, AdamW on the CPU
    compile: bool = False  # torch.compile on the learner's layers; compiling takes about a minute
    chat_template: bool = True  # format the prompt as a user message, if the tokenizer has a chat template
    stop: tuple[str, ...] = ()  # further tokens that end a response; each must be one token of the tokenizer

    def idle(self) -> dict[KeyPath, str]:
        return {} if self.tiny is None else {("chat_template",): "the tokenizer of [model.tiny] has no chat template"}

    @model_validator(mode="after")
    def _one_source(self) -> "ModelConfig":
        if (self.path is None) == (self.tiny is None):
            raise ValueError("exactly one of model.path and model.tiny must be given")
        return self


class LoraConfig(Section):
    """LoRA: trains low-rank adapters on the decoder's linear layers and leaves the weights as loaded. Needs peft.

    Adapters usually need a learning rate about ten times that of full fine-tuning.
    """

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0, allow_inf_nan=False)  # the adapter's output is multiplied by alpha / rank
    targets: tuple[str, ...] | None = Field(None, min_length=1)  # layers by name, such as "q_proj"; None: all


class SamplerConfig(Section):
    """What generates rollouts: the built-in decoder or vLLM, and the memory it may use."""

    kind: Literal["builtin", "vllm"] = "builtin"
    publish: Literal["shared", "copy"] = "copy"  # vllm: one storage for trainer and sampler, or a copy after each step
    memory_frac: float = Field(0.3, gt=0, lt=1)  # vllm: share of the device's memory (CPU: of RAM) for weights and KV
    max_model_len: int = Field(2048, ge=16)  # vllm: longest prompt plus response, tokens
    max_seqs: int = Field(256, ge=1)  # sequences decoded at the same time
    kv_tok: int | None = Field(None, ge=1)  # builtin: capacity of the KV cache, tokens; None: what max_seqs needs
    keep_cache: bool = False  # builtin: KV cache and CUDA graphs stay in memory while the learner runs
    # builtin, CPU: while a step is learned the next one is drawn, from a copy of the weights that is one version older
    overlap: bool = False

    @model_validator(mode="before")
    @classmethod
    def _has_no_tensor_parallelism(cls, given: Any) -> Any:
        for key in ("tensor_parallel", "tensor_parallel_size"):
            if isinstance(given, dict) and key in given:
                raise ValueError(
                    f"{key} is not supported, because each rank has a vLLM engine of its own with whole weights: "
                    "remove it, and start a rank for each device with torchrun; what one device cannot hold beside "
                    'them needs parallel.kind = "fsdp", model.offload_optimizer or [lora]'
                )
        return given

    def idle(self) -> dict[KeyPath, str]:
        builtin = ("kv_tok", "keep_cache", "overlap")
        keys = ("publish", "memory_frac", "max_model_len") if self.kind == "builtin" else builtin
        return {(key,): f'sampler.kind is "{self.kind}"' for key in keys}


class Truncation(NamedTuple):
    """Which tokens are drawn from: top-k, of these top-p, of these min-p (kernels/kept_tokens.py)."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def is_on(self) -> bool:
        return self != Truncation()


# vLLM 0.32 has return_sampling_mask, but an engine that has it refuses requests without top_k and greedy ones, which
# evaluations are made of, and needs another model runner than the one that weights are shared with here
NO_KEPT_TOKENS = (
    'sampling.top_k, top_p and min_p are not supported with sampler.kind = "vllm", which does not say which tokens it '
    "kept, so that the loss could not have the log-probabilities that were sampled from: remove them, or set "
    'sampler.kind = "builtin"'
)


class SamplingConfig(Section):
    """How responses are sampled. With top_k, top_p or min_p the loss, too, is over the tokens that they keep."""

    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    top_k: int = Field(0, ge=0)  # draws from the k likeliest tokens; 0: from all
    # of these, from the fewest whose probabilities add up to it; 1: from all
    top_p: float = Field(1.0, gt=0, le=1)
    # of these, from those with at least this share of the likeliest one's probability; 0: from all
    min_p: float = Field(0.0, ge=0, le=1)
    max_new_tok: int = Field(72, ge=1)  # longest response, tokens
    samples_per_prompt: int = Field(8, ge=1)
    # strings that end a response, which then ends with the token that completes one; the rest of that token is kept.
    # model.stop has single tokens
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()

    @property
    def truncation(self) -> Truncation:
        return Truncation(self.top_k, self.top_p, self.min_p)

    @model_validator(mode="after")
    def _leaves_a_choice(self) -> "SamplingConfig":
        if self.top_k == 1 or self.min_p == 1:
            name = "top_k" if self.top_k == 1 else "min_p"
            raise ValueError(
                f"{name} = 1 leaves a single token to draw, whose log-probability is 0 and has no gradient: "
                "raise top_k, lower min_p"
            )
        return self


class BatchConfig(Section):
    """How much a step samples, and how it is divided into optimizer steps and micro-batches."""

    renamed = {"max_tok": "micro_batch_tok", "epochs": "num_iterations"}

    prompts: int = Field(16, ge=1)  # per step
    micro_batch_tok: int = Field(8192, ge=1)  # packed tokens of a micro-batch; the prompt of a group counts once
    prompts_per_update: int | None = Field(None, ge=1)  # mini-batch size; None: one optimizer step on all prompts
    num_iterations: int = Field(1, ge=1)  # passes over the rollouts of a step
    refills: int = Field(0, ge=0)  # dynamic sampling: rounds in which groups with equal rewards are sampled anew


# TOML has no null, so that a recipe removes a clip by the word "off"
Clip = Annotated[float | None, BeforeValidator(lambda value: None if value == "off" else value)]


class OptimConfig(Section):
    """AdamW with float32 master weights, its learning-rate schedule and gradient clipping.

    Weight decay leaves out tensors of one dimension (norms and biases), as is usual, unless ``decay_norms_and_biases``.
    """

    lr: float = Field(1e-6, gt=0, allow_inf_nan=False)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final_lr_frac: float = Field(0.1, ge=0, le=1)  # linear, cosine: final learning rate / lr
    warmup_steps: int = Field(0, ge=0)
    warmup_share: float = Field(0.0, ge=0, le=1)  # warm-up as a share of the stage's steps, rounded up
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    decay_norms_and_biases: bool = False  # weight_decay also acts on tensors of one dimension
    clip_norm: Clip = Field(1.0, gt=0)  # largest norm of the whole gradient; "off": not clipped

    def idle(self) -> dict[KeyPath, str]:
        keys: dict[KeyPath, str] = {}
        if self.schedule == "constant":
            keys[("final_lr_frac",)] = 'optim.schedule is "constant"'
        if self.weight_decay == 0:
            keys[("decay_norms_and_biases",)] = "optim.weight_decay is 0"
        return keys

    @model_validator(mode="after")
    def _one_warm_up(self) -> "OptimConfig":
        if self.warmup_steps and self.warmup_share:
            raise ValueError(
                f"warmup_steps and warmup_share set the same thing, got {self.warmup_steps} and {self.warmup_share}: "
                "remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _betas_decay(self) -> "OptimConfig":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in 0 <= beta < 1, got {self.betas}")
        return self


ObjectiveName = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp", "sft", "rft"]

DEFAULT_OBJECTIVE: ObjectiveName = "dapo"

# Settings of each objective; a recipe may override any of them. Sources: GRPO arXiv 2402.03300, Dr. GRPO 2503.20783,
# DAPO 2503.14476 (its dynamic sampling is ``batch.refills``, off by default), GSPO 2507.18071, CISPO 2506.13585,
# RLOO 2402.14740, REINFORCE++ 2501.03262, STaR 2203.14465. No preset has a KL term or an entropy bonus.
# CISPO's paper has no lower bound and gives no number for the upper one; 1 + 4 is ScaleRL's (2510.13786).
PRESETS: dict[str, dict[str, Any]] = {
    "grpo": dict(baseline="mean", scale="std", aggregation="sequence", clip_low=0.2, clip_high=0.2),
    "dr_grpo": dict(baseline="mean", scale="none", aggregation="constant", clip_low=0.2, clip_high=0.2),
    "dapo": dict(baseline="mean", scale="std", aggregation="token", clip_low=0.2, clip_high=0.28),
    "gspo": dict(baseline="mean", scale="std", aggregation="sequence", clip_low=3e-4, clip_high=4e-4, ratio="sequence"),
    "cispo": dict(baseline="mean", scale="std", aggregation="token", clip_low=1.0, clip_high=4.0),
    "rloo": dict(
        baseline="leave_one_out", scale="none", aggregation="sequence", clip_low=0.2, clip_high=0.2, ratio="product"
    ),
    "reinforce_pp": dict(baseline="none", scale="batch", aggregation="token", clip_low=0.2, clip_high=0.2),
    "sft": dict(baseline="none", scale="none", aggregation="token", clip_low=None, clip_high=None),
    "rft": dict(baseline="none", scale="none", aggregation="token", clip_low=None, clip_high=None),
}


class ObjectiveConfig(Section):
    """The loss: a name, which sets all other keys to its preset (``PRESETS``), and the keys that override it."""

    renamed = {
        "tis": "importance_sampling",
        "tis_mode": "importance_sampling_mode",
        "tis_cap": "importance_sampling_cap",
        "kl": 'kl_estimator = "k1", "k2" or "k3" for a KL term of the loss, reward_kl_coef for a penalty on rewards',
    }

    name: ObjectiveName = DEFAULT_OBJECTIVE
    baseline: Literal["mean", "leave_one_out", "none"] = "mean"  # of a group's rewards, subtracted from each of them
    scale: Literal["std", "none", "batch"] = "std"  # std: divide by the group's; batch: whiten over a step's tokens
    aggregation: Literal["token", "sequence", "constant"] = "token"  # see token_weight in engine/update/objective.py
    ratio: Literal["token", "sequence", "product"] = "token"  # sequence: geometric mean of the tokens' ratios
    clip_low: Clip = Field(0.2, gt=0, le=1)  # ratio >= 1 - clip_low; "off" (with clip_high): not clipped
    clip_high: Clip = Field(0.2, gt=0)  # ratio <= 1 + clip_high
    # dual clip (arXiv 1912.09729): with a negative advantage the ratio counts as at most this; "off": no such limit
    clip_dual: Clip = Field(None, gt=1)
    # log-probabilities in the ratio's denominator: the trainer's before the step's first update, or those that the
    # sampler reported, which saves the forward of further updates and needs no importance_sampling
    old_logprob: Literal["trainer", "sampler"] = "trainer"
    # times an estimate of KL(policy || reference), added to the loss
    kl_coef: float = Field(0.0, ge=0, allow_inf_nan=False)
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # of the KL term of kl_coef
    # times k1 = old_logprob - ref_logprob, subtracted from the reward
    reward_kl_coef: float = Field(0.0, ge=0, allow_inf_nan=False)
    entropy_coef: float = Field(0.0, ge=0, allow_inf_nan=False)  # times the entropy, subtracted from the loss
    # loss times the weight trainer / sampler; in a recipe with vLLM "token" is the default (see EngineConfig)
    importance_sampling: Literal["off", "token", "sequence"] = "off"
    # a weight beyond a bound is set to the bound, or the token (sequence) gets weight 0
    importance_sampling_mode: Literal["truncate", "mask"] = "truncate"
    importance_sampling_cap: float = Field(2.0, gt=0)  # upper bound
    importance_sampling_floor: float = Field(0.0, ge=0)  # lower bound; 0: none

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        name = data.get("name", DEFAULT_OBJECTIVE)
        return {**(PRESETS.get(name, {}) if isinstance(name, str) else {}), **data}

    @model_validator(mode="after")
    def _consistent(self) -> "ObjectiveConfig":
        if (self.clip_low is None) != (self.clip_high is None):
            raise ValueError('clip_low and clip_high must both be numbers or both be "off"')
        if self.name in ("sft", "rft"):
            idle = dict(kl_coef=0.0, reward_kl_coef=0.0, entropy_coef=0.0, importance_sampling="off", ratio="token")
            idle |= dict(clip_dual=None, old_logprob="trainer")
            for key, value in idle.items():
                if getattr(self, key) != value:
                    raise ValueError(f'{key} is not supported with objective.name = "{self.name}": remove it')
        if self.old_logprob == "sampler" and self.importance_sampling != "off":
            raise ValueError(
                'importance_sampling must be "off" with old_logprob = "sampler", whose ratio contains that weight '
                f'already, got "{self.importance_sampling}"'
            )
        if self.importance_sampling_floor > self.importance_sampling_cap:
            raise ValueError(
                f"importance_sampling_floor must not exceed importance_sampling_cap, got "
                f"{self.importance_sampling_floor} and {self.importance_sampling_cap}"
            )
        if self.clip_dual is not None and self.clip_high is not None and self.clip_dual < 1 + self.clip_high:
            raise ValueError(
                f"clip_dual must be at least 1 + clip_high, got {self.clip_dual} and clip_high = {self.clip_high}"
            )
        if self.reward_kl_coef and self.baseline == "none" and self.scale == "std":
            raise ValueError(
                'reward_kl_coef with baseline = "none" is not supported with scale = "std", because each token has its '
                'own return: set scale to "batch" or "none"'
            )
        return self

    def idle(self) -> dict[KeyPath, str]:
        keys: dict[str, str] = {}
        if self.name in ("sft", "rft"):
            acting = {"name", "aggregation"} if self.name == "sft" else {"name", "aggregation", "baseline", "scale"}
            keys = {key: f'objective.name is "{self.name}"' for key in type(self).model_fields if key not in acting}
        if self.kl_coef == 0:
            keys.setdefault("kl_estimator", "objective.kl_coef is 0")
        if self.name == "cispo":
            keys["clip_dual"] = "cispo bounds the weight of a token, whatever its advantage"
        if self.importance_sampling == "off":
            keys |= {
                key: keys.get(key, 'objective.importance_sampling is "off"')
                for key in ("importance_sampling_mode", "importance_sampling_cap", "importance_sampling_floor")
            }
        return {(key,): why for key, why in keys.items()}

    @property
    def is_supervised(self) -> bool:
        """Whether it trains on demonstrations instead of sampled responses."""
        return self.name == "sft"

    @property
    def is_per_token(self) -> bool:
        """Whether a token's loss depends on that token only, so that gradients can be computed chunk by chunk."""
        return self.ratio == "token" and self.importance_sampling != "sequence"

    @property
    def needs_reference(self) -> bool:
        """Whether log-probabilities of the reference policy are needed, for the loss or the reward."""
        return self.kl_coef > 0 or self.reward_kl_coef > 0

    @property
    def drops_zero_advantages(self) -> bool:
        """Whether responses with advantage 0 are skipped, because their gradient is zero."""
        return self.name != "sft" and not self.needs_reference and self.entropy_coef == 0


class Stage(Section):
    """A stage, as the engine sees it: sampling, objective, optimizer, and what is kept from the stage before."""

    renamed = {
        "optimizer": "optimizer_state",
        'reference = "anchor"': 'reference = "snapshot"',
        'reference = "keep"': 'reference = "previous"',
    }

    name: FileName = Field(pattern=r"^\w[\w .-]*$")  # also part of file names
    steps: int = Field(ge=1)  # at most; length of the learning-rate schedule
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    batch: BatchConfig = BatchConfig()
    sampling: SamplingConfig = SamplingConfig()
    optimizer_state: Literal["carry", "reset"] = "reset"  # carry: keeps the AdamW moments of the stage before
    # KL reference. snapshot: the policy at the start of this stage; previous: the reference of the stage before
    reference: Literal["previous", "snapshot"] = "snapshot"

    @property
    def loss_temperature(self) -> float:
        """Temperature of the loss: 1 for sft and rft, which are cross-entropies; else the sampling temperature."""
        return 1.0 if self.objective.name in ("sft", "rft") else self.sampling.temperature

    @property
    def loss_is_truncated(self) -> bool:
        """Whether the loss is over the kept tokens alone: not with sft and rft, which are cross-entropies."""
        return self.sampling.truncation.is_on and self.objective.name not in ("sft", "rft")

    @property
    def loss_is_as_sampled(self) -> bool:
        """Whether the log-probabilities in the loss are of the distribution that was sampled from."""
        same_tokens = self.loss_is_truncated == self.sampling.truncation.is_on
        return same_tokens and self.loss_temperature == self.sampling.temperature

    def idle(self) -> dict[KeyPath, str]:
        if self.objective.is_supervised:
            keys = ("temperature", "top_k", "top_p", "min_p", "stop")
            return {("sampling", key): "demonstrations are not sampled" for key in keys}
        is_one_update = self.batch.num_iterations == 1 and self.batch.prompts_per_update in (None, self.batch.prompts)
        if is_one_update and self.objective.old_logprob == "trainer":
            why = "a step makes one update (batch.prompts_per_update, batch.num_iterations), where every ratio is 1"
            return {("objective", key): why for key in ("clip_low", "clip_high", "clip_dual")}
        return {}

    @model_validator(mode="after")
    def _groups_are_large_enough(self) -> "Stage":
        relative = not self.objective.is_supervised and (
            self.objective.baseline != "none" or self.objective.scale == "std"
        )
        if relative and self.sampling.samples_per_prompt < 2:
            raise ValueError(
                f"samples_per_prompt must be >= 2 with {self.objective.name}, whose advantages compare the responses "
                f"of a group, got {self.sampling.samples_per_prompt}"
            )
        if self.objective.is_supervised and self.sampling.samples_per_prompt != 1:
            raise ValueError(
                f"samples_per_prompt must be 1 with {self.objective.name}, which trains on one demonstration for each "
                f"prompt, got {self.sampling.samples_per_prompt}"
            )
        if self.batch.refills and self.objective.baseline == "none":
            raise ValueError(
                'batch.refills is not supported with objective.baseline = "none", because groups with equal rewards '
                f"have advantages, too: refills must be 0, got {self.batch.refills}"
            )
        if self.batch.prompts_per_update and self.batch.prompts % self.batch.prompts_per_update:
            raise ValueError(
                f"prompts_per_update must divide prompts, got {self.batch.prompts_per_update} and {self.batch.prompts}"
            )
        return self


class ParallelConfig(Section):
    """Parallelism over the ranks that torchrun starts; without effect on one rank."""

    kind: Literal["data", "fsdp"] = "data"  # data: whole model on every rank; fsdp: masters, moments, gradients sharded
    # fsdp: consecutive ranks that hold one copy together, such as a node's; so there are ranks / shards copies (hybrid
    # sharding). None: all ranks hold one
    shards: int | None = Field(None, ge=2)

    @model_validator(mode="before")
    @classmethod
    def _hybrid_is_a_number_of_shards(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("kind") in ("hybrid", "hsdp"):
            raise ValueError(
                f'kind = "{given["kind"]}" is not supported: for hybrid sharding, within a node and copied across '
                'nodes, set kind = "fsdp" and shards to the number of devices of a node'
            )
        return given

    def idle(self) -> dict[KeyPath, str]:
        return {("shards",): 'nothing is sharded with kind = "data"'} if self.kind == "data" else {}


class RunConfig(Section):
    """Seed, threads, checkpoints and diagnostics of a run."""

    seed: int = Field(0, ge=0, lt=2**32)  # as numpy takes it
    threads: int | None = Field(None, ge=1)  # of PyTorch, on the CPU; None: all cores
    checkpoint_every: int = Field(50, ge=1)  # steps
    keep_checkpoints: int = Field(2, ge=1)  # the newest ones; older ones are deleted
    # written from a copy in host memory while training goes on; false: training waits, and there is no copy
    checkpoint_in_background: bool = True
    completions_every: int = Field(10, ge=1)  # steps between samples written to completions/
    # largest mean |trainer - sampler log-probability| of a step, nats; None: by dtype and layers, see engine/drift.py
    max_mean_drift: float | None = Field(None, gt=0)
    # NAME/REPOSITORY on the hub that gets the model of the finished run; needs a token (hf auth login, or HF_TOKEN)
    push_to_hub: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$")
    profile: tuple[int, int] | None = None  # first and last step to trace with PyTorch's profiler, into trace/

    @model_validator(mode="before")
    @classmethod
    def _largest_drift_is_no_limit(cls, given: Any) -> Any:
        if isinstance(given, dict) and "max_drift" in given:
            raise ValueError(
                "max_drift is no longer supported, because the largest difference grows with the number of tokens: set "
                "max_mean_drift (nats, mean over a step's tokens), or remove it to use the default limit"
            )
        return given

    @model_validator(mode="after")
    def _profiled_steps_are_a_range(self) -> "RunConfig":
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            raise ValueError(f"profile must be [first, last] with 1 <= first <= last, got {list(self.profile)}")
        return self


class LogConfig(Section):
    """Console lines, and where the rows of steps.jsonl are also sent."""

    every: int = Field(50, ge=1)  # steps between console lines; a line is printed at least every 10 s
    tensorboard: bool = True  # writes event files to tensorboard/ in the run folder
    wandb: str | None = Field(None, min_length=1)  # project name; needs the package wandb
    trackio: str | None = Field(None, min_length=1)  # project name; needs the package trackio


def _corrected(stage: Any) -> Any:
    given = stage.get("objective", {}) if isinstance(stage, dict) else None
    if not isinstance(given, dict) or given.get("name") in ("sft", "rft") or given.get("old_logprob") == "sampler":
        return stage
    return {**stage, "objective": {"importance_sampling": "token", **given}}


class EngineConfig(Section):
    """The tables of a recipe that the engine reads; the curriculum's Recipe adds its own."""

    model: ModelConfig
    lora: LoraConfig | None = None  # None: full fine-tuning
    sampler: SamplerConfig = SamplerConfig()
    parallel: ParallelConfig = ParallelConfig()
    run: RunConfig = RunConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="before")
    @classmethod
    def _corrected_by_default(cls, data: Any) -> Any:
        """Sets ``objective.importance_sampling = "token"`` in stages that vLLM samples for, where it is not given.

        vLLM's kernels are not the trainer's, so that the two differ in their log-probabilities.
        """
        if not isinstance(data, dict) or not isinstance(data.get("stage"), list):
            return data
        sampler = data.get("sampler")
        if not isinstance(sampler, dict) or sampler.get("kind") != "vllm":
            return data
        return {**data, "stage": [_corrected(stage) for stage in data["stage"]]}

    @model_validator(mode="after")
    def _fsdp_is_possible(self) -> "EngineConfig":
        if self.parallel.kind == "fsdp" and self.sampler.kind == "vllm" and self.sampler.publish == "shared":
            raise ValueError(
                'sampler.publish = "shared" is not supported with parallel.kind = "fsdp", because vLLM needs whole '
                'weights: set sampler.publish = "copy"'
            )
        if self.parallel.kind == "fsdp" and self.sampler.keep_cache:
            raise ValueError(
                'sampler.keep_cache = true is not supported with parallel.kind = "fsdp", because the weights that CUDA '
                "graphs read are gathered anew for each step: remove sampler.keep_cache"
            )
        if self.parallel.kind == "fsdp" and self.sampler.overlap:
            raise ValueError(
                'sampler.overlap = true is not supported with parallel.kind = "fsdp", because gathering weights would '
                'hold up drawing and learning: remove sampler.overlap, or set parallel.kind = "data"'
            )
        if self.parallel.kind == "fsdp" and self.model.compile:
            raise ValueError('model.compile = true is not supported with parallel.kind = "fsdp": remove model.compile')
        if self.parallel.kind == "fsdp" and self.model.offload_optimizer:
            raise ValueError(
                'model.offload_optimizer = true is not supported with parallel.kind = "fsdp": remove '
                'model.offload_optimizer, or set parallel.kind = "data"'
            )
        return self

    @model_validator(mode="after")
    def _lora_is_possible(self) -> "EngineConfig":
        if self.lora is not None and self.sampler.kind == "vllm" and self.sampler.publish == "shared":
            raise ValueError(
                'sampler.publish = "shared" is not supported with [lora], because vLLM would sample without the '
                'adapters: set sampler.publish = "copy"'
            )
        if self.lora is not None and self.parallel.kind == "fsdp":
            raise ValueError('[lora] is not supported with parallel.kind = "fsdp": set parallel.kind = "data"')
        return self


def refuse_overlap(stage: Stage) -> None:
    """Raises ValueError where ``stage`` cannot be drawn one step ahead with exact importance weights."""
    objective, where = stage.objective, f"sampler.overlap = true with stage {stage.name!r}"
    if objective.is_supervised:  # nothing is drawn
        return
    if objective.name == "rft":
        raise ValueError(
            f'{where}: objective.name = "rft" has no importance weights, which responses of older weights need: remove '
            "sampler.overlap, or name another objective"
        )
    if objective.old_logprob != "sampler":
        raise ValueError(
            f'{where}: objective.old_logprob must be "sampler", so that the ratio is that of the present weights to '
            f'those that responses were drawn from, got "{objective.old_logprob}"'
        )
    if stage.batch.refills:
        raise ValueError(
            f"{where}: batch.refills is not supported, because further prompts are taken only when rewards are known: "
            f"refills must be 0, got {stage.batch.refills}"
        )


# tables that may stand at the top level of a recipe, as defaults of all stages, and in each stage
STAGE_TABLES: dict[str, type[Section]] = {
    "objective": ObjectiveConfig,
    "optim": OptimConfig,
    "batch": BatchConfig,
    "sampling": SamplingConfig,
}
