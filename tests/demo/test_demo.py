"""Demo scenes, their questions, the data set written from them, and the base model that was taught them."""

from __future__ import annotations

import json
import re
from collections import Counter

import av
import numpy as np
import pytest
import torch

from fastr1.config import RewardConfig
from fastr1.data.conversations import load_conversations
from fastr1.data.questions import load_questions
from fastr1.demo import dataset, digest, pretrain
from fastr1.demo.base import build_model, build_tokenizer
from fastr1.demo.pretrain import IGNORE_INDEX
from fastr1.demo.scenes import COLOURS, COUNTS, DIRECTIONS, FLASH, KINDS, LETTERS, ask, describe, render, sample_scene
from fastr1.rewards.tinyllava_video_r1 import accuracy_reward, format_reward
from fastr1.video import load_clip, uniform_indices


def _scenes(kind: str, count: int = 60):
    rng = np.random.default_rng(7)
    return [sample_scene(rng, kind) for _ in range(count)]


def _answer_from_pixels_of_truth(scene) -> str:
    """The answer worked out again from the tracks and colours alone."""
    if scene.kind == "direction":
        name = scene.question.split()[4]
        shape = next(s for s in scene.shapes if s.name == name)
        step = np.sign(np.round(shape.centres[-1] - shape.centres[0]))
        return next(word for word, way in DIRECTIONS.items() if tuple(step) == way)
    if scene.kind == "order":
        shown = sorted(scene.shapes, key=lambda s: [c is not None for c in s.colours].index(True))
        return shown[{"first": 0, "second": 1, "last": 2}[scene.question.split()[3].rstrip("?")]].name
    if scene.kind == "count":
        shape = next(s for s in scene.shapes if s.name == scene.question.split()[4])
        flashes = [c == FLASH for c in shape.colours]
        return COUNTS[sum(now and not before for before, now in zip([False, *flashes], flashes, strict=False))]
    if scene.kind == "first":
        starts = {}
        for shape in scene.shapes:
            moved = np.abs(shape.centres - shape.centres[0]).sum(1) > 1
            starts[shape.name] = int(moved.argmax()) if moved.any() else 99
        return min(starts, key=starts.__getitem__)
    before = scene.question.split()[4]
    shape = next(s for s in scene.shapes if len(set(s.colours)) == 3)
    return shape.colours[max(i for i, c in enumerate(shape.colours) if c == before) + 1]


@pytest.mark.parametrize("kind", KINDS)
def test_answer_follows_from_the_tracks(kind):
    for scene in _scenes(kind):
        assert _answer_from_pixels_of_truth(scene) == scene.answer


@pytest.mark.parametrize("kind", KINDS)
def test_no_single_moment_gives_the_answer(kind):
    """Two scenes that look the same at one moment can have different answers, at every moment."""
    scenes = _scenes(kind, 400)
    for moment in range(8):
        answers: dict[tuple, set[str]] = {}
        for scene in scenes:
            seen = tuple(sorted((s.colours[moment] or "-") for s in scene.shapes))
            answers.setdefault((scene.question, seen), set()).add(scene.answer)
        assert max(len(found) for found in answers.values()) > 1


def test_options_hold_the_answer_once_behind_its_letter():
    rng = np.random.default_rng(3)
    for kind in KINDS:
        for scene in _scenes(kind, 20):
            question = ask(scene, rng)
            lines = question.problem.splitlines()
            assert lines[1] == "Options:"
            options = dict(line.removesuffix(".").split(". ") for line in lines[2:])
            assert list(options) == list(LETTERS)
            assert len(set(options.values())) == 5
            assert options[question.letter] == scene.answer


def test_caption_names_a_colour_and_a_cell_for_every_visible_shape():
    scene = _scenes("order", 1)[0]
    moments = describe(scene).split(". ")[0].split("; ")
    assert len(moments) == 8
    for i, text in enumerate(moments):
        shown = [s.colours[i] for s in scene.shapes if s.colours[i]]
        assert sorted(text.split()[::2] if shown else []) == sorted(shown)


def test_render_shows_the_colours_where_the_tracks_say():
    rng = np.random.default_rng(0)
    scene = _scenes("direction", 1)[0]
    frames = render(scene, 30, rng)
    at = uniform_indices(30, 8)
    for i, index in enumerate(at):
        for shape in scene.shapes:
            x, y = (shape.centres[i] - 0.2).astype(int)
            patch = frames[index, y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3).mean(0)
            assert np.abs(patch - COLOURS[shape.name]).max() < 40


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    counts = dataset.write_demo_dataset(root, num_train=50, num_test=25, seed=5)
    return root, counts


def test_files_load_and_every_clip_decodes_as_h264(written):
    root, counts = written
    assert counts == {"train.jsonl": 50, "test.jsonl": 25, "coldstart.json": 16}
    samples = [s for split in ("train", "test") for s in load_questions(root / f"{split}.jsonl", root).samples]
    assert len({s.video_path for s in samples}) == 75
    with av.open(str(samples[0].video_path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
    clip = load_clip(samples[0].video_path, num_frames=8)
    assert clip.frames.shape == (8, 3, 96, 96)


def test_letters_and_kinds_are_balanced_and_independent(written):
    root, _ = written
    rows = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    assert set(Counter(row["solution"] for row in rows).values()) == {10}
    assert set(Counter(row["problem_type"][0] for row in rows).values()) == {10}
    for kind in KINDS:
        letters = Counter(row["solution"] for row in rows if row["problem_type"] == [kind])
        assert max(letters.values()) <= 6, (kind, letters)  # of 10: a kind does not give the letter away


def test_no_wording_of_a_question_gives_its_letter_away(tmp_path, monkeypatch):
    """Among questions with the same right option, no letter is right much more often than the others."""
    monkeypatch.setattr(dataset, "write_clip", lambda *args: None)
    monkeypatch.setattr(dataset, "render", lambda *args: None)
    pairs = dataset._write_split(tmp_path, "train", 2000, np.random.default_rng(1))
    by_answer: dict[str, Counter] = {}
    for row, scene in pairs:
        by_answer.setdefault(f"{scene.kind} {scene.answer}", Counter())[row["solution"][8]] += 1
    for answer, letters in by_answer.items():
        assert max(letters.values()) / letters.total() < 0.4, (answer, letters)


def test_cold_start_answers_are_right_and_well_formed(written):
    root, _ = written
    for sample in load_conversations(root / "coldstart.json", root).samples:
        letter = sample.answer.split("<answer> ")[1][0]
        assert accuracy_reward(sample.answer, f"<answer>{letter}</answer>") == 1.0
        assert format_reward(sample.answer, RewardConfig()) > 0.5


def test_same_seed_writes_the_same_data_another_seed_other_data(tmp_path):
    folders = [tmp_path / name for name in ("a", "same", "b")]
    for folder, seed in zip(folders, (5, 5, 6), strict=True):
        dataset.write_demo_dataset(folder, num_train=5, num_test=5, seed=seed)
    for name in ("train.jsonl", "test.jsonl", "coldstart.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() != (folders[2] / name).read_bytes()
    a, same, b = (load_clip(folder / "videos/test/0003.mp4", num_frames=8).frames for folder in folders)
    assert torch.equal(a, same)
    assert not torch.equal(a, b)


@pytest.fixture(scope="module")
def untrained():
    tokenizer = build_tokenizer(0)
    rng = np.random.default_rng(0)
    return build_model(tokenizer, 0), tokenizer, pretrain.ScenePool(6, rng)


def _examples(task, tokenizer, pool, count=12):
    rng = np.random.default_rng(1)
    indices = [i % len(pool.scenes) for i in range(count)]
    return [pretrain.build_example(task, pool.scenes[i], i, tokenizer, rng) for i in indices]


def _learned(example, tokenizer):
    return tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX])


def test_base_never_answers_in_the_tags_of_the_cold_start(untrained):
    _, tokenizer, pool = untrained
    for task in {*pretrain.TASKS, *pretrain.ANSWER_TASKS} - {"markup"}:
        for example in _examples(task, tokenizer, pool):
            assert "<think>" not in _learned(example, tokenizer)
            assert "<answer>" not in _learned(example, tokenizer)
    assert any("<think>" in _learned(example, tokenizer) for example in _examples("markup", tokenizer, pool))


def test_worked_options_teach_every_letter_but_not_what_was_seen(untrained):
    _, tokenizer, pool = untrained
    for example in _examples("options", tokenizer, pool):
        text = tokenizer.decode([i for i in example.input_ids if i >= 0])
        options = dict(re.findall(r"([A-E])\. (\w+)\.", text.split("Options:")[1]))
        answers = re.findall(r"> [^<>]*?(\w+) ([A-E])\. </\w+> <\w+> ([A-E]) </", text)
        assert len(answers) == 3
        for word, letter, repeated in answers:
            assert options[letter] == word
            assert repeated == letter
        assert "The" not in _learned(example, tokenizer)


def test_loss_of_a_mixed_batch_is_that_of_its_samples_one_by_one(untrained):
    model, tokenizer, pool = untrained
    examples = [e for task in ("caption", "sentence", "options", "lookup") for e in _examples(task, tokenizer, pool, 3)]
    total, weights = 0.0, 0.0
    with torch.no_grad():
        for example in examples:
            video = {}
            if example.scene is not None:
                (video[example.scene],) = model.visual_tokens([pool.pixels(example.scene)])
            embeds, labels = pretrain._embed(model, example, video)
            logits = model.project(model.decoder(inputs_embeds=embeds[None]).last_hidden_state[0, :-1])
            weight = (labels[1:] != IGNORE_INDEX).sum().sqrt()
            total += weight * torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=IGNORE_INDEX)
            weights += weight
        together = pretrain.compute_loss(model, examples, pool)
    torch.testing.assert_close(together, total / weights, rtol=1e-5, atol=1e-5)


def test_base_model_belongs_to_its_sources():
    changed = digest.changed_sources()
    assert not changed, digest.explain(changed)


@pytest.mark.parametrize("name", digest.SOURCES)
def test_a_changed_source_is_told_until_the_digest_is_written(tmp_path, name):
    for source in digest.SOURCES:
        (tmp_path / source).write_bytes((digest.DEMO / source).read_bytes())
    assert digest.changed_sources(sources=tmp_path) == []
    with (tmp_path / name).open("a") as file:
        file.write("# another comment\n")
    changed = digest.changed_sources(sources=tmp_path)
    assert changed == [name]
    message = digest.explain(changed)
    assert name in message
    assert "python -m fastr1.demo.pretrain" in message
    assert digest.WRITE_COMMAND in message
    digest.write_digest(tmp_path, tmp_path)
    assert digest.changed_sources(tmp_path, tmp_path) == []
