"""Decoding: the right frames, the same ones from both decoders, and refusal of what is not a video."""

import logging
import os
import re
import shutil
import struct
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.frame import PictureType

from fastr1.schema import DataError
from fastr1.video import (
    BackendError,
    VideoError,
    decoders,
    describe_backend,
    load_clip,
    pyav_backend,
    select_indices,
    torchcodec_backend,
)

ROOT = Path(__file__).resolve().parents[2]
WIDTH, HEIGHT, NUM_FRAMES, RATE = 64, 48, 40, 10


def has_torchcodec():
    if torchcodec_backend.LINKED_FFMPEG.exists():
        return True  # it was set up here: not loading is a failure, not a reason to skip
    try:
        torchcodec_backend.load_torchcodec()
    except torchcodec_backend.TorchcodecUnavailableError:
        return False
    return True


needs_torchcodec = pytest.mark.skipif(not has_torchcodec(), reason="torchcodec cannot be loaded here")
BACKENDS = ["pyav", pytest.param("torchcodec", marks=needs_torchcodec)]


def numbered_picture(number, width, height):
    """Upper half: the number in black and white stripes, highest bit left. Lower half: colours that move."""
    y, x = np.mgrid[0:height, 0:width]
    picture = np.stack([x * 4 + number * 5, y * 5 + number * 3, x + y + number], -1).astype(np.uint8)
    bits = (number >> (7 - x * 8 // width)) & 1
    picture[: height // 2] = (bits * 255)[: height // 2, :, None]
    return picture


def read_numbers(frames):
    """The numbers written into the frames (F, 3, H, W)."""
    height, width = frames.shape[2:]
    centers = [width * (2 * stripe + 1) // 16 for stripe in range(8)]
    bits = frames[:, 1, height // 4, :][:, centers] > 127
    return (bits.int() * torch.tensor([128, 64, 32, 16, 8, 4, 2, 1])).sum(1).tolist()


def write_video(
    path,
    *,
    num_frames=NUM_FRAMES,
    width=WIDTH,
    height=HEIGHT,
    codec="libx264",
    pix_fmt="yuv420p",
    b_frames=3,
    gop=12,
    times_ms=None,  # None: a constant rate
    colorspace=None,
    color_range=None,
    muxer=None,
    options=None,
):
    with av.open(str(path), "w", format=muxer, options=options or {}) as container:
        stream = container.add_stream(codec, rate=Fraction(RATE))
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, pix_fmt, gop
        stream.codec_context.max_b_frames = b_frames
        stream.codec_context.thread_count = 1
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if colorspace is not None:
            stream.codec_context.colorspace = colorspace
        if color_range is not None:
            stream.codec_context.color_range = color_range
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(numbered_picture(number, width, height), "rgb24")
            if colorspace is not None:
                frame = frame.reformat(format=pix_fmt, dst_colorspace=colorspace)
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def copy_packets(source, target, *, shift_seconds=0.0, skip=0):
    """Rewrite a file without decoding it: all times moved, the first packets left out."""
    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        for packet in list(reader.demux(stream))[skip:]:
            if packet.dts is not None:
                packet.pts += int(shift_seconds / stream.time_base)
                packet.dts += int(shift_seconds / stream.time_base)
                packet.stream = copy
                writer.mux(packet)


def turn(source, target):
    """Mark a file as filmed upright: to be shown turned by a quarter, clockwise."""
    content = bytearray(source.read_bytes())
    matrix = content.index(b"tkhd") + 44
    turned = (0, 1 << 16, 0, -1 << 16, 0, 0, HEIGHT << 16, 0, 1 << 30)
    content[matrix : matrix + 36] = struct.pack(">9i", *turned)
    target.write_bytes(content)


def write_audio(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for start in range(0, 10240, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.rate, frame.pts = 16000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    uneven = np.cumsum([0, *np.random.default_rng(0).choice([33, 40, 100, 250], NUM_FRAMES - 1)]).tolist()
    write_video(folder / "plain.mp4")
    write_video(folder / "no_b_frames.mp4", b_frames=0)
    write_video(folder / "one_key_frame.mp4", gop=1000)
    write_video(folder / "uneven_times.mp4", times_ms=uneven)
    write_video(folder / "uneven_times.mkv", times_ms=uneven)
    write_video(folder / "odd_size.mkv", codec="mpeg4", b_frames=0, width=65, height=49)
    write_video(folder / "one_frame.mp4", num_frames=1)
    write_video(folder / "bt709.mp4", colorspace=1)
    write_video(folder / "full_range.mp4", color_range=2, pix_fmt="yuvj420p")
    write_video(folder / "b_pyramid.mp4", b_frames=7, gop=1000)
    write_video(folder / "mpeg4.mkv", codec="mpeg4")
    write_video(folder / "mpeg2.mp4", codec="mpeg2video")
    write_video(folder / "hevc.mp4", codec="libx265")
    copy_packets(folder / "plain.mp4", folder / "starts_late.mp4", shift_seconds=3.0)
    copy_packets(folder / "plain.mp4", folder / "trimmed.mp4", shift_seconds=-1.0)  # shows frames 10 to 39
    copy_packets(folder / "plain.mp4", folder / "no_first_key_frame.mp4", skip=5)
    turn(folder / "plain.mp4", folder / "turned.mp4")
    write_video(folder / "made_up_times.avi")  # AVI stores no times: not with the B-frames' order
    write_video(folder / "no_times.h264", muxer="h264")
    write_video(folder / "stream.ts")
    return folder


SOUND = [
    "plain.mp4",
    "no_b_frames.mp4",
    "one_key_frame.mp4",
    "uneven_times.mp4",
    "uneven_times.mkv",
    "odd_size.mkv",
    "one_frame.mp4",
    "bt709.mp4",
    "full_range.mp4",
    "starts_late.mp4",
    "trimmed.mp4",
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("num_frames", [1, 7, 16, 64])
def test_frames_are_those_that_the_rule_names(videos, name, backend, num_frames):
    available, first = {"one_frame.mp4": (1, 0), "trimmed.mp4": (30, 10)}.get(name, (NUM_FRAMES, 0))
    clip = load_clip(videos / name, num_frames=num_frames, backend=backend)
    assert clip.indices == tuple(select_indices(available, RATE, num_frames))
    assert read_numbers(clip.frames) == [index + first for index in clip.indices]
    assert clip.frames.dtype == torch.uint8


@needs_torchcodec
@pytest.mark.parametrize("name", [*SOUND, "turned.mp4"])
@pytest.mark.parametrize("num_frames", [-1, 7, NUM_FRAMES])
def test_both_decoders_give_the_same_clip(videos, name, num_frames):
    ours = load_clip(videos / name, num_frames=num_frames, backend="pyav")
    other = load_clip(videos / name, num_frames=num_frames, backend="torchcodec")
    assert ours.frames.shape == other.frames.shape
    assert (ours.frames.int() - other.frames.int()).abs().max() <= 1
    assert ours.indices == other.indices
    np.testing.assert_allclose(ours.timestamps_seconds, other.timestamps_seconds, atol=1e-6)
    assert (ours.source_fps, ours.duration_seconds) == (other.source_fps, other.duration_seconds)
    assert (ours.backend, other.backend) == ("pyav", "torchcodec-cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_rate_duration_and_times_are_those_of_the_file(videos, backend):
    clip = load_clip(videos / "starts_late.mp4", num_frames=3, backend=backend)
    assert clip.source_fps == RATE
    assert clip.duration_seconds == pytest.approx(NUM_FRAMES / RATE)
    assert clip.timestamps_seconds == pytest.approx((3.0, 4.9, 6.9))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_frame_per_second(videos, backend):
    assert load_clip(videos / "plain.mp4", num_frames=-1, backend=backend).indices == (0, 13, 26, 39)
    capped = load_clip(videos / "plain.mp4", num_frames=-1, max_frames=2, backend=backend)
    assert capped.indices == (0, 39)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["plain.mp4", "bt709.mp4", "full_range.mp4"])
def test_colours_are_converted_by_the_files_own_matrix_and_range(videos, backend, name):
    written = torch.from_numpy(numbered_picture(0, WIDTH, HEIGHT)).permute(2, 0, 1).float()
    frame = load_clip(videos / name, num_frames=1, backend=backend).frames[0].float()
    away_from_edges = (frame - written)[:, HEIGHT // 2 + 4 :, :40]
    # A wrong matrix or range shifts the means by more than 5.
    assert away_from_edges.mean(dim=(1, 2)).abs().max() < 2.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_video_filmed_upright_is_turned(videos, backend):
    plain = load_clip(videos / "plain.mp4", num_frames=2, backend=backend).frames
    turned = load_clip(videos / "turned.mp4", num_frames=2, backend=backend).frames
    assert torch.equal(turned, plain.rot90(-1, dims=(2, 3)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_ffmpeg_threads", [0, 3])
def test_threads_do_not_change_a_clip(videos, backend, num_ffmpeg_threads):
    def load(path, threads=1):
        return load_clip(path, num_frames=9, backend=backend, num_ffmpeg_threads=threads).frames

    paths = [videos / name for name in ("plain.mp4", "uneven_times.mp4", "bt709.mp4")] * 4
    alone = [load(path) for path in paths[:3]] * 4
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda path: load(path, num_ffmpeg_threads), paths))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize(
    "name", ["plain.mp4", "one_key_frame.mp4", "b_pyramid.mp4", "mpeg4.mkv", "hevc.mp4", "mpeg2.mp4"]
)
def test_pyav_seeks_to_the_frames_that_it_finds_by_reading_everything(videos, name):
    path = videos / name
    rng = np.random.default_rng(0)
    for count in (1, 2, 5):
        for _ in range(5):
            wanted = sorted(rng.choice(NUM_FRAMES, count, replace=False).tolist())
            with pyav_backend._opened(path) as (container, stream):
                scan = pyav_backend._scan(path, container, stream)
                seeking = pyav_backend._decode_seeking(container, stream, scan, wanted)
            reading = pyav_backend._decode_from_start(path, scan, wanted, 1)
            assert seeking is not None
            assert seeking.keys() == reading.keys() == set(wanted)
            assert all(np.array_equal(seeking[index][1], reading[index][1]) for index in wanted)


@pytest.mark.parametrize(("codec", "share"), [("libx264", 0.7), ("mpeg4", 0.5), ("libx265", 1.0)])
def test_pyav_leaves_out_the_frames_that_nothing_is_predicted_from(tmp_path, codec, share):
    """Where the codec says which those are; HEVC says so for a part of the file only."""
    path = tmp_path / "clip.mp4"
    write_video(path, codec=codec, gop=1000)
    with pyav_backend._opened(path) as (container, stream):
        scan = pyav_backend._scan(path, container, stream)
        container.seek(scan.pts[0], stream=stream)
        decoded = [frame.pts for frame in pyav_backend._decode_sparsely(container, stream, {scan.pts[0], scan.pts[30]})]
    assert {scan.pts[0], scan.pts[30]} <= set(decoded)
    assert len(decoded) <= share * NUM_FRAMES


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_file_that_has_no_b_frames_but_might_is_not_read_twice(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"clip.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"x264-params": "b-adapt=0:bframes=3"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(NUM_FRAMES):
            frame = av.VideoFrame.from_ndarray(numbered_picture(number, WIDTH, HEIGHT), "rgb24")
            frame.pict_type = PictureType.P
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    monkeypatch.setattr(pyav_backend, "_count_by_decoding", None)
    monkeypatch.setattr(pyav_backend, "_decode_from_start", None)
    clip = load_clip(path, num_frames=7, backend="pyav")
    assert read_numbers(clip.frames) == list(clip.indices)


def test_a_seek_that_lands_between_key_frames_is_not_decoded_from(tmp_path):
    """A transport stream has no index, and MPEG-4 decodes from anywhere: to noise."""
    path = tmp_path / "clip.ts"
    write_video(path, codec="mpeg4", gop=1000, num_frames=60, width=320, height=240)
    with pyav_backend._opened(path) as (container, stream):
        scan = pyav_backend._scan(path, container, stream)
        container.seek(scan.pts[0], stream=stream)
        assert not next(container.demux(stream)).is_keyframe, "this file does not show the case"
        assert pyav_backend._decode_seeking(container, stream, scan, [30, 50]) is None
    assert read_numbers(load_clip(path, num_frames=4, backend="pyav").frames) == [0, 19, 39, 59]


@pytest.mark.parametrize("name", ["made_up_times.avi", "no_times.h264", "stream.ts"])
def test_pyav_numbers_frames_of_files_without_usable_times(videos, name):
    clip = load_clip(videos / name, num_frames=7, backend="pyav")
    assert read_numbers(clip.frames) == list(clip.indices) == [0, 6, 13, 19, 26, 32, 39]


@pytest.mark.parametrize(("name", "codec"), [("clip.flv", "libx264"), ("clip.mpg", "mpeg2video")])
def test_a_stream_that_the_header_does_not_name_is_no_end_of_the_process(tmp_path, name, codec):
    write_video(tmp_path / name, codec=codec)
    code = f"from fastr1.video import load_clip; load_clip({str(tmp_path / name)!r}, num_frames=7)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert read_numbers(load_clip(tmp_path / name, num_frames=7, backend="pyav").frames) == [0, 6, 13, 19, 26, 32, 39]


@needs_torchcodec
@pytest.mark.parametrize("name", ["made_up_times.avi", "stream.ts", "no_first_key_frame.mp4"])
@pytest.mark.parametrize("num_frames", [4, 7, 16])
def test_torchcodec_never_gives_a_neighbour_of_the_frame(videos, name, num_frames):
    with pytest.raises(VideoError, match=re.escape('Try data.backend "pyav"')):
        load_clip(videos / name, num_frames=num_frames, backend="torchcodec")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frame_before_the_first_key_frame_is_refused_and_a_later_one_is_right(videos, backend):
    path = videos / "no_first_key_frame.mp4"  # 35 frames, of which only the last 28 can be decoded
    with pytest.raises(VideoError):
        load_clip(path, num_frames=1, backend=backend)
    with pyav_backend._opened(path) as (container, stream):
        scan = pyav_backend._scan(path, container, stream)
    images = pyav_backend._decode_from_start(path, scan, [0, 20], num_ffmpeg_threads=1)
    assert images.keys() == {20}
    frame = torch.from_numpy(images[20][1].copy()).permute(2, 0, 1)[None]
    last = len(scan.pts) - 1
    assert read_numbers(frame) == [NUM_FRAMES - 1 - (last - 20)]


def broken_file(kind, folder, videos):
    path = folder / f"{kind}.mp4"
    whole = (videos / "plain.mp4").read_bytes()
    if kind == "empty":
        path.touch()
    elif kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "text":
        path.write_text("not a video\n" * 100)
    elif kind == "audio":
        write_audio(path)
    elif kind == "index cut off":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "frames cut off":
        write_video(path, options={"movflags": "faststart"})
        path.write_bytes(path.read_bytes()[:-500])
    elif kind == "frames overwritten":
        start, end = whole.index(b"mdat") + 4, whole.index(b"moov") - 4
        path.write_bytes(whole[:start] + b"\xa5" * (end - start) + whole[end:])
    elif kind == "first key frame missing":
        shutil.copy(videos / "no_first_key_frame.mp4", path)
    return path


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "does not exist"),
        ("empty", "is empty"),
        ("directory", "is not a regular file"),
        ("pipe", "is not a regular file"),
        ("text", "not a readable video .*Invalid data"),
        ("audio", "video stream"),
        ("index cut off", "not a readable video .*Invalid data"),
        ("frames cut off", "not a readable video|cannot be decoded"),
        ("frames overwritten", "not a readable video|cannot be decoded"),
        ("first key frame missing", "other frames than|cannot be decoded"),
    ],
)
def test_what_is_not_a_video_is_refused_with_path_reason_and_remedy(tmp_path, videos, backend, kind, reason):
    path = broken_file(kind, tmp_path, videos)
    with pytest.raises(VideoError, match=reason) as refusal:
        load_clip(path, backend=backend)
    message = str(refusal.value)
    assert message.startswith(f"{path}: ")
    assert 'Replace the file, remove its rows, or set data.policy to "skip".' in message
    assert isinstance(refusal.value, DataError)
    assert refusal.value.path == path


def test_unreadable_file_is_refused(tmp_path, videos):
    path = tmp_path / "locked.mp4"
    shutil.copy(videos / "plain.mp4", path)
    path.chmod(0)
    is_root = os.geteuid() == 0  # root may read everything: be nobody for a moment
    if is_root:
        os.seteuid(65534)
    try:
        with pytest.raises(VideoError, match=r"cannot be read \(Permission denied\).*permissions"):
            load_clip(path)
    finally:
        if is_root:
            os.seteuid(0)


def test_relative_path_with_a_colon_is_a_file(tmp_path, videos, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(videos / "plain.mp4", tmp_path / "concat:x.mp4")
    assert read_numbers(load_clip("concat:x.mp4", num_frames=2).frames) == [0, 39]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"backend": "decord"}, "data.backend is 'decord'; choose from auto, torchcodec, pyav"),
        ({"num_frames": 0}, "num_frames must be at least 1, or -1 .*got 0"),
        ({"num_frames": -1, "max_frames": 0}, "max_frames must be at least 1"),
        ({"num_ffmpeg_threads": -1}, "num_ffmpeg_threads must be at least 0, got -1"),
    ],
)
def test_bad_options_are_refused_and_are_not_the_videos_fault(videos, options, named):
    with pytest.raises(ValueError, match=named) as refusal:
        load_clip(videos / "plain.mp4", **options)
    assert not isinstance(refusal.value, VideoError)


@pytest.fixture
def no_torchcodec(monkeypatch):
    monkeypatch.setattr(torchcodec_backend, "_load_result", "libavutil.so.59 not found")
    decoders._backend_module.cache_clear()
    yield
    decoders._backend_module.cache_clear()


def test_auto_does_without_torchcodec_on_a_gpu_and_says_why_once(no_torchcodec, caplog):
    with caplog.at_level(logging.WARNING):
        modules = [decoders._backend_module("auto", "cuda") for _ in range(3)]
    assert modules == [pyav_backend] * 3
    assert [record.getMessage().count("libavutil.so.59 not found") for record in caplog.records] == [1]
    assert describe_backend(device="cuda") == f"pyav {av.__version__}; no torchcodec: libavutil.so.59 not found"


def test_auto_on_the_cpu_is_pyav_and_misses_nothing(videos, no_torchcodec, caplog):
    with caplog.at_level(logging.WARNING):
        clip = load_clip(videos / "plain.mp4", num_frames=2)
    assert (clip.backend, caplog.records) == ("pyav", [])
    assert describe_backend(device="cpu") == f"pyav {av.__version__}"


def test_forced_torchcodec_that_cannot_be_loaded_is_an_error_with_remedies(videos, no_torchcodec):
    with pytest.raises(BackendError, match=r"libavutil\.so\.59 not found.*scripts/link_ffmpeg\.py.*pyav"):
        load_clip(videos / "plain.mp4", backend="torchcodec")


def test_torchcodec_that_imports_without_ffmpeg_counts_as_not_loadable(monkeypatch, tmp_path):
    said = """FFmpeg version 8:
Traceback (most recent call last):
OSError: libavutil.so.60: cannot open shared object file: No such file or directory
OSError: Could not load this library: libtorchcodec_core8.so
FFmpeg version 7:
OSError: libcudart.so.13: wrong ELF class"""

    def fail(source):
        raise RuntimeError(said)

    package, decoders = types.ModuleType("torchcodec"), types.ModuleType("torchcodec.decoders")
    package.decoders, package.ffmpeg_major_version, decoders.VideoDecoder = decoders, None, fail
    monkeypatch.setitem(sys.modules, "torchcodec", package)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    monkeypatch.setattr(torchcodec_backend, "LINKED_FFMPEG", tmp_path)
    monkeypatch.setattr(torchcodec_backend, "_load_result", None)
    with pytest.raises(ImportError) as reason:
        torchcodec_backend.load_torchcodec()
    assert str(reason.value) == "libavutil.so.60 not found; libcudart.so.13: wrong ELF class"


@needs_torchcodec
def test_torchcodec_is_preferred_on_a_gpu():
    assert re.fullmatch(r"torchcodec \S+ \(FFmpeg \d+\)", describe_backend(device="cuda"))
    assert describe_backend("pyav", "cuda").startswith("pyav")
    assert describe_backend("torchcodec", "cpu").startswith("torchcodec")


BARE_PROCESS = """
import sys, threading
from pathlib import Path
from fastr1.video import load_clip, torchcodec_backend
torchcodec_backend.LINKED_FFMPEG = Path(sys.argv[1])
video, folder, av_first = Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "av first"
sys.path.insert(0, "tests/video")
from test_decoders import read_numbers, write_video
if av_first:
    write_video(folder / "before.mp4")
assert read_numbers(load_clip(video, num_frames=4, backend="torchcodec").frames) == [0, 13, 26, 39]
write_video(folder / "after.mp4")
for backend in ("pyav", "torchcodec", "pyav"):
    assert read_numbers(load_clip(folder / "after.mp4", num_frames=4, backend=backend).frames) == [0, 13, 26, 39]
print("both work")
"""


@pytest.fixture(scope="session")
def linked_ffmpeg(tmp_path_factory):
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import link_ffmpeg
    finally:
        sys.path.pop(0)
    if not sys.platform.startswith("linux") or not has_torchcodec():
        pytest.skip("needs Linux and a torchcodec that loads")
    try:
        source, patchelf = link_ffmpeg.find_wheel_libraries(), link_ffmpeg.find_patchelf()
    except SystemExit as error:
        pytest.skip(str(error))
    destination = tmp_path_factory.mktemp("environment") / "lib" / "fastr1-ffmpeg"
    link_ffmpeg.link(source, destination, patchelf)
    link_ffmpeg.link(source, destination, patchelf)  # a second time replaces the first
    return destination


def test_linked_ffmpeg_needs_nothing_outside_its_folder(linked_ffmpeg):
    load = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"
    [library] = linked_ffmpeg.glob("libavdevice.so.*")
    command = [sys.executable, "-S", "-c", load, str(library)]
    done = subprocess.run(command, env={}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("order", ["torchcodec first", "av first"])
def test_linked_ffmpeg_serves_torchcodec_beside_pyav_in_a_bare_environment(linked_ffmpeg, videos, tmp_path, order):
    arguments = [str(linked_ffmpeg), str(videos / "plain.mp4"), str(tmp_path), order]
    command = [sys.executable, "-c", BARE_PROCESS, *arguments]
    done = subprocess.run(command, cwd=ROOT, env={"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "both work"), done.stderr


@pytest.mark.gpu
@needs_torchcodec
def test_cuda_clip_lies_on_the_gpu_and_shows_the_cpus_frames(videos):
    on_cpu = load_clip(videos / "plain.mp4", num_frames=7)
    on_gpu = load_clip(videos / "plain.mp4", num_frames=7, device="cuda")
    assert on_gpu.frames.is_cuda
    assert on_gpu.backend in ("torchcodec-cuda", "torchcodec-cpu")
    assert on_gpu.indices == on_cpu.indices
    assert read_numbers(on_gpu.frames.cpu()) == list(on_gpu.indices)
    assert (on_gpu.frames.cpu().float() - on_cpu.frames.float()).abs().mean() < 4
