"""An update on fake CUDA tensors: which device and dtype everything has, without a GPU and without a number.

Fake tensors refuse to mix devices as real ones do, so these tests see what was created on the CPU and meant for the
GPU. They run the torch path of the losses: Triton cannot be launched on them. Nor does autograd go backward on a GPU
that is not there: for that the device "meta", which may not be mixed with the CPU either, stands in.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from trainer_toys import build_model, build_tokenizer, make_config, problem

from fastr1.config import loss_options
from fastr1.evaluation.multiple_choice import CONTROLS
from fastr1.models.tinyllava import TinyLlavaProcessor, TinyLlavaVideo
from fastr1.reporting.sampler_gap import SamplerGap
from fastr1.reporting.statistics import TokenSums
from fastr1.reporting.timing import PhaseTimer
from fastr1.rollout import SamplingParams, eager
from fastr1.rollout.noise import completion_keys
from fastr1.schema import Batch, Rollout, Sample, Scored, SftSample, Update
from fastr1.training.grpo import GRPOTrainer
from fastr1.training.loop import TrainingRun
from fastr1.training.passes import plan_steps
from fastr1.training.sft import SftTrainer
from fastr1.training.visual import VisualTokens
from fastr1.video import preprocess_frames, resize_products

GPU, META = torch.device("cuda", 0), torch.device("meta")
NUM_PROMPTS, GROUP, NUM_FRAMES = 2, 3, 4


class Numbers:
    """What a tensor on the GPU would hold, were there one."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape

    def item(self) -> float:
        return 2.0

    def tolist(self) -> Any:
        return [2.0, 1.0] if len(self.shape) == 1 else [[2.0, 1.0]] * self.shape[0]


class FakeDistributed:
    """Verbs of `DistributedModel` in one process on a GPU that is not there."""

    rank, world_size, learning_rate = 0, 1, 1e-3

    def __init__(self, model: TinyLlavaVideo, device: torch.device) -> None:
        self.model, self.device = model, device

    def __call__(self, compute: Any) -> Any:
        outputs = self.model(compute)
        assert all(x.device == self.device for x in tree_leaves(outputs) if isinstance(x, torch.Tensor))
        return outputs

    def backward(self, loss: torch.Tensor) -> None:
        assert (loss.device, loss.shape, loss.requires_grad) == (self.device, (), True)
        if self.device == META:
            loss.backward()

    def backward_from(self, outputs: Any, grads: Any) -> None:
        for output, grad in zip(outputs, grads, strict=True):
            assert (output.device, output.shape) == (grad.device, grad.shape) == (self.device, output.shape)
        if self.device == META:
            torch.autograd.backward(outputs, grads)

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]

    def step(self) -> float:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if self.device == META:
            assert {None if p.grad is None else (p.grad.device, p.grad.dtype) for p in trained} == {
                (META, self.model.dtype)
            }
        return 1.0

    def sum_across_ranks(self, tensor: torch.Tensor) -> Numbers:
        return Numbers(tensor.shape)

    def gathered_parameters(self) -> Any:
        return nullcontext()


@pytest.fixture(autouse=True)
def _guard_of_a_gpu() -> Iterator[None]:
    """A torch without CUDA has nothing that switches between GPUs, and indexing asks for it; the one of the device
    "meta" does nothing, which is right here."""
    path = Path(torch.__file__).parent / "lib" / "libc10.so"
    if not path.exists():
        pytest.skip("knows torch on Linux only")
    library = ctypes.CDLL(str(path))
    guards = (ctypes.c_void_p * 15).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[1]
    guards[1] = before or guards[14]
    yield
    guards[1] = before


def move(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """As `load_model` does: parameters in `dtype`, buffers as they are. Tied parameters stay tied."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, x in module._parameters.items():
            if x is not None and id(x) not in moved:
                moved[id(x)] = nn.Parameter(torch.zeros(x.shape, dtype=dtype, device=device), x.requires_grad)
            module._parameters[name] = None if x is None else moved[id(x)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(
    params=[(GPU, torch.bfloat16), (META, torch.bfloat16)],
    ids=["cuda", "meta"],
)
def fake_run(request: pytest.FixtureRequest, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """As much of a `TrainingRun` as an update uses; inside, every new tensor is fake."""
    device, dtype = request.param
    model = build_model(tokenizer)
    processor = TinyLlavaProcessor(tokenizer, model.config)
    prompts = [processor.prompt_ids(problem(i), instruction="Think.", origin="toy") for i in range(NUM_PROMPTS)]
    examples = [processor.conversation_ids(problem(i), "A. " * (i + 1), origin="toy") for i in range(NUM_PROMPTS)]
    place = {len(ids): ids.tolist().index(-200) for ids in [*prompts, *(prompt for prompt, _ in examples)]}
    monkeypatch.setattr("fastr1_kernels.dispatch._runs_triton", lambda x: False)
    dense = {GPU: "efficient", META: "sdpa"}[device]  # choosing would ask the GPU what it can do
    monkeypatch.setattr("fastr1.models.family.choose_packed_backend", lambda *_: dense)
    if device == GPU:  # the linear loss differentiates in its forward pass
        monkeypatch.setattr(torch.autograd, "grad", lambda _, inputs, __: [torch.zeros_like(x) for x in inputs])
    with FakeTensorMode(allow_non_fake_inputs=device == META) as mode:
        # The place of the video in a prompt is a value, which fake tensors lack.
        found = SimpleNamespace(flatten=lambda: found, tolist=lambda: [found.place])

        def nonzero(x: torch.Tensor) -> Any:
            found.place = place[len(x)]
            return found

        monkeypatch.setattr(torch.Tensor, "nonzero", nonzero)
        move(model, device, dtype)
        model.freeze(("vision_tower",))
        config = make_config(Path("none"), Path("none"), grpo__num_generations=GROUP, grpo__beta=0.1)
        run = SimpleNamespace(
            config=config,
            model=model,
            processor=processor,
            distributed=FakeDistributed(model, device),
            device=device,
            timer=PhaseTimer("cpu"),
            samples=[SftSample(str(i), problem(i), "A.", Path("none.mp4"), "toy") for i in range(NUM_PROMPTS)],
            prompts=[mode.from_tensor(ids) for ids in prompts],
            tokens=[(mode.from_tensor(prompt), mode.from_tensor(answer)) for prompt, answer in examples],
        )
        run.encode = lambda pixels: TrainingRun.encode(run, pixels)  # type: ignore[arg-type]
        run.fill = lambda pixels: TrainingRun.fill(run, pixels)  # type: ignore[arg-type]
        yield run


def pixels(run: Any) -> torch.Tensor:
    return torch.zeros(NUM_FRAMES, 3, 28, 28, device=run.device)


def update_of(run: Any) -> Update[Any]:
    """The second video could not be decoded."""
    places = list(range(NUM_PROMPTS))
    return Update(1, run.samples, places, places, [pixels(run), *[None] * (NUM_PROMPTS - 1)])


def test_supervised_step(fake_run: Any) -> None:
    trainer = SftTrainer.__new__(SftTrainer)
    trainer.run, trainer.distributed = fake_run, fake_run.distributed
    metrics, _ = trainer.step(update_of(fake_run))
    assert {"loss", "num_tokens", "grad_norm"} <= set(metrics)


def grpo_trainer(run: Any, **changes: Any) -> GRPOTrainer:
    run.config = make_config(
        Path("none"), Path("none"), **{"grpo__num_generations": GROUP, "grpo__beta": 0.1, **changes}
    )
    trainer = GRPOTrainer.__new__(GRPOTrainer)
    trainer.run, trainer.config, trainer.grpo = run, run.config, run.config.grpo
    trainer.distributed, trainer.timer, trainer.reference = run.distributed, run.timer, run.model
    trainer.loss_options, trainer.check_values = loss_options(run.config.grpo), False
    return trainer


def batch_of(run: Any, visual: VisualTokens) -> Batch:
    """As `_roll_out` and `_score` leave it: ids and advantages on the GPU, what counts and its lengths on the CPU."""
    rows, length = NUM_PROMPTS * GROUP, 5
    mask = torch.ones(rows, length, dtype=torch.bool, device=run.device)
    ids = torch.zeros(rows, length, dtype=torch.long, device=run.device)
    logps = torch.zeros(rows, length, device=run.device)
    rollout = Rollout(ids, mask, logps, logps, mask[:, 0], [""] * rows)
    prompts = [ids.to(run.device) for ids in run.prompts]
    counted = [True] * GROUP + [False] * (rows - GROUP)
    return Batch(
        samples=[Sample(str(i), problem(i), "ABC", "A", Path("none.mp4"), "toy") for i in range(NUM_PROMPTS)],
        prompt_ids=prompts,
        prompt_lengths=run.model.prompt_lengths(prompts, visual.detached),
        pixel_shapes=[(NUM_FRAMES, 3, 28, 28)] * NUM_PROMPTS,
        is_valid=[True, False],
        rollout=rollout,
        lengths=[length] * rows,
        scored=Scored([0.0] * rows, {}),
        advantages=torch.zeros(rows, device=run.device),
        is_counted=counted,
        has_signal=counted,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"grpo__loss_type": "dapo"},
        {"grpo__loss_type": "grpo", "grpo__entropy_coef": 0.1, "grpo__importance_sampling_level": "sequence"},
        {"grpo__loss_type": "dr_grpo", "model__gradient_checkpointing": True},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_grpo_reference_loss_and_backward(fake_run: Any, changes: dict[str, Any]) -> None:
    trainer = grpo_trainer(fake_run, optim__per_device_train_batch_size=1, **changes)
    visual = VisualTokens(fake_run.distributed, fake_run.encode(fake_run.fill([pixels(fake_run), None])))
    batch = batch_of(fake_run, visual)
    steps = plan_steps(batch, fake_run.distributed, prompts_per_step=NUM_PROMPTS, max_tokens=1000)
    batch.ref_logps = trainer._compute_logps(fake_run.model, batch, steps, visual.detached)
    assert batch.ref_logps.device == fake_run.device
    sums, gap = TokenSums(), SamplerGap(fake_run.device)
    trainer._accumulate_gradients(batch, steps[0], visual, sums, gap, share=1.0)
    fake_run.distributed.step()
    assert "loss" in sums.means(fake_run.distributed)
    assert gap._largest.device == fake_run.device


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_draw(fake_run: Any, temperature: float) -> None:
    model, params = fake_run.model, SamplingParams(1, temperature, top_k=5, top_p=0.9)
    prompts = [ids.to(fake_run.device) for ids in fake_run.prompts]
    with torch.no_grad():
        embeds, mask = model.embed_prompts(
            prompts, model.visual_tokens(fake_run.encode(fake_run.fill([pixels(fake_run), None])))
        )
        _, hidden = model.prefill(embeds, mask, GROUP)
        keys = completion_keys(0, range(NUM_PROMPTS), GROUP).to(fake_run.device)
        logits = model.project(hidden)[:, -1].float()
        media = torch.tensor([1], device=fake_run.device)
        token, *logps = eager._draw(logits, media, params, keys, 0)
    assert token.device == fake_run.device
    assert [(x.device, x.dtype) for x in logps] == [(fake_run.device, torch.float32)] * 2


def test_frames_and_controls_stay_on_their_device(fake_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = resize_products._tables_of_doubles.__wrapped__
    monkeypatch.setattr(resize_products, "_tables_of_doubles", tables)  # no fake table may stay behind
    frames = torch.zeros(NUM_FRAMES, 3, 48, 64, dtype=torch.uint8, device=fake_run.device)
    shown = preprocess_frames(frames, height=28, width=28)
    assert (shown.device, shown.dtype, shown.shape) == (fake_run.device, torch.float32, (NUM_FRAMES, 3, 28, 28))
    for control in CONTROLS.values():
        assert control(shown).device == fake_run.device


def test_a_count_on_another_device_than_its_sum_is_refused() -> None:
    """By rule, because a stack of the two passes on fake tensors where it fails on a GPU."""
    sums = TokenSums()
    with FakeTensorMode():
        total, count = torch.zeros((), device=GPU), torch.zeros(())
        with pytest.raises(ValueError, match=r"loss.*cuda:0.*cpu"):
            sums.add({"loss": (total, count)})
