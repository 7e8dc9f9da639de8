"""Do the tests of the losses see a wrong sign, mask, scale or shift? Run as `make mutants`.

Each mutation changes one expression in a temporary copy of kernels/ and runs the tests that should see it, which have
to fail. Exit 1 where a mutation survives, 2 where the expression to be changed is no longer there (or there twice).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ("tests/losses/test_losses.py", "tests/losses/test_kl.py", "tests/losses/test_loss_table.py")
ROWS = ("tests/losses/test_row_kernels.py", "tests/losses/test_logps.py", "tests/losses/test_loss_kernels.py")
LOSS_KERNEL = ("tests/losses/test_loss_kernels.py", "tests/losses/test_losses.py")
ADVANTAGES = ("tests/losses/test_advantages.py",)
LINEAR = ("tests/losses/test_linear_logps.py", "tests/losses/test_linear_loss.py")
LOGPS = ("tests/losses/test_logps.py", "tests/losses/test_loss_numbers.py", "tests/losses/test_losses.py")
ENTROPY = ("tests/losses/test_entropy.py",)
COMPILED = ("tests/losses/test_compiled.py",)
COMPAT = ("tests/losses/test_compat_liger.py", "tests/losses/test_compat_trl.py", "tests/losses/test_compat_verl.py")


@dataclass(frozen=True)
class Mutation:
    """`places` are (files as a pattern below fastr1_kernels, old text, new text); the first that is found is used."""

    name: str
    tests: tuple[str, ...]
    places: tuple[tuple[str, str, str], ...]
    interpreted: bool = False  # of a kernel: run by Triton's interpreter


def one(
    name: str,
    tests: tuple[str, ...],
    files: str,
    old: str,
    new: str,
    interpreted: bool = False,
    otherwise: tuple[str, str] | None = None,  # texts to use where the old one is not there
) -> Mutation:
    places = ((files, old, new), *([(files, *otherwise)] if otherwise else []))
    return Mutation(name, tests, places, interpreted)


MUTATIONS = (
    # The specification
    one(
        "sign of the clipped objective",
        REFERENCE,
        "reference.py",
        "return -torch.min(bounded",
        "return torch.min(bounded",
    ),
    one("min becomes max", REFERENCE, "reference.py", "-torch.min(bounded", "-torch.max(bounded"),
    one("sign of the KL", REFERENCE, "reference.py", "per_token + options.beta * kl", "per_token - options.beta * kl"),
    one("direction of the KL", REFERENCE, "reference.py", "    q = ref_logps - logps\n", "    q = logps - ref_logps\n"),
    one("k1 with the sign of q", REFERENCE, "reference.py", "return -q\n", "return q\n"),
    one("scale of k2", REFERENCE, "reference.py", "q.square() / 2\n", "q.square()\n"),
    one("direction of the ratio", REFERENCE, "reference.py", "log_ratio = logps - old", "log_ratio = old - logps"),
    one("lower clip", REFERENCE, "reference.py", "return 1 - options.epsilon, ", "return 1 - 2 * options.epsilon, "),
    one("cispo's gradient through the ratio", REFERENCE, "reference.py", "-ratio.detach().clamp(", "-ratio.clamp("),
    one("sapo's scale", REFERENCE, "reference.py", "(4 / temperature)", "(2 / temperature)"),
    one(
        "mask of the loss",
        REFERENCE,
        "reference.py",
        "total = torch.where(mask, per_token, 0.0)",
        "total = per_token",
        otherwise=("return torch.where(mask, per_token, 0.0), metrics", "return per_token, metrics"),
    ),
    one(
        "sequence mean over the padded length",
        REFERENCE,
        "reference.py",
        "total.sum(1) / mask.sum(1).clamp(min=1)",
        "total.mean(1)",
        otherwise=("denominator * num_tokens.clamp(min=1)", "denominator * num_tokens.max()"),
    ),
    one("sampler weight upside down", REFERENCE, "reference.py", "(old - sampler, options", "(sampler - old, options"),
    one(
        "sign of the entropy bonus",
        REFERENCE,
        "reference.py",
        "loss - options.entropy_coef",
        "loss + options.entropy_coef",
        otherwise=("per_token - options.entropy_coef", "per_token + options.entropy_coef"),
    ),
    one(
        "temperature forgotten",
        REFERENCE,
        "reference.py",
        "upcast(logits) / temperature",
        "upcast(logits)",
        otherwise=("upcast(logits) / (temperature", "upcast(logits) / (1.0 if True else temperature"),
    ),
    one(
        "sequence denominator of dapo",
        REFERENCE,
        "options.py",
        '"dapo": Loss(\n            objective="clipped",\n            reduction="tokens"',
        '"dapo": Loss(\n            objective="clipped",\n            reduction="sequence_means"',
    ),
    one(
        "biased deviation",
        ADVANTAGES,
        "torch_advantages.py",
        "add(centred.square()) / (count - 1)",
        "add(centred.square()) / count",
    ),
    one(
        "softcap without its scale",
        LINEAR,
        "reference.py",
        "softcap * torch.tanh(logits / softcap)",
        "torch.tanh(logits / softcap)",
    ),
    # The kernels
    one(
        "sign of the objective's slope",
        LOSS_KERNEL,
        "gpu/**/*.py",
        "-slope * advantage, 0.0)",
        "slope * advantage, 0.0)",
        True,
        otherwise=("tl.where(is_flat, 0.0, -slope * advantage)", "tl.where(is_flat, 0.0, slope * advantage)"),
    ),
    one(
        "dual clip forgotten",
        LOSS_KERNEL,
        "gpu/**/*.py",
        "(unclipped <= clipped) & (ratio <= delta)",
        "(unclipped <= clipped)",
        True,
        otherwise=("(unclipped > clipped) | (ratio > delta)", "(unclipped > clipped)"),
    ),
    one("slope of sapo", LOSS_KERNEL, "gpu/**/*.py", "-4.0 * advantage * sigmoid", "-2.0 * advantage * sigmoid", True),
    one(
        "series of k3",
        ("tests/losses/test_kl.py", *LOSS_KERNEL),
        "gpu/**/*.py",
        "small / 3.0 * series",
        "small / 2.0 * series",
        True,
    ),
    one(
        "sampler weight forgotten in the gradient",
        LOSS_KERNEL,
        "gpu/**/*.py",
        "loss * weight, d_logp * weight",
        "loss * weight, d_logp",
        True,
    ),
    one(
        "last reward of a block forgotten", ADVANTAGES, "gpu/**/*.py", "m_r = o_r < last", "m_r = o_r < last - 1", True
    ),
    one("advantage of another sequence", LOSS_KERNEL, "gpu/**/*.py", "i_b = i_n // T", "i_b = i_n % T", True),
    one(
        "mean of the rewards forgotten",
        ADVANTAGES,
        "gpu/**/*.py",
        "advantage = reward - mean",
        "advantage = reward",
        True,
    ),
    # Rows in plain torch
    one(
        "entropy without its logarithm",
        LOGPS,
        "torch_rows.py",
        "(log_total - moment(shifted, e)",
        "(-moment(shifted, e)",
    ),
    one(
        "log-probability of the largest", LOGPS, "torch_rows.py", "(token - log_total).squeeze", "(-log_total).squeeze"
    ),
    one(
        "temperature squared", LOGPS, "torch_rows.py", "(-g / (temperature * total))", "(-g / (temperature**2 * total))"
    ),
    one("token left out of its gradient", LOGPS, "torch_rows.py", "0), g / temperature)", "0), 0 * g)"),
    one("slope of the entropy", LOGPS, "torch_rows.py", "entropy[number, None] - total.log()", "entropy[number, None]"),
    one("dead rows keep what was there", LOSS_KERNEL, "torch_rows.py", "squeeze(1), 0.0)\n", "squeeze(1)[:0], 0.0)\n"),
    one("rows of another sequence", LOSS_KERNEL, "torch_rows.py", "else pick + first", "else pick"),
    # Inside torch.compile
    one("unit forgotten", COMPILED, "linear_ops.py", "factor = d_loss * unit", "factor = d_loss"),
    one(
        "gradients of another input",
        COMPILED,
        "linear_ops.py",
        "*tensors, entropy, state = ctx",
        "*tensors, state, entropy = ctx",
    ),
    one(
        "metrics in another order",
        COMPILED,
        "linear_ops.py",
        "for i, name in enumerate(names)",
        "for i, name in enumerate(names[::-1])",
    ),
    # The linear head
    one(
        "logits restored without their shift",
        LINEAR,
        "chunk.py",
        "torch.softmax(x[rows], 1, out=x[rows])",
        "x[rows].exp_()",
    ),
    one("only the last chunk trains the head", LINEAR, "head.py", "0.0 if self.is_empty else 1.0", "0.0"),
    one("rows of the head's gradient without their factor", LINEAR, "head.py", "hidden * factor", "hidden * 1"),
    one(
        "entropy summed unasked", ENTROPY, "losses.py", "compute_entropy=arguments.has_entropy", "compute_entropy=True"
    ),
    one("entropy of the rows in a chunk", ENTROPY, "linear.py", "loss.has_entropy)), loss.unit", "True)), loss.unit"),
    one("gradient of a head without rows", LINEAR, "head.py", "self.sums[0].zero_()", "pass"),
    Mutation(
        "gradient of the hidden states",
        LINEAR,
        (
            ("chunked.py", "d_hidden[rows] = d_logits @ weight", "d_hidden[rows] = -(d_logits @ weight)"),
            ("linear.py", "scale = d_loss * unit", "scale = -d_loss * unit"),
        ),
    ),
    Mutation(
        "last row of a chunk forgotten",
        LINEAR,
        (
            ("chunked.py", "slice(start, start + chunk)", "slice(start, start + chunk - 1)"),
            ("linear.py", "[slice(a, b) for a, b in pairwise", "[slice(a, max(b - 1, a)) for a, b in pairwise"),
        ),
    ),
    # Other libraries' signatures
    one("weights of the policy term", COMPAT, "compat/liger.py", "[:, None] * ratio, 0.0)", "[:, None] / ratio, 0.0)"),
    one(
        "num_items_in_batch ignored",
        COMPAT,
        "compat/liger.py",
        "total = torch.full((), float(num_items)",
        "total = torch.full((), 1.0",
    ),
    one(
        "shifted logits",
        COMPAT,
        "compat/liger.py",
        "rows, token_ids = logits[:, :-1]",
        "rows, token_ids = logits[:, 1:]",
    ),
    one(
        "mask of the rows",
        COMPAT,
        "compat/trl.py",
        "torch.where(row_mask, logps, 0.0)",
        "torch.where(~row_mask, logps, 0.0)",
    ),
    one("gradient of gspo", COMPAT, "compat/verl.py", 'if mode == "gspo":  # the value', 'if mode == "":  # the value'),
    one(
        "average over processes",
        COMPAT,
        "compat/verl.py",
        'return "bnpo", 1 / num_processes',
        'return "bnpo", num_processes',
    ),
)


def find(kernels: Path, mutation: Mutation) -> tuple[Path, str, str]:
    """The file and the texts of the first place whose old text is there, once."""
    for pattern, old, new in mutation.places:
        found = [
            path
            for path in sorted(kernels.glob(f"fastr1_kernels/{pattern}"))
            for _ in range(path.read_text().count(old))
        ]
        if len(found) > 1:
            raise LookupError(f"{mutation.name}: {old!r} is there {len(found)} times")
        if found:
            return found[0], old, new
    wanted = " or ".join(f"{old!r} in {pattern}" for pattern, old, _ in mutation.places)
    raise LookupError(f"{mutation.name}: no {wanted}")


def run_tests(kernels: Path, mutation: Mutation) -> subprocess.CompletedProcess[str]:
    paths = [str(kernels), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
    environment["TRITON_INTERPRET"] = "1" if mutation.interpreted else "0"
    options = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    command = [sys.executable, "-m", "pytest", *options, *mutation.tests]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


def is_seen(mutation: Mutation) -> bool:
    """Whether the tests fail: by a failing test, not because they could not run."""
    with tempfile.TemporaryDirectory() as folder:
        kernels = Path(folder) / "kernels"
        shutil.copytree(ROOT / "kernels", kernels, ignore=shutil.ignore_patterns("__pycache__"))
        path, old, new = find(kernels, mutation)
        path.write_text(path.read_text().replace(old, new))
        result = run_tests(kernels, mutation)
    if result.returncode not in (0, 1) or " error" in result.stdout.splitlines()[-1]:
        raise RuntimeError(f"{mutation.name}: the tests did not run\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return result.returncode == 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-k", default="", help="only mutations whose name contains this")
    parser.add_argument("--anchors", action="store_true", help="only look whether every expression is there")
    given = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if given.k in mutation.name]
    gone = []
    for mutation in chosen:
        try:
            find(ROOT / "kernels", mutation)
        except LookupError as error:
            gone.append(str(error))
    if gone:
        print("\n".join(gone), file=sys.stderr)
        return 2
    if given.anchors:
        return 0
    survivors = []
    for mutation in chosen:
        seen = is_seen(mutation)
        print(f"{'seen    ' if seen else 'SURVIVES'}  {mutation.name}", flush=True)
        survivors += [] if seen else [mutation.name]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutations are seen")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
