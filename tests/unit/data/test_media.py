"""Images, videos, sizes and paths: values checked by hand and against the Hugging Face processors."""

import contextlib
import io
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from spatialvlm.data.media import image as image_module
from spatialvlm.data.media.image import decode_image, read_image_header
from spatialvlm.data.media.paths import resolve
from spatialvlm.data.media.plan import MediaHeader, MediaPolicy, plan_media
from spatialvlm.data.media.resize import (
    fit_pixels,
    fit_video_pixels,
    resize,
    split_tiles,
    tile_grid,
)
from spatialvlm.data.media.store import FrameCache, MediaStore
from spatialvlm.data.media.torchcodec import decode_with_torchcodec, load_torchcodec
from spatialvlm.data.media.video import (
    choose_by_rate,
    choose_uniform,
    decode_video,
    list_frames,
    read_video_header,
    times_from_names,
)
from spatialvlm.data.sample import MediaRef
from spatialvlm.errors import ConfigError, MediaError


def encoded(image, fmt="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def exif(orientation):
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def write_video(path, frames, *, fps=4, gop=5, rotation=0, options=None):
    """An H.264 (or mpeg4) file with B-frames whose frame i is a distinct picture."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height = frames[0].shape[1], frames[0].shape[0]
        stream.pix_fmt = "yuv420p"
        stream.gop_size = gop
        stream.max_b_frames = 2
        stream.bit_rate = 4_000_000
        if rotation:
            stream.set_display_rotation(rotation)
        for array in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def ramp(count, height=48, width=64):
    """Pictures whose grey level tells their index."""
    return [np.full((height, width, 3), 8 + 10 * i, dtype=np.uint8) for i in range(count)]


class TestPaths:
    def test_inside(self, tmp_path):
        assert resolve(tmp_path, "a/b", "../c.jpg") == tmp_path.resolve() / "a" / "c.jpg"

    @pytest.mark.parametrize(
        ("path", "says"),
        [
            ("/etc/x", "absolute"),
            ("../../x", "outside"),
            ("https://host/x.jpg", "URL"),
            ("s3://bucket/x", "URL"),
            ("data:image/png;base64,AA", "URL"),
            ("C:\\x", "drive"),
            ("\\\\host\\x", "root"),
            ("a\0b", "NUL"),
            ("x" * 300 + ".png", "longer than file systems allow"),
            ("x/" * 2000, "longer than file systems allow"),
        ],
    )
    def test_refused(self, tmp_path, path, says):
        with pytest.raises(MediaError, match=says) as caught:
            resolve(tmp_path, "a", path)
        assert caught.value.reason == "refused_path"

    def test_symlink_out(self, tmp_path):
        root = tmp_path / "root"
        root.mkdir()
        (tmp_path / "secret.jpg").write_bytes(b"x")
        (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
        with pytest.raises(MediaError, match="allow_outside_root"):
            resolve(root, "", "link.jpg")
        assert resolve(root, "", "link.jpg", allow_outside_root=True).name == "secret.jpg"

    def test_fuzz_never_escapes(self, tmp_path):
        rng = np.random.default_rng(0)
        root = tmp_path / "r"
        (root / "d").mkdir(parents=True)
        (root / "up").symlink_to(tmp_path)
        words = ["..", ".", "d", "up", "x.jpg", "", "~", "d/..", "é"]
        for _ in range(500):
            path = "/".join(rng.choice(words, rng.integers(1, 6)))
            with contextlib.suppress(MediaError):
                assert resolve(root, "d", path).is_relative_to(root.resolve())

    def test_unicode_hint(self, tmp_path):
        (tmp_path / "caf\u00e9.jpg").write_bytes(b"x")
        with pytest.raises(MediaError, match="NFC") as caught:
            MediaStore(tmp_path).load(MediaRef("image", "file", "cafe\u0301.jpg"))
        assert caught.value.reason == "missing"


class TestImages:
    def test_sixteen_bit(self):
        values = np.array([[0, 257, 65535]], dtype=np.uint16)
        assert decode_image(encoded(Image.fromarray(values)))[0, :, 0].tolist() == [0, 1, 255]

    def test_one_bit_and_palette(self):
        bits = Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).convert("1")
        assert decode_image(encoded(bits))[0, :, 0].tolist() == [0, 255]
        palette = Image.new("P", (2, 1))
        palette.putpalette([10, 20, 30, 200, 100, 50])
        palette.putdata([0, 1])
        assert decode_image(encoded(palette))[0].tolist() == [[10, 20, 30], [200, 100, 50]]
        assert decode_image(encoded(palette, transparency=0))[0].tolist() == [
            [255] * 3,
            [200, 100, 50],
        ]

    def test_alpha_on_white(self):
        half = Image.new("RGBA", (1, 1), (0, 0, 0, 51))
        assert decode_image(encoded(half))[0, 0].tolist() == [204, 204, 204]

    def test_cmyk(self):
        pixels = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"))
        assert pixels[0, 0].tolist() == [255, 0, 0]

    def test_float_refused(self):
        with pytest.raises(MediaError, match="floats"):
            decode_image(encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"))

    @pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
    def test_exif_turns_planned_and_decoded_size(self, fmt):
        data = encoded(Image.new("RGB", (30, 20)), fmt, exif=exif(6))
        assert read_image_header(data).size == (30, 20)
        assert decode_image(data).shape == (30, 20, 3)

    @pytest.mark.parametrize("fmt", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
    def test_header_size(self, fmt):
        assert read_image_header(encoded(Image.new("RGB", (31, 17)), fmt)).size == (17, 31)

    @pytest.mark.parametrize("fmt", ["PNG", "GIF", "WEBP"])
    def test_an_animation_is_its_first_frame_and_is_reported(self, fmt):
        frames = [Image.new("RGB", (31, 17), color) for color in ("red", "green", "blue")]
        data = encoded(frames[0], fmt, save_all=True, append_images=frames[1:])
        assert read_image_header(data) == ((17, 31), True)
        assert decode_image(data)[0, 0, 0] > 200
        assert not read_image_header(encoded(frames[0], fmt)).animated
        if (
            fmt != "WEBP"
        ):  # Pillow opens no cut WebP; here later frames are damaged, the first is whole
            assert read_image_header(data[: len(data) - 40]).size == (17, 31)

    def test_header_reads_little(self, tmp_path, monkeypatch):
        noise = np.random.default_rng(0).integers(0, 255, (400, 500, 3), dtype=np.uint8)
        path = tmp_path / "big.jpg"
        path.write_bytes(encoded(Image.fromarray(noise), "JPEG", quality=100))
        assert path.stat().st_size > 200_000
        monkeypatch.setattr(image_module, "_open", None)  # Pillow is not needed
        assert read_image_header(path).size == (400, 500)

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (b"<html>404</html>", "not_an_image"),
            (encoded(Image.new("RGB", (64, 64), "red"), "JPEG")[:-200], "truncated"),
            (encoded(Image.new("RGB", (300, 1))), "aspect"),
        ],
    )
    def test_broken(self, data, reason):
        with pytest.raises(MediaError) as caught:
            decode_image(data)
        assert caught.value.reason == reason

    def test_bomb_is_refused_on_its_header(self):
        def chunk(kind, body):
            return (
                struct.pack(">I", len(body))
                + kind
                + body
                + struct.pack(">I", zlib.crc32(kind + body))
            )

        header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
        data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0"))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for read in (read_image_header, decode_image):
            with pytest.raises(MediaError) as caught:
                read(data)
            assert caught.value.reason == "too_many_pixels"
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 << 10  # KiB

    def test_missing_and_empty_file(self, tmp_path):
        (tmp_path / "empty.jpg").touch()
        store = MediaStore(tmp_path)
        for name, reason in [("no.jpg", "missing"), ("empty.jpg", "not_an_image")]:
            for read in (store.header, store.load):
                with pytest.raises(MediaError, match=name) as caught:
                    read(MediaRef("image", "file", name))
                assert caught.value.reason == reason


class TestSizes:
    def test_rules_equal_the_processors(self):
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import (
            smart_resize as image_rule,
        )
        from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as clip_rule

        rng = np.random.default_rng(0)
        for _ in range(400):
            h, w = (int(x) for x in rng.integers(20, 1500, 2))
            factor = int(rng.choice([28, 32]))
            low = int(rng.integers(1, 60)) * factor**2
            high = low * int(rng.integers(1, 40))
            if max(h, w) / min(h, w) < 200:
                ours = fit_pixels(h, w, factor=factor, min_pixels=low, max_pixels=high)
                assert ours == image_rule(h, w, factor, low, high)
            frames = int(rng.integers(2, 40))
            ours = fit_video_pixels(
                frames,
                h,
                w,
                factor=factor,
                temporal_factor=2,
                min_pixels=low,
                max_pixels=high * frames,
            )
            theirs = clip_rule(frames, h, w, 2, factor, low, high * frames)
            assert ours == theirs

    def test_tiles_equal_the_processor(self):
        from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

        rng = np.random.default_rng(1)
        for _ in range(300):
            h, w = (int(x) for x in rng.integers(50, 2000, 2))
            limit = int(rng.integers(1, 13))
            cols, rows = get_optimal_tiled_canvas((h, w), (448, 448), 1, limit)
            assert tile_grid(h, w, 448, limit) == (rows, cols)

    def test_resize_keeps_equal_size_and_tiles_read_row_by_row(self):
        image = np.arange(4 * 8 * 3, dtype=np.uint8).reshape(1, 4, 8, 3)
        assert resize(image, (4, 8)) is image
        tiles = split_tiles(image, 1, 2, 4)
        assert tiles.shape == (3, 4, 4, 3)
        assert np.array_equal(tiles[1], image[0, :, 4:])

    def test_budgets(self):
        policy = MediaPolicy("clip", 16, 2, 2, (1024, 10**6), (4096, 32 * 10**6))
        small = policy.with_budget(max_pixels=64 * 64, num_frames=8, fps=None)
        assert small.image_size(480, 640) == (32, 64)
        assert small.num_frames == 8
        assert small.video_size(8, 480, 640) == (32, 64)
        total = policy.with_budget(video_total_pixels=8 * 64 * 64)
        h, w = total.video_size(8, 480, 640)
        assert 8 * h * w <= 8 * 64 * 64

    @pytest.mark.parametrize("rule", ["frame", "clip"])
    @pytest.mark.parametrize("frames", [4, 512])
    def test_frames_of_short_and_long_videos_stay_below_their_own_limit(self, rule, frames):
        policy = MediaPolicy(rule, 16, 2, 2, (1024, 10**6), (4096, 32 * 10**6))
        small = policy.with_budget(video_max_pixels=50_176, video_total_pixels=512 * 50_176)
        h, w = small.video_size(frames, 480, 640)
        assert 40_000 < h * w <= 50_176
        assert small.image_size(480, 640) == (480, 640)


class TestFrameChoice:
    @pytest.mark.parametrize(
        ("total", "wanted", "expected"),
        [(10, 4, (0, 3, 6, 9)), (7, 4, (0, 2, 4, 6)), (3, 4, (0, 1, 2)), (1, 32, (0,))],
    )
    def test_uniform(self, total, wanted, expected):
        assert choose_uniform(total, wanted) == expected

    def test_by_rate(self):
        times = [i / 4 for i in range(13)]  # 3 s at 4 fps
        assert choose_by_rate(times, 1.0, 512) == (0, 4, 8, 12)
        assert choose_by_rate(times, 8.0, 512) == tuple(range(13))
        assert choose_by_rate(times, 4.0, 4) == (0, 4, 8, 12)
        assert choose_by_rate([0.0, 0.9, 2.1], 1.0, 9) == (0, 1)

    def test_clip_and_fixed_frames(self):
        header = MediaHeader((64, 64), 10, 2.0, *[tuple(i / 2 for i in range(10))] * 2)
        policy = MediaPolicy("frame", 14, 2, 2, (784, 10**6), (784, 10**6), num_frames=3)
        clip = plan_media(MediaRef("video", "file", "v", clip_s=(1.0, 3.0)), header, policy)
        assert clip.ref.frames == (2, 3, 5)
        assert clip.times_s == (1.0, 1.5, 2.5)
        assert clip.grid == (2, 4, 4)
        assert clip.second_per_grid_t == pytest.approx(1.5)
        fixed = plan_media(MediaRef("video", "file", "v", frames=(9, 0)), header, policy)
        assert fixed.ref.frames == (9, 0)
        with pytest.raises(MediaError, match="no frame between"):
            plan_media(MediaRef("video", "file", "v", clip_s=(8.0, 9.0)), header, policy)
        with pytest.raises(MediaError, match="do not exist"):
            plan_media(MediaRef("video", "file", "v", frames=(10,)), header, policy)

    def test_names(self, tmp_path):
        assert times_from_names(["s_10.5.jpg", "s_12.0.jpg"]) == (0.0, 1.5)
        assert times_from_names(["frame_00003.jpg", "frame_00005.jpg"]) is None
        assert times_from_names(["s_10.5.jpg", "s_9.5.jpg"]) is None
        for name in ("f10.png", "f9.png", "f1.JPG", "notes.txt"):
            (tmp_path / name).touch()
        assert list_frames(tmp_path) == ["f1.JPG", "f9.png", "f10.png"]


class TestVideo:
    @pytest.fixture(scope="class")
    def clip(self, tmp_path_factory):
        path = tmp_path_factory.mktemp("video") / "clip.mp4"
        write_video(path, ramp(23))
        return path

    def test_header(self, clip):
        header = read_video_header(clip)
        assert (header.num_frames, header.size, header.fps) == (23, (48, 64), 4.0)
        assert header.seconds()[-1] == pytest.approx(22 / 4)
        assert len(header.keyframes) > 2

    def test_seek_equals_sequential(self, clip):
        header = read_video_header(clip)
        everything = decode_video(clip, header, range(23))
        levels = everything[:, 24, 32, 0].astype(int)
        assert np.round((levels - 8) / 10).tolist() == list(range(23))  # each picture in its place
        for frames in [(0, 22), (7,), (3, 4, 5, 18), (20, 2)]:
            assert np.array_equal(decode_video(clip, header, frames), everything[list(frames)])

    def test_bytes_equal_file(self, clip):
        data = clip.read_bytes()
        header = read_video_header(data, name="cell")
        assert np.array_equal(decode_video(data, header, [4]), decode_video(clip, header, [4]))

    @pytest.mark.slow  # runs where torchcodec and the libraries of FFmpeg are installed
    def test_torchcodec_gives_the_same_frames(self, clip, tmp_path):
        try:
            load_torchcodec()
        except ConfigError as error:
            pytest.skip(str(error))
        picture = np.zeros((48, 64, 3), np.uint8)
        picture[:24] = 255
        write_video(tmp_path / "turned.mp4", [picture] * 3, rotation=90)
        for path, frames in [(clip, (0, 22, 7, 8)), (tmp_path / "turned.mp4", (2, 0))]:
            header = read_video_header(path)
            expected = decode_video(path, header, frames)
            assert np.array_equal(decode_with_torchcodec(path, header, frames), expected)
            found = decode_with_torchcodec(path.read_bytes(), header, frames, name="cell")
            assert np.array_equal(found, expected)
        store = MediaStore(clip.parent, video_backend="torchcodec")
        loaded = store.load(MediaRef("video", "file", "clip.mp4", frames=(3, 4)))
        assert np.array_equal(loaded, decode_video(clip, read_video_header(clip), (3, 4)))
        cut = tmp_path / "cut.mp4"
        cut.write_bytes(clip.read_bytes()[:2000])
        with pytest.raises(MediaError, match="damaged") as caught:
            decode_with_torchcodec(cut, read_video_header(clip), [0, 22])
        assert caught.value.reason == "frame_decode"

    def test_torchcodec_that_cannot_be_loaded(self, monkeypatch):
        def missing(name):
            raise RuntimeError(f"Could not load {name}\nlibavutil.so.60: cannot open shared object")

        monkeypatch.setattr("importlib.import_module", missing)
        with pytest.raises(ConfigError, match=r"Could not load torchcodec.*set pyav"):
            load_torchcodec()

    def test_rotation(self, tmp_path):
        picture = np.zeros((48, 64, 3), np.uint8)
        picture[:24] = 255  # white above black
        write_video(tmp_path / "r.mp4", [picture] * 3, rotation=90)
        header = read_video_header(tmp_path / "r.mp4")
        assert header.size == (64, 48)
        frame = decode_video(tmp_path / "r.mp4", header, [1])[0]
        assert frame.shape == (64, 48, 3)
        left, right = frame[:, :20].mean(), frame[:, -20:].mean()
        assert abs(left - right) > 200  # the white half now lies on one side
        assert left > right  # 90 degrees counter-clockwise: the top goes to the left

    def test_cut_tail(self, clip, tmp_path):
        noise = [
            np.random.default_rng(i).integers(0, 255, (48, 64, 3), dtype=np.uint8)
            for i in range(30)
        ]
        path = tmp_path / "cut.mkv"
        write_video(path, noise)
        header = read_video_header(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert decode_video(path, header, [0, 2]).shape[0] == 2
        with pytest.raises(MediaError, match="cannot be decoded") as caught:
            decode_video(path, header, [0, 29])
        assert caught.value.reason == "frame_decode"

    def test_audio_only_and_not_a_video(self, tmp_path):
        import av

        with av.open(str(tmp_path / "a.wav"), "w") as container:
            stream = container.add_stream("pcm_s16le", rate=8000)
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 800), np.int16), format="s16", layout="mono"
            )
            frame.rate = 8000
            for packet in [*stream.encode(frame), *stream.encode()]:
                container.mux(packet)
        (tmp_path / "x.mp4").write_bytes(b"nothing")
        for name, reason in [
            ("a.wav", "no_frames"),
            ("x.mp4", "not_an_image"),
            ("no.mp4", "missing"),
        ]:
            with pytest.raises(MediaError) as caught:
                MediaStore(tmp_path).header(MediaRef("video", "file", name))
            assert caught.value.reason == reason


class TestStore:
    def test_frame_folder(self, tmp_path):
        folder = tmp_path / "f"
        folder.mkdir()
        store = MediaStore(tmp_path)
        ref = MediaRef("video", "frames", "f", frames=(0, 1))
        with pytest.raises(MediaError, match="holds no image"):
            store.header(ref)
        for i, side in enumerate((20, 20, 30)):
            Image.new("RGB", (side, 16), (i, 0, 0)).save(folder / f"f_{i}.5.png")
        header = store.header(ref)
        assert (header.size, header.num_frames, header.seconds) == ((16, 20), 3, (0.0, 1.0, 2.0))
        assert not header.times_assumed
        assert store.load(ref).shape == (2, 16, 20, 3)
        with pytest.raises(MediaError, match="different sizes") as caught:
            store.load(MediaRef("video", "frames", "f", frames=(0, 2)))
        assert caught.value.reason == "frame_size"
        named = MediaRef("video", "frames", "f", member="f_1.5.png\nf_0.5.png", frames=(0,))
        assert store.load(named)[0, 0, 0, 0] == 1
        assert store.header(named, stamps_s=(4.0, 6.0)).stamps_s == (4.0, 6.0)

    def test_embedded_bytes(self, tmp_path):
        pictures = [encoded(Image.new("RGB", (9, 7), (i, 0, 0))) for i in range(3)]
        members = {"1.png": pictures[:1], "1.png\n2.png\n3.png": pictures}
        store = MediaStore(tmp_path, read_bytes=lambda ref: members[ref.member])
        assert store.load(MediaRef("image", "tar", "a.tar", "1.png")).shape == (1, 7, 9, 3)
        video = MediaRef("video", "cell", "a.arrow", "1.png\n2.png\n3.png", frames=(2, 0))
        assert store.header(video).num_frames == 3
        assert store.load(video)[:, 0, 0, 0].tolist() == [2, 0]

    def test_cache_decodes_once_and_stays_small(self, tmp_path):
        for i in range(3):
            Image.new("RGB", (10, 10)).save(tmp_path / f"{i}.png")
        cache = FrameCache(max_bytes=650)
        store = MediaStore(tmp_path, cache=cache)
        for i in (0, 0, 1, 1, 0):
            store.load(MediaRef("image", "file", f"{i}.png"))
        assert cache.decoded == 2
        store.load(MediaRef("image", "file", "2.png"))  # drops 1
        store.load(MediaRef("image", "file", "0.png"))
        store.load(MediaRef("image", "file", "1.png"))
        assert cache.decoded == 4

    @pytest.mark.parametrize("name", ["{secret}", "../../secret.png", "link.png"])
    def test_frames_of_a_folder_never_leave_the_root(self, tmp_path, name):
        secret = tmp_path / "secret.png"
        Image.new("RGB", (10, 10)).save(secret)
        (tmp_path / "root" / "f").mkdir(parents=True)
        (tmp_path / "root" / "f" / "link.png").symlink_to(secret)
        store = MediaStore(tmp_path / "root")
        ref = MediaRef("video", "frames", "f", name.format(secret=secret), frames=(0,))
        for read in (store.header, store.load):
            with pytest.raises(MediaError) as caught:
                read(ref)
            assert caught.value.reason in ("refused_path", "missing", "not_an_image")


class TestFuzz:
    """Damaged files give a MediaError or an array; never another exception, never wrong shapes."""

    def test_images(self):
        rng = np.random.default_rng(0)
        picture = Image.fromarray(rng.integers(0, 255, (40, 56, 3), dtype=np.uint8))
        originals = [
            encoded(picture, fmt, **options)
            for fmt, options in [
                ("JPEG", {"exif": exif(6)}), ("PNG", {}), ("GIF", {}), ("WEBP", {}), ("BMP", {}), ("TIFF", {}),
            ]
        ]  # fmt: skip
        refused = decoded = 0
        reasons = set()
        for _ in range(400):
            data = bytearray(originals[rng.integers(len(originals))])
            for _ in range(int(rng.integers(1, 6))):
                data[int(rng.integers(len(data)))] = int(rng.integers(256))
            if rng.random() < 0.3:
                data = data[: int(rng.integers(1, len(data)))]
            try:
                size = read_image_header(bytes(data), max_pixels=10**6).size
                pixels = decode_image(bytes(data), max_pixels=10**6)
            except MediaError as error:
                reasons.add(error.reason)
                refused += 1
                continue
            decoded += 1
            assert pixels.shape == (*size, 3)
        assert refused > 50
        assert reasons <= {"not_an_image", "truncated", "too_many_pixels", "aspect"}
        assert decoded > 50

    def test_videos(self, tmp_path):
        write_video(tmp_path / "v.mp4", ramp(9))
        original = (tmp_path / "v.mp4").read_bytes()
        rng = np.random.default_rng(1)
        reasons = set()
        for _ in range(150):
            data = bytearray(original)
            for _ in range(int(rng.integers(1, 20))):
                data[int(rng.integers(len(data)))] = int(rng.integers(256))
            try:
                header = read_video_header(bytes(data))
                frames = decode_video(bytes(data), header, range(min(header.num_frames, 9)))
            except MediaError as error:
                reasons.add(error.reason)
                continue
            assert frames.shape[0] == min(header.num_frames, 9)
        assert reasons <= {"no_frames", "not_an_image", "frame_decode", "frame_size"}
        assert len(reasons) > 1
