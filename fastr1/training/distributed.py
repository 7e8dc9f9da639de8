"""DeepSpeed behind a handful of verbs: forward, backward, step, gather, save, load, close.

The only module that imports deepspeed. Works under the `deepspeed` launcher, under torchrun, inside an already
initialised process group, and in a plain `python` process (world size 1), on CUDA (NCCL) and on CPU (gloo).

What it adds to DeepSpeed:
- any number of micro-steps per update; gradients are summed over micro-steps and ranks, never averaged;
- the global gradient norm before clipping under every ZeRO stage, and an error instead of a silently skipped update;
- fp32 gradient accumulation and reduction in bfloat16 runs, unless the DeepSpeed configuration says otherwise.

Refuses bfloat16 with ZeRO stage 0 (no fp32 gradient accumulation there) and DeepSpeed keys that it sets itself.
Rules for callers under ZeRO stages 2 and 3, which communicate inside backward: every rank takes the same number of
micro-steps per update, and in each of them the same trainable modules take part on every rank. Stages 0 and 1 only need
at least one micro-step per rank and update.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from torch import nn

from fastr1.config import OptimConfig
from fastr1.training.agreement import agreement, collected_write_errors, on_every_rank
from fastr1.training.deepspeed_config import check_deepspeed_keys, complete_config
from fastr1.training.launched import is_launched, launched_world_size, place_of_launcher
from fastr1.training.schedule import build_scheduler

# Rollouts of different length make ranks wait for each other far longer than the default of ten minutes.
PROCESS_GROUP_TIMEOUT = timedelta(hours=2)


class DistributedError(ValueError):
    """The distributed model cannot do what was asked. The message names the value received and the remedy."""


class NonFiniteGradientError(DistributedError):
    """The gradient norm is infinite or not a number. The update was not applied: parameters are still sound."""


class DistributedModel:
    """A model, its AdamW optimizer and its learning-rate schedule, owned by DeepSpeed.

    Args:
        model: moved to this rank's device and, with bfloat16, cast to it in place. Parameters with
            `requires_grad=False` are left alone. Every trainable parameter gets the same weight decay.
        optim: AdamW, schedule and clipping; `max_grad_norm=0` switches clipping off.
        deepspeed_config: a DeepSpeed configuration; entries equal to "auto" are dropped. Default: ZeRO stage 1.
        dtype: torch.float32, or torch.bfloat16 with fp32 master weights (ZeRO stages 1 to 3).
        num_steps: optimizer steps of the whole run, the length of the schedule.

    Attributes: rank, world_size, device, zero_stage, dtype, optim, module (the model itself), is_updating (a step
    was applied, or failed half-way, since the last `finish_update`).
    Raises: DistributedError without a trainable parameter; what `build_deepspeed_config` raises.
    """

    def __init__(
        self,
        model: nn.Module,
        optim: OptimConfig,
        deepspeed_config: dict[str, Any],
        *,
        dtype: torch.dtype,
        num_steps: int,
    ) -> None:
        config = build_deepspeed_config(deepspeed_config, optim, dtype)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trainable:
            raise DistributedError("the model has no trainable parameter; freeze fewer parts (model.freeze)")
        self.optim = optim
        self.dtype = dtype
        self.zero_stage: int = config["zero_optimization"]["stage"]
        self._owns_process_group = init_process_group()
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.device = _local_device()
        self.module = model
        self._trainable = trainable
        self._num_micro_steps = 0
        self._gather_depth = 0
        self._stage_0_norm = math.nan
        self.finish_update()

        optimizer = torch.optim.AdamW(
            trainable,
            lr=optim.learning_rate,
            betas=(optim.adam_beta1, optim.adam_beta2),
            eps=optim.adam_epsilon,
            weight_decay=optim.weight_decay,
            fused=self.device.type == "cuda",
        )
        if self.zero_stage == 0:
            # Runs between DeepSpeed's all-reduce and the update; DeepSpeed itself reports no norm at stage 0.
            optimizer.register_step_pre_hook(self._clip_at_stage_0)
        self._scheduler = build_scheduler(optimizer, optim, num_steps)
        made = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=self._scheduler, config=config)
        self._engine = made[0]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward. The loss must depend on tensors returned here (directly or in tuples, lists, dicts)."""
        return self._engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of one micro-step's loss, a scalar that already carries the global denominator."""
        if self.zero_stage == 2:
            self._engine.optimizer.setup_buckets()  # missed at the end of a backward that reaches no parameter
        # DeepSpeed averages over ranks; the factor turns the mean back into the sum.
        self._engine.backward(loss * self.world_size)
        self._num_micro_steps += 1

    def backward_from(self, outputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> None:
        """Go on backwards from tensors that `__call__` returned, with gradients that came from `backward`."""
        # The value means nothing; the gradients are the given ones, of the sum over ranks already.
        self._engine.backward(sum((x.float() * g).sum() for x, g in zip(outputs, grads, strict=True)))

    def step(self) -> float:
        """Clip, update parameters and learning rate, clear gradients. Returns the global norm before clipping.

        Raises: DistributedError without a preceding `backward`; NonFiniteGradientError, with no update applied.
        """
        if self._num_micro_steps == 0:
            raise DistributedError("step() was called after 0 micro-steps; call backward(loss) first")
        self._num_micro_steps = 0
        self.is_updating = True
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm() if self.zero_stage > 0 else self._stage_0_norm)
        self._require_finite(norm)
        if self.zero_stage == 3:  # the first backward of the next overwrites its part of it, the others add to it
            self._engine.optimizer.grad_partitions_flat_buffer.zero_()
        self._has_stepped = True
        return norm

    def finish_update(self) -> None:
        """What was trained since the last call is an update, to be kept as one."""
        self.is_updating = self._has_stepped = False

    def _clip_at_stage_0(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        limit = self.optim.max_grad_norm or math.inf
        self._stage_0_norm = nn.utils.get_total_norm([p.grad for p in self._trainable if p.grad is not None]).item()
        self._require_finite(self._stage_0_norm)
        nn.utils.clip_grads_with_norm_(self._trainable, limit, torch.tensor(self._stage_0_norm))

    def _require_finite(self, norm: float) -> None:
        if not math.isfinite(norm):
            self.is_updating = self._has_stepped
            error = NonFiniteGradientError(
                f"the gradient norm is {norm} and the update was not applied; resume from the last checkpoint "
                "with a lower optim.learning_rate, named in run.allow_changed, or look for a non-finite reward or "
                "log-probability in this batch"
            )
            raise on_every_rank(error)  # the norm is that of all ranks

    @property
    def learning_rate(self) -> float:
        """The learning rate that the next `step` will use."""
        return float(self._scheduler.get_last_lr()[0])

    @contextmanager
    def gathered_parameters(self) -> Iterator[nn.Module]:
        """Full parameters on every rank, read-only, for rollout and export. Costs nothing below ZeRO stage 3.

        Yields the module, whose forward may be called any number of times. Contexts may be nested. All ranks enter.
        """
        if self.zero_stage < 3 or self._gather_depth > 0:
            self._gather_depth += 1
            try:
                yield self.module
            finally:
                self._gather_depth -= 1
            return
        with deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            # DeepSpeed's per-module hooks would partition each parameter again after its first use.
            offload = self._engine.optimizer.parameter_offload
            offload._remove_module_hooks()
            offload.forward_hooks.clear()
            offload.backward_hooks.clear()
            self._gather_depth += 1
            try:
                yield self.module
            finally:
                self._gather_depth -= 1
                offload.setup_zero_stage3_hooks()

    def consolidated_state_dict(self) -> dict[str, torch.Tensor] | None:
        """The whole model on the CPU in its own dtype and key layout: a dict on rank 0, None elsewhere.

        Tied parameters share one tensor. Gathers one parameter at a time under ZeRO stage 3. All ranks call it.
        """
        seen: dict[int, str] = {}
        state: dict[str, torch.Tensor] = {}
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            first_name = seen.setdefault(id(tensor), name)
            if first_name != name:
                if self.rank == 0:
                    state[name] = state[first_name]
                continue
            with deepspeed.zero.GatheredParameters([tensor], enabled=self._gather_depth == 0):
                if self.rank == 0:
                    state[name] = tensor.detach().to("cpu", copy=True)
        return state if self.rank == 0 else None

    def sum_across_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over ranks, as a new tensor on the device of the argument. No gradient."""
        total = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def gather_objects(self, value: Any) -> list[Any]:
        """One picklable object per rank, in rank order, on every rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()

    def save(self, directory: Path, tag: str) -> None:
        """Write model, optimizer and schedule to `directory/tag`. All ranks call it. See `checkpoint.py`.

        Raises: what writing raises on any rank, on all of them.
        """
        with collected_write_errors(self._engine) as errors:
            self._engine.save_checkpoint(str(directory), tag=tag, save_latest=False)
        with agreement(self):
            if errors:
                raise errors[0]

    def load(self, directory: Path, tag: str) -> None:
        """Restore what `save` wrote, into a model that has not trained yet. All ranks call it.

        Learning rate, decay, betas, epsilon and clipping are those of `optim`, whatever they were when it was written.
        """
        path, _ = self._engine.load_checkpoint(str(directory), tag=tag)
        if path is None:
            raise DistributedError(f"DeepSpeed found no checkpoint in {directory / tag}")
        self._apply_optim()

    def _apply_optim(self) -> None:
        """DeepSpeed restores these from the checkpoint; where they are the same this changes no bit."""
        optim, schedule = self.optim, self._scheduler
        if self.zero_stage > 0:
            self._engine.optimizer.clip_grad = optim.max_grad_norm
        schedule.base_lrs = [optim.learning_rate] * len(schedule.base_lrs)
        schedule._last_lr = [optim.learning_rate * factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
            group |= {"lr": rate, "initial_lr": optim.learning_rate, "weight_decay": optim.weight_decay}
            group |= {"betas": (optim.adam_beta1, optim.adam_beta2), "eps": optim.adam_epsilon}

    def close(self) -> None:
        """Wait for the other ranks, release DeepSpeed, and destroy the process group if this object created it."""
        dist.barrier()
        self._engine.destroy()
        if self._owns_process_group:
            # Without this, gloo's threads abort some processes at interpreter exit.
            deepspeed.comm.destroy_process_group()


def init_process_group() -> bool:
    """Make torch and DeepSpeed agree on a process group; True if this call created it.

    Uses the running group if there is one, else the launcher's environment variables, else a group of one process.
    """
    _quieten_deepspeed()
    created = not dist.is_initialized()
    backend = get_accelerator().communication_backend_name()
    if created and is_launched():
        device = _local_device()
        bind = device if device.type == "cuda" and launched_world_size() > 1 else None
        place = place_of_launcher(PROCESS_GROUP_TIMEOUT)
        dist.init_process_group(backend, timeout=PROCESS_GROUP_TIMEOUT, device_id=bind, **place)
    elif created:
        # An in-memory store needs no port, so single-process runs never collide.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=PROCESS_GROUP_TIMEOUT)
    # DeepSpeed insists on this variable, which only launchers set.
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return created


def _quieten_deepspeed() -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Warnings about renamed collectives, once per bucket and step.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if get_accelerator().device_name() == "cpu":
        # A C++ all-reduce for inference, never used in training; building it takes most of a minute. DeepSpeed looks up
        # in a table whether it can be built, of which it reads this entry alone. It would fill the table by trying a
        # compiler for every operation, with standard error turned off, where the answer to a Ctrl-C is lost.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False


def _local_device() -> torch.device:
    if get_accelerator().device_name() != "cuda":
        return torch.device(get_accelerator().device_name())
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if device.index >= torch.cuda.device_count():
        raise DistributedError(
            f"process {device.index + 1} of this machine has no GPU, {torch.cuda.device_count()} can be used; start "
            "one process per GPU (--num-processes, --num_gpus)"
        )
    torch.cuda.set_device(device)
    return device


def build_deepspeed_config(user: dict[str, Any], optim: OptimConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: the user's entries plus those that follow from `optim` and `dtype`.

    Raises: DistributedError for a dtype that cannot be trained in; ConfigError for what `check_deepspeed` refuses and
        for what DeepSpeed does not know.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise DistributedError(f"dtype {dtype} is not supported; use torch.bfloat16 or torch.float32")
    complete = complete_config(user, optim, str(dtype).removeprefix("torch."))
    _quieten_deepspeed()
    check_deepspeed_keys(complete, DeepSpeedConfig, DeepSpeedConfigModel)
    return complete
