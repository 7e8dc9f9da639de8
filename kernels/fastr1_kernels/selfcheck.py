"""Does every kernel run here? Each public function once on tiny inputs, with its gradient, against plain float64.

    python -m fastr1_kernels.selfcheck [--json]

On a GPU the kernels are compiled and launched. Without one Triton's interpreter runs them on the CPU: slow, and it says
nothing about a GPU, but a broken installation shows. The interpreter is chosen when triton is imported, so this is a
process of its own. Exit code 0 when all agree, else 1.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = 1e-4  # of float32 against float64, relative to the largest value
Inputs = dict[str, "Tensor"]


def main(argv: list[str]) -> int:
    """Prints one line, or one JSON object, per function."""
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = f"launched on {torch.cuda.get_device_name()}" if device == "cuda" else "interpreted on the CPU"
    findings = [check(name, function, device, where) for name, function in FUNCTIONS.items()]
    for finding in findings:
        mark = "ok" if finding["ok"] else "FAILED"
        print(json.dumps(finding) if "--json" in argv else f"{mark:8}{finding['name']:26}{finding['detail']}")
    return 0 if all(finding["ok"] for finding in findings) else 1


def check(name: str, function: Callable[[Inputs], "list[Tensor]"], device: str, where: str) -> dict[str, Any]:
    """What `function` gives on this device against float64 on the CPU, which takes plain torch."""
    import torch

    from .dispatch import uses_triton

    try:
        expected = function(_inputs("cpu", torch.float64))
        inputs = _inputs(device, torch.float32)
        if not uses_triton(inputs["logits"]):
            raise RuntimeError("plain torch was used; is triton installed?")
        error = max(map(_relative_error, function(inputs), expected))
    except Exception as problem:  # whatever Triton, a driver or a compiler throws is the finding
        reason = " ".join(str(problem).split())[:200]
        return {"name": name, "ok": False, "detail": f"not {where}: {type(problem).__name__}: {reason}"}
    ok = error <= TOLERANCE
    verdict = "" if ok else f", which is more than {TOLERANCE:g}: its results are wrong here"
    return {"name": name, "ok": ok, "detail": f"{where}, relative error {error:.0e}{verdict}"}


def _relative_error(found: "Tensor", expected: "Tensor") -> float:
    """NaN counts as infinite; what is 0 but for rounding is compared with 1e-3."""
    error = (found.detach().double().cpu() - expected).abs().max() / expected.abs().max().clamp_min(1e-3)
    return error.nan_to_num(nan=float("inf")).item()


def _inputs(device: str, dtype: Any) -> Inputs:
    """Two prompts of two completions of three tokens, hidden size 8, vocabulary 40."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> "Tensor":
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    inputs = {"logits": draw(4, 3, 40), "hidden": draw(4, 3, 8), "weight": draw(40, 8), "old_logps": draw(4, 3) - 4}
    for name in ("logits", "hidden", "weight"):
        inputs[name].requires_grad_()
    inputs["ref_logps"] = draw(4, 3) - 4
    inputs["rewards"] = torch.tensor([1.0, 0.0, 0.25, 0.5], dtype=dtype, device=device)
    inputs["token_ids"] = torch.randint(40, (4, 3), generator=generator).to(device)
    inputs["mask"] = (torch.arange(3) < torch.tensor([3, 2, 1, 3])[:, None]).to(device)
    return inputs


def _advantages(x: Inputs) -> "list[Tensor]":
    from . import group_advantages

    return [group_advantages(x["rewards"], 2)]


def _grpo_loss(level: str) -> Callable[[Inputs], "list[Tensor]"]:
    def run(x: Inputs) -> "list[Tensor]":
        from . import grpo_loss

        keywords: dict[str, Any] = {name: x[name] for name in ("mask", "rewards", "old_logps", "ref_logps")}
        output = grpo_loss(
            x["logits"],
            x["token_ids"],
            num_generations=2,
            beta=0.1,
            normalizer=x["mask"].sum(),
            importance_sampling_level=level,
            return_entropy=True,
            **keywords,
        )
        output.loss.backward()
        assert output.entropy is not None
        return [output.loss, output.entropy, _gradient(x["logits"])]

    return run


def _linear_grpo_loss(x: Inputs) -> "list[Tensor]":
    from . import linear_grpo_loss

    keywords: dict[str, Any] = {name: x[name] for name in ("mask", "rewards", "old_logps")}
    keywords["normalizer"] = x["mask"].sum()
    output = linear_grpo_loss(x["hidden"], x["weight"], x["token_ids"], num_generations=2, **keywords)
    output.loss.backward()
    return [output.loss, _gradient(x["hidden"]), _gradient(x["weight"])]


def _selective_log_softmax(x: Inputs) -> "list[Tensor]":
    from . import selective_log_softmax

    logps, entropy = selective_log_softmax(x["logits"], x["token_ids"], return_entropy=True)
    (logps.sum() + entropy.sum()).backward()
    return [logps, entropy, _gradient(x["logits"])]


def _linear_logps(x: Inputs) -> "list[Tensor]":
    from . import linear_logps

    logps = linear_logps(x["hidden"], x["weight"], x["token_ids"])
    logps.sum().backward()
    return [logps, _gradient(x["hidden"]), _gradient(x["weight"])]


def _decode_attention(x: Inputs) -> "list[Tensor]":
    from . import decode_attention

    caches, lengths = x["logits"].detach().view(4, 3, 5, 8), x["token_ids"].new_tensor([5, 3, 1, 5, 2, 4]).int()
    prefix, bounds = caches[:2], lengths.new_tensor([0, 1, 4])
    options: dict[str, Any] = {"scale": 0.5, "max_group": 3, "max_suffix_length": 5}
    rest = (caches, caches, lengths[2:])
    return [decode_attention(x["hidden"].detach(), prefix, prefix, lengths[:2], bounds, *rest, **options)]


def _rope_and_store(x: Inputs) -> "list[Tensor]":
    from . import rope_and_store

    q, norm = x["hidden"].detach(), x["weight"].detach()
    caches, lengths = q.new_zeros(2, 4, 3, 5, 8), x["token_ids"].new_tensor([0, 4, 5, 2]).int()
    step = (q, q, q, norm, norm, x["token_ids"][:, 0].contiguous(), *caches, lengths)
    return [rope_and_store(*step, q_norm=norm[0], k_norm=norm[1]), caches]


def _add_rms_norm(x: Inputs) -> "list[Tensor]":
    from . import add_rms_norm

    rows = x["hidden"].detach().view(12, 8)
    return [*add_rms_norm(rows, rows, rows[0], 1e-6)]


def _swiglu(x: Inputs) -> "list[Tensor]":
    from . import swiglu

    return [swiglu(*x["hidden"].detach().view(12, 8).chunk(2, -1))]


def _sample_tokens(x: Inputs) -> "list[Tensor]":
    import torch

    from . import sample_tokens

    found = []
    cases: list[dict[str, Any]] = [{}, {"top_k": 20, "top_p": 0.9, "min_p": 0.01}]
    for options in cases:
        keys = torch.arange(0, 400, 100, device=x["logits"].device)
        drawn = sample_tokens(x["logits"][:, 0], keys, keys, temperature=0.9, **options)
        found += [drawn.token_ids.double(), drawn.logps.double(), drawn.full_logps.double()]
    return found


def _gumbel_noise(x: Inputs) -> "list[Tensor]":
    from . import gumbel_noise

    ids = x["token_ids"].view(12)
    return [gumbel_noise(ids, ids + 1, 40)]


def _gradient(x: "Tensor") -> "Tensor":
    assert x.grad is not None
    return x.grad


FUNCTIONS: dict[str, Callable[[Inputs], "list[Tensor]"]] = {
    "group_advantages": _advantages,
    "grpo_loss": _grpo_loss("token"),
    "grpo_loss, sequence level": _grpo_loss("sequence"),
    "linear_grpo_loss": _linear_grpo_loss,
    "selective_log_softmax": _selective_log_softmax,
    "linear_logps": _linear_logps,
    "decode_attention": _decode_attention,
    "rope_and_store": _rope_and_store,
    "add_rms_norm": _add_rms_norm,
    "swiglu": _swiglu,
    "sample_tokens": _sample_tokens,
    "gumbel_noise": _gumbel_noise,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
