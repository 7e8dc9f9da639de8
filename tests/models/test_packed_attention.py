"""Packed attention by every backend: values, gradients, cost, and which backend is chosen."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import packed_toys
import pytest
import torch
from conftest import ON_GPU
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fastr1.config import ConfigError
from fastr1.models import packed_attention as module
from fastr1.models.packed_attention import choose_packed_backend, packed_attention, visible
from fastr1.models.packed_backends.batches import PaddedBatch, RunBatch, batches
from fastr1.models.packed_layout import PackedLayout

CPU = torch.device("cpu")
ATEN = torch.ops.aten
FORWARD = ATEN._scaled_dot_product_flash_attention_for_cpu
BACKWARD = ATEN._scaled_dot_product_flash_attention_for_cpu_backward
LAYOUTS = {
    "ragged": PackedLayout([5, 37, 37, 1], [[3, 0, 17], [0], [16, 16], [9, 2, 33]]),
    "one-each": PackedLayout([7, 4], [[5], [1]]),
    "long": PackedLayout([140, 9], [[130, 3], [129, 129]]),
    "no-inputs": PackedLayout([6, 2], [[0, 0], [0]]),
    "uneven-groups": PackedLayout([6, 8, 2], [[], [4], [2, 2, 2]]),
}


def run(
    layout: PackedLayout,
    backend: str,
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[torch.Tensor]:
    """The output and the gradients of query, key and value, in the dtype they have."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, layout.num_tokens, h, head_dim) for h in (heads[0], heads[1], heads[1], heads[0])]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]
    inputs = [x.transpose(1, 2).requires_grad_() for x in drawn[:3]]
    output = packed_attention(*inputs, layout, 0.7, backend)
    return [output.detach(), *torch.autograd.grad(output, inputs, drawn[3])]


def test_the_oracle_sees_what_it_must() -> None:
    layout = PackedLayout([2, 1], [[2, 0], [1]])
    assert visible(layout, CPU).int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [0, 0, 1, 0, 0, 1],
    ]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=lambda heads: f"{heads[0]}over{heads[1]}")
@pytest.mark.parametrize("name", LAYOUTS)
def test_sdpa_equals_the_oracle(name: str, heads: tuple[int, int]) -> None:
    for got, expected in zip(*(run(LAYOUTS[name], b, heads=heads) for b in ("sdpa", "eager")), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_sdpa_in_half_precision_is_as_near_as_half_precision_is() -> None:
    layout = LAYOUTS["ragged"]
    exact = run(layout, "eager", dtype=torch.float64)
    errors = [
        [(x.double() - y).abs().max().item() for x, y in zip(run(layout, b, dtype=torch.bfloat16), exact, strict=True)]
        for b in ("sdpa", "eager")
    ]
    assert all(ours < 2 * plain for ours, plain in zip(*errors, strict=True)), errors


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("backend", packed_toys.STAND_INS)
def test_flash_attn_is_called_as_its_signatures_say(monkeypatch: pytest.MonkeyPatch, backend: str, name: str) -> None:
    packed_toys.install(monkeypatch, backend)
    # Heads of 6 numbers are padded to 8, which these libraries want.
    options: dict[str, Any] = {"head_dim": 6, "dtype": torch.float64}
    for got, expected in zip(*(run(LAYOUTS[name], b, **options) for b in (backend, "eager")), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_gradients_equal_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    packed_toys.install(monkeypatch, "flash_attn_2")
    layout = PackedLayout([2, 3], [[2, 0], [1, 2]])
    torch.manual_seed(0)
    inputs = [torch.randn(1, h, layout.num_tokens, 8, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1)]
    assert torch.autograd.gradcheck(lambda *x: packed_attention(*x, layout, 0.5, "flash_attn_2"), inputs)


def test_tensors_of_another_layout_are_refused() -> None:
    x = torch.zeros(1, 2, 5, 8)
    with pytest.raises(ValueError, match=r"\(1, 2, 5, 8\) for a layout of 7 tokens"):
        packed_attention(x, x, x, PackedLayout([4], [[3]]), 1.0, "sdpa")


def test_flops_equal_the_formula() -> None:
    layout, (H, d) = LAYOUTS["long"], (4, 8)
    count = {FORWARD: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    count[BACKWARD] = lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v)
    with FlopCounterMode(display=False, custom_mapping=count) as counter:
        run(layout, "sdpa", heads=(H, 2), head_dim=d)
    # Prompts of 140 and 9 tokens, the short one computed as 16 as is the completion of 3; see the module.
    squares = 140**2 + 16**2 + 130**2 + 16**2 + 129**2 + 129**2
    prefixes = 140 * (130 + 3) + 9 * (129 + 129)
    assert counter.get_total_flops() == 3.5 * 4 * H * d * (squares + prefixes)


def test_only_short_segments_of_unequal_lengths_are_padded() -> None:
    layout = PackedLayout([5, 5, 140], [[3, 17, 17], [4], [129, 130]])
    made = batches(layout.causal, CPU)
    padded = [batch for batch in made if isinstance(batch, PaddedBatch)]
    assert [(batch.shape, len(batch.rows)) for batch in padded] == [((4, 16), 5 + 5 + 3 + 4)]
    runs = [batch.run for batch in made if isinstance(batch, RunBatch)]
    assert sorted((run.num_segments, run.query_length) for run in runs) == [(1, 129), (1, 130), (1, 140), (2, 17)]
    assert all(isinstance(batch, RunBatch) for batch in batches(layout.prefix, CPU))


class Calls(TorchDispatchMode):
    """Keeps the arguments of the calls of the kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Tensor, ...]] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is FORWARD and not any(args[4:]):  # not causal
            self.calls.append(args[:3])
        out = func(*args, **(kwargs or {}))
        self.largest = max(
            [self.largest, *(x.numel() for x in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(x))]
        )
        return out


def test_keys_of_a_prompt_are_read_once_and_never_copied() -> None:
    layout = PackedLayout([30, 30, 40], [[20] * 8, [3] * 8, [7, 9]])
    x = torch.randn(1, layout.num_tokens, 2, 8).transpose(1, 2)
    with Calls() as mode:
        packed_attention(torch.randn(1, 4, layout.num_tokens, 8), x, x, layout, 1.0, "sdpa")
    assert sum(k.shape[0] * k.shape[2] for _, k, _ in mode.calls) == layout.num_prompt_tokens
    for _, *shared in mode.calls:
        assert all(k.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for k in shared)
    assert mode.largest < layout.num_tokens**2


def test_auto_is_sdpa_on_a_cpu_and_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_logged", set())
    with caplog.at_level(logging.INFO):
        assert choose_packed_backend("auto", CPU, torch.float32) == "sdpa"
        assert choose_packed_backend("sdpa", CPU, torch.bfloat16) == "sdpa"
    assert [record.getMessage() for record in caplog.records] == ["packed attention: sdpa"]
    assert choose_packed_backend("eager", CPU, torch.float32) == "eager"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("flash", "packed_attn_implementation is 'flash'; choose from auto, flash_attn"),
        ("flash_attn", "'flash_attn', which needs a GPU of compute capability 8.0.* got float32 on cpu; use 'auto'"),
        ("varlen", "'varlen', which needs a GPU of compute capability 8.0.* got float32 on cpu; use 'auto'"),
    ],
)
def test_what_cannot_run_here_is_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_packed_backend(setting, CPU, torch.float32)


@pytest.mark.parametrize(
    ("capability", "installed", "dtype", "expected"),
    [
        ((9, 0), ["flash_attn_2", "flash_attn_3", "flash_attn_4"], torch.bfloat16, "flash_attn_3"),
        ((9, 0), ["flash_attn_2", "flash_attn_4"], torch.bfloat16, "flash_attn_4"),
        ((10, 0), ["flash_attn_2", "flash_attn_3", "flash_attn_4"], torch.bfloat16, "flash_attn_4"),
        ((8, 6), ["flash_attn_2", "flash_attn_3", "flash_attn_4"], torch.bfloat16, "flash_attn_2"),
        ((8, 6), ["flash_attn_3"], torch.bfloat16, "varlen"),
        ((9, 0), ["flash_attn_2"], torch.float32, "efficient"),
        ((7, 5), ["flash_attn_2"], torch.float16, "efficient"),
    ],
)
def test_auto_on_a_gpu_takes_the_best_that_is_there(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    installed: list[str],
    dtype: torch.dtype,
    expected: str,
) -> None:
    for backend in installed:
        packed_toys.install(monkeypatch, backend)
    distributions = [module._FLASH_ATTN[backend][0] for backend in installed]
    monkeypatch.setattr(module, "_is_installed", distributions.__contains__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_packed_backend("auto", torch.device("cuda"), dtype) == expected


@pytest.fixture
def distributions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder of packages on the way of imports, for a GPU of compute capability 9.0."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.syspath_prepend(tmp_path)
    module._is_installed.cache_clear()
    yield tmp_path
    module._is_installed.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        del sys.modules[name]


def write_flash_attn_2(folder: Path, interface: str) -> None:
    """As its wheel lies in site-packages, with the unfinished version 4 that it holds."""
    (folder / "flash_attn-2.8.3.dist-info").mkdir()
    (folder / "flash_attn-2.8.3.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: flash_attn\nVersion: 2.8.3\n"
    )
    (folder / "flash_attn" / "cute").mkdir(parents=True)
    for name in ("__init__.py", "cute/__init__.py", "cute/interface.py"):
        (folder / "flash_attn" / name).write_text("")
    (folder / "flash_attn" / "flash_attn_interface.py").write_text(interface)


def test_an_early_version_4_inside_version_2_is_not_taken_for_version_4(distributions: Path) -> None:
    write_flash_attn_2(distributions, "")
    assert choose_packed_backend("auto", torch.device("cuda"), torch.bfloat16) == "flash_attn_2"


def test_a_flash_attn_of_another_torch_is_refused_before_anything_is_built(distributions: Path) -> None:
    write_flash_attn_2(distributions, "raise ImportError('undefined symbol: _ZN3c105ErrorC2')")
    with pytest.raises(ConfigError, match=r"flash_attn_interface cannot be imported \(undefined symbol.*'varlen'"):
        choose_packed_backend("auto", torch.device("cuda"), torch.bfloat16)
    assert choose_packed_backend("varlen", torch.device("cuda"), torch.bfloat16) == "varlen"


def test_forced_flash_attn_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_is_installed", lambda name: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ConfigError, match="needs a flash-attn with kernels for this GPU, and none is installed"):
        choose_packed_backend("flash_attn", torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=lambda heads: f"{heads[0]}over{heads[1]}")
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("backend", ["varlen", "efficient"])
def test_kernels_of_torch_for_cuda_are_called_as_their_schemas_say(
    monkeypatch: pytest.MonkeyPatch, backend: str, name: str, heads: tuple[int, int]
) -> None:
    for attribute, function in packed_toys.kernels(backend).items():
        monkeypatch.setattr(module.BACKENDS[backend], attribute, function)
    for got, expected in zip(*(run(LAYOUTS[name], b, heads=heads) for b in (backend, "eager")), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@ON_GPU[0]
@ON_GPU[1]
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=lambda heads: f"{heads[0]}over{heads[1]}")
@pytest.mark.parametrize("head_dim", [64, 20])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(
    ("setting", "dtype"),
    [("flash_attn", torch.bfloat16), ("varlen", torch.bfloat16), ("sdpa", torch.bfloat16), ("sdpa", torch.float32)],
)
def test_gpu_backends_equal_the_oracle(
    setting: str, dtype: torch.dtype, name: str, head_dim: int, heads: tuple[int, int]
) -> None:
    try:
        backend = choose_packed_backend(setting, torch.device("cuda"), dtype)
    except ConfigError as error:
        pytest.skip(str(error))
    options: dict[str, Any] = {"heads": heads, "head_dim": head_dim, "device": "cuda"}
    got = run(LAYOUTS[name], backend, dtype=dtype, **options)
    plain = run(LAYOUTS[name], "eager", dtype=dtype, **options)
    exact = run(LAYOUTS[name], "eager", dtype=torch.float64, **options)
    for ours, yardstick, truth in zip(got, plain, exact, strict=True):
        allowed = 3 * (yardstick.double() - truth).abs().max() + 1e-5
        assert (ours.double() - truth).abs().max() <= allowed
