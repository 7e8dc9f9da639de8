"""Configuration: frozen dataclasses that read like the JSON file they come from.

Names are TRL's `GRPOConfig` names wherever the concept exists. A field with a fixed set of values has them in its type,
and other modules read them from there (`choices_of`). Defaults are stated here; other modules read them as
`DataConfig.policy`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

INSTRUCTION = "Output the thinking process in <think> </think> and final answer (option) in <answer> </answer> tags."

Task = Literal["grpo", "sft"]
ModelPart = Literal["vision_tower", "connector", "language_model"]
Dtype = Literal["auto", "bfloat16", "float32"]
Policy = Literal["error", "skip"]
Backend = Literal["auto", "torchcodec", "pyav"]
RewardMode = Literal["code", "paper"]
Scaling = Literal["group", "batch", "none"]
Level = Literal["token", "sequence"]
KLEstimator = Literal["k1", "k2", "k3"]
PackedAttention = Literal["auto", "flash_attn", "varlen", "sdpa", "eager"]
SamplerCorrection = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "icepop"]
RolloutBackend = Literal["engine", "eager"]
Schedule = Literal["cosine", "linear", "constant"]
Report = Literal["jsonl", "tensorboard", "wandb", "trackio"]
Control = Literal["blank_video", "repeated_frame", "shuffled_frames"]  # shown in the place of a clip


@dataclass(frozen=True)
class ModelConfig:
    path: str = ""  # model folder in the Hugging Face layout
    dtype: Dtype = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
    freeze: tuple[ModelPart, ...] = ("vision_tower",)
    gradient_checkpointing: bool = False
    attn_implementation: str = "sdpa"
    packed_attn_implementation: PackedAttention = "auto"  # of packed passes; auto: the first that can run here
    use_liger_kernel: bool | None = None  # norms, MLPs and rotation of the decoder; None: with a GPU and liger-kernel


@dataclass(frozen=True)
class DataConfig:
    train_file: str = ""
    video_root: str = ""
    eval_file: str | None = None
    eval_video_root: str | None = None  # None: video_root
    num_frames: int = 16  # -1: one frame per second
    max_frames: int | None = None  # cap of the one-per-second rule
    instruction: str = INSTRUCTION
    policy: Policy = "error"  # what a bad row or video does
    max_bad_fraction: float = 0.05  # with skip: more bad rows than this share of the file stop the run
    backend: Backend = "auto"  # auto: torchcodec for frames on a GPU, where it can be loaded; else pyav
    num_decode_threads: int = 2


@dataclass(frozen=True)
class RewardConfig:
    functions: tuple[str, ...] = ("tinyllava_video_r1",)  # built-in names or "module:function"
    weights: tuple[float, ...] | None = None  # None: 1.0 each
    mode: RewardMode = "code"  # rules of "tinyllava_video_r1": of the released code or of the paper
    base: float = 0.5  # r0, reward of the bare format
    length_bonus: float = 0.5  # r1
    correct: float = 1.0  # r2
    max_think_chars: int = 1200  # ML, length at which the bonus saturates
    bad_format: float = -2.0
    # Functions named "module:function" may be slow or risky. With workers, each call is for one completion.
    num_workers: int = 0  # processes beside each training process that run them; 0: they run in the training process
    timeout_seconds: float | None = None  # of one call; a call past it is killed
    timeout_reward: float | None = None  # what its completion gets then; None: the run stops with an error


@dataclass(frozen=True)
class GRPOConfig:
    num_generations: int = 8
    max_completion_length: int = 512
    temperature: float = 1.0
    top_k: int = 0  # 0: the full vocabulary; 50 reproduces the original's hidden default
    top_p: float = 1.0
    min_p: float = 0.0  # a token is drawn only if at least so likely, relative to the likeliest
    stop_strings: tuple[str, ...] = ()  # text that ends a completion
    loss_type: str = "tinyllava_video_r1"  # a row of `fastr1_kernels.LOSSES`
    beta: float = 0.01
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None  # upper bound of the ratio where the advantage is negative
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    kl_estimator: KLEstimator = "k3"
    entropy_coef: float = 0.0  # weight of the entropy bonus
    scale_rewards: Scaling = "group"
    importance_sampling_level: Level = "token"  # sequence: GSPO
    num_iterations: int = 1  # passes of the optimizer over the completions of an update
    # Micro-steps per rollout: over gradient_accumulation_steps, it is how many steps of the optimizer a pass takes.
    steps_per_generation: int | None = None  # None: gradient_accumulation_steps, one step
    max_num_gen_batches: int = 1  # tries per update to fill it with groups that have a signal; 1: it is taken as it is
    sampler_correction: SamplerCorrection = "none"  # weights for probabilities of the sampler that differ
    sampler_cap: float = 3.0  # largest trainer/sampler ratio: larger ones are cut to it or masked
    sampler_floor: float = 0.5  # icepop also masks smaller ones
    advantage_eps: float = 1e-4
    advantage_noise_std: float = 0.0  # the original adds N(0, 0.02²) to every advantage
    leave_one_out: bool = False
    mask_truncated_completions: bool = False


@dataclass(frozen=True)
class RolloutConfig:
    backend: RolloutBackend = "engine"  # eager: the plain loop, slower, for any decoder
    keep_arenas: bool = True  # keys and values keep their memory during the training passes
    num_speculative_tokens: int = 0  # guessed ahead at most, from earlier completions; 0: no speculation


@dataclass(frozen=True)
class OptimConfig:
    learning_rate: float = 1e-6
    lr_scheduler_type: Schedule = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    num_train_epochs: float = 1.0
    max_steps: int = -1  # > 0 overrides num_train_epochs
    # Prompts per process, each with num_generations completions; × gradient_accumulation_steps = prompts of a step.
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    max_tokens_per_micro_batch: int = 8192  # prompts and completions in a training pass: bounds its memory


@dataclass(frozen=True)
class RunConfig:
    output_dir: str = "runs/grpo"
    seed: int = 42
    logging_steps: int = 1  # a row of metrics holds the means over this many updates
    save_steps: int = 0  # a checkpoint every so many updates; 0: none of these; the final model is always written
    save_minutes: float = 10.0  # a checkpoint when the last one is this old, so that a crash costs no more; 0: never
    save_total_limit: int = 2
    eval_steps: int = 0  # 0: no evaluation during training
    eval_samples: int | None = None  # evaluate on the first n held-out questions only
    per_device_eval_batch_size: int = 16  # questions answered at a time
    resume_from_checkpoint: str | None = None  # a checkpoint folder, or "last"
    allow_changed: tuple[str, ...] = ()  # settings, such as "optim.learning_rate", that a resume may change
    report_to: tuple[Report, ...] = ("jsonl", "tensorboard")
    report_frames: int = 64  # MiB of contact sheets of the clips, in frames/ of the run folder; 0: none
    roofline: bool = True  # measure the machine for two seconds, and report how far updates are from its limit


@dataclass(frozen=True)
class TrainConfig:
    """Everything a GRPO or SFT run needs."""

    task: Task = "grpo"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    deepspeed: dict[str, Any] = field(default_factory=lambda: {"zero_optimization": {"stage": 1}})


def choices_of(hint: Any) -> tuple[str, ...]:
    """The values that a field of this type may have: those of a `Literal`, also inside a tuple; () for other types."""
    if hint is not None and getattr(hint, "__origin__", None) is Literal:
        return get_args(hint)
    return next((found for item in get_args(hint) if (found := choices_of(item))), ())
