"""The peers, each a function from a group's inputs to a call that gives the outputs to be checked.

A peer that cannot run here raises `UnavailableError` with the reason, which becomes its row.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from harness import Call, Outputs, UnavailableError
from problems import OPTIONS, Inputs, masked_loss
from torch import Tensor


def load(module: str) -> Any:
    """A peer's module, or the reason why there is none."""
    try:
        return import_module(module)
    except (ImportError, RuntimeError) as error:
        package = module.partition(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        raise UnavailableError(f"{package} is not installed" if missing else f"{package}: {error}") from error


def needs_gpu(what: str) -> None:
    if not torch.cuda.is_available():
        raise UnavailableError(f"{what} needs a GPU")


def differentiated(inputs: Inputs, loss_of: Callable[[Inputs], Tensor]) -> Call:
    """Loss and the gradients of everything that wants one."""
    named = {name: getattr(inputs, name) for name in ("logits", "hidden", "weight")}
    leaves = {name: x for name, x in named.items() if x is not None and x.requires_grad}

    def call() -> Outputs:
        loss = loss_of(inputs)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}

    return call


def eager_logps(logits: Tensor, token_ids: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, token_ids[..., None]).squeeze(-1)


def eager_loss(inputs: Inputs) -> Tensor:
    logits = inputs.logits if inputs.logits is not None else inputs.hidden @ inputs.weight.T  # type: ignore[union-attr, operator]
    return masked_loss(eager_logps(logits, inputs.token_ids), inputs)


def eager(inputs: Inputs) -> Call:
    return differentiated(inputs, eager_loss)


def compiled(inputs: Inputs) -> Call:
    compiled_loss = torch.compile(_loss_of_tensors, dynamic=False)

    def loss_of(x: Inputs) -> Tensor:
        rows = x.logits if x.logits is not None else x.hidden
        return compiled_loss(rows, x.weight, x.token_ids, x.mask, x.advantages, x.old_logps, x.ref_logps)

    return differentiated(inputs, loss_of)


def _loss_of_tensors(
    rows: Tensor,
    weight: Tensor | None,
    token_ids: Tensor,
    mask: Tensor,
    advantages: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor,
) -> Tensor:
    logits = rows if weight is None else rows @ weight.T
    inputs = Inputs(None, token_ids, mask, advantages, old_logps=old_logps, ref_logps=ref_logps)  # type: ignore[arg-type]
    return masked_loss(eager_logps(logits, token_ids), inputs)


def liger_chunked(inputs: Inputs) -> Call:
    """Its loss is compiled on a GPU, as it is by default; on a CPU the compiler would take most of the time."""
    module = load("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss(
        beta=OPTIONS["beta"],
        compiled=torch.cuda.is_available(),
        epsilon_low=OPTIONS["epsilon"],
        epsilon_high=OPTIONS["epsilon_high"],
        loss_type=OPTIONS["loss_type"],
    )

    def loss_of(x: Inputs) -> Tensor:
        mask = x.mask.long()
        logps = {"ref_per_token_logps": x.ref_logps, "old_per_token_logps": x.old_logps}
        return module(x.hidden, x.weight, x.token_ids, mask, x.advantages, **logps)[0]

    return differentiated(inputs, loss_of)


def liger_triton(inputs: Inputs) -> Call:
    """Its logits have one more position, which is made beforehand."""
    needs_gpu("its Triton kernel")
    function = load("liger_kernel.transformers.grpo_loss").triton_grpo_loss
    assert inputs.logits is not None
    padded = torch.cat([inputs.logits.detach(), inputs.logits.detach()[:, :1]], 1).requires_grad_()

    def call() -> Outputs:
        loss, _ = function(
            padded,
            inputs.old_logps,
            inputs.ref_logps,
            inputs.token_ids,
            inputs.advantages,
            inputs.mask.long(),
            temperature=1.0,
            beta=OPTIONS["beta"],
            eps_low=OPTIONS["epsilon"],
            eps_high=OPTIONS["epsilon_high"],
            inplace=False,
            loss_type=OPTIONS["loss_type"],
            reduce=True,
        )
        (gradient,) = torch.autograd.grad(loss, padded)
        return {"loss": loss.detach(), "logits": gradient[:, :-1]}

    return call


def liger_scaled(inputs: Inputs) -> Call:
    """Its negative log-likelihood of a head, with the loss in torch."""
    function = load("liger_kernel.ops.fused_linear_scaled_cross_entropy").LigerFusedLinearScaledCrossEntropyFunction

    def loss_of(x: Inputs) -> Tensor:
        outputs = function.apply(x.hidden.flatten(0, 1), x.weight, x.token_ids.flatten())  # type: ignore[union-attr]
        nll = outputs[0] if isinstance(outputs, tuple) else outputs
        return masked_loss(-nll.view(x.token_ids.shape), x)

    return differentiated(inputs, loss_of)


def cut_cross_entropy(inputs: Inputs) -> Call:
    """Its negative log-likelihood of a head, every gradient kept, with the loss in torch."""
    needs_gpu("its Triton kernel")
    function = load("cut_cross_entropy").linear_cross_entropy

    def loss_of(x: Inputs) -> Tensor:
        nll = function(x.hidden, x.weight, x.token_ids, reduction="none", filter_eps=None)
        return masked_loss(-nll, x)

    return differentiated(inputs, loss_of)


def trl_loss(inputs: Inputs) -> Call:
    utils = load("trl.trainer.utils")

    def loss_of(x: Inputs) -> Tensor:
        if x.logits is not None:
            return masked_loss(utils.selective_log_softmax(x.logits, x.token_ids), x)
        return masked_loss(trl_head(utils, x, ("log_probs",))[0].view(x.token_ids.shape), x)

    return differentiated(inputs, loss_of)


def trl_head(utils: Any, x: Inputs, outputs: tuple[str, ...]) -> tuple[Tensor, ...]:
    head = (x.hidden.flatten(0, 1), x.weight, None, x.token_ids.flatten())  # type: ignore[union-attr]
    chunk = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    return utils._ChunkedLogProbFunction.apply(*head, 1.0, chunk, None, 1.0, outputs)


def verl_loss(inputs: Inputs) -> Call:
    """Its log-probabilities and its policy loss; dual clip too far away to act, KL as its trainer adds it."""
    algorithms = load("verl.trainer.ppo.core_algos")
    functional = load("verl.utils.torch_functional")
    config = load("verl.workers.config").ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=OPTIONS["epsilon"],
        clip_ratio_high=OPTIONS["epsilon_high"],
        clip_ratio_c=1e6,
    )

    def loss_of(x: Inputs) -> Tensor:
        mask = x.mask.long()
        logps = functional.logprobs_from_logits(x.logits, x.token_ids, inplace_backward=False)
        advantages = x.advantages[:, None].expand(mask.shape)
        policy = algorithms.get_policy_loss_fn("vanilla")
        loss, _ = policy(x.old_logps, logps, advantages, mask, "token-mean", config)
        kl = algorithms.kl_penalty(logps, x.ref_logps, "low_var_kl")
        return loss + OPTIONS["beta"] * algorithms.agg_loss(kl, mask, "token-mean")

    return differentiated(inputs, loss_of)
