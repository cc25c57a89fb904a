"""Samples become the ids the stock processors give, with labels on answers only, and never cut media."""

import numpy as np
import pytest

from spatialvlm.data.encode import HeadCache, OverlongPolicy, encode, fit, geometry_groups
from spatialvlm.data.media.plan import MediaHeader, MediaPolicy, plan_media
from spatialvlm.data.media.resize import resize, split_tiles
from spatialvlm.data.sample import MediaRef, Sample, Turn
from spatialvlm.data.template import ChatTemplate, load_processor
from spatialvlm.errors import DataError
from spatialvlm.sequence.layout import MediaItem, TokenLayout
from spatialvlm.sequence.sizes import SizePolicy

FAMILIES = ["qwen2_5vl", "qwen3vl", "internvl3"]


@pytest.fixture(scope="module", params=FAMILIES)
def kit(request, tiny_checkpoint):
    return make_kit(tiny_checkpoint(request.param))


def make_kit(folder, **layout_options):
    template = ChatTemplate.from_checkpoint(folder)
    processor = load_processor(folder)
    policy = MediaPolicy.from_processor(processor)
    return template, make_layout(template, **layout_options), policy, processor


def make_layout(template, **options):
    if template.family == "internvl3":
        names = ["<IMG_CONTEXT>", "<IMG_CONTEXT>", "<img>", "</img>"]
    else:
        names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    image, video, start, end = (template.token_id(name) for name in names)
    return TokenLayout(
        family=template.family,
        image_id=image,
        video_id=video,
        vision_start_id=start,
        vision_end_id=end,
        **options,
    )


def picture(rng, height, width):
    return rng.integers(0, 255, (height, width, 3), dtype=np.uint8)


def image_ref(name="a.png"):
    return MediaRef("image", "file", name)


def video_header(count, fps=2.0, size=(90, 120)):
    times = tuple(i / fps for i in range(count))
    return MediaHeader(size, count, fps, times, times)


def make_sample(*turns, media=(), **fields):
    return Sample("s#0", "s", "spatial", tuple(turns), tuple(media), **fields)


def stock(processor, template, sample, images=(), videos=(), fps=2.0):
    """Ids and pixels of the stock processor for the same conversation and source frames."""
    text = template.render(sample.turns, [ref.kind for ref in sample.media])
    options = {}
    if videos:
        meta = [
            {
                "total_num_frames": len(v),
                "fps": fps,
                "frames_indices": list(range(len(v))),
                "duration": 1.0,
            }
            for v in videos
        ]
        options = {"videos": list(videos), "video_metadata": meta, "do_sample_frames": False}
    if images:
        options["images"] = list(images)
    if template.family == "internvl3":
        options["crop_to_patches"] = False
    return processor(text=[text], return_tensors="pt", **options)


QA = (Turn("user", (0, "Where?")), Turn("assistant", ("Left.",)))


def test_image_ids_equal_the_stock_processor(kit):
    template, layout, policy, processor = kit
    rng = np.random.default_rng(0)
    for count in (1, 3):
        sizes = [(int(rng.integers(40, 300)), int(rng.integers(40, 300))) for _ in range(count)]
        parts = [p for i in range(count) for p in (i, f" view {i}; ")]
        sample = make_sample(
            Turn("user", (*parts, "what changed?")),
            Turn("assistant", ("Nothing.",)),
            media=[image_ref()] * count,
        )
        media = [plan_media(image_ref(), MediaHeader(size), policy) for size in sizes]
        images = [picture(rng, *size) for size in sizes]
        ours = encode(sample, media, template, layout)
        theirs = stock(processor, template, sample, images=images)
        assert ours.input_ids.tolist() == theirs["input_ids"][0].tolist()
        if "image_grid_thw" in theirs:
            assert [list(g) for g in ours.grids] == theirs["image_grid_thw"].tolist()
        else:
            assert ours.num_patches // 4 == ours.num_visual_tokens


@pytest.mark.parametrize("count", [2, 5, 8])
def test_video_ids_equal_the_stock_processor(kit, count):
    template, layout, policy, processor = kit
    frames = np.stack([picture(np.random.default_rng(i), 90, 120) for i in range(count)])
    sample = make_sample(*QA, media=[MediaRef("video", "file", "v.mp4")])
    media = [plan_media(sample.media[0], video_header(count), policy)]
    ours = encode(sample, media, template, layout)
    theirs = stock(processor, template, sample, videos=[frames])
    assert ours.input_ids.tolist() == theirs["input_ids"][0].tolist()
    if "video_grid_thw" in theirs:
        assert [list(g) for g in ours.grids] == theirs["video_grid_thw"].tolist()


def test_internvl_tiles_equal_the_stock_processor(tiny_checkpoint):
    template, layout, policy, processor = make_kit(tiny_checkpoint("internvl3"))
    policy = policy.with_budget(max_tiles=6)
    image = picture(np.random.default_rng(0), 100, 290)
    sample = make_sample(*QA, media=[image_ref()])
    info = plan_media(image_ref(), MediaHeader((100, 290)), policy)
    assert info.tiles == (1, 3)
    assert info.num_frames == 4
    ours = encode(sample, [info], template, layout)
    text = template.render(sample.turns, ["image"])
    theirs = processor(
        text=[text], images=[image], crop_to_patches=True, max_patches=6, return_tensors="pt"
    )
    assert ours.input_ids.tolist() == theirs["input_ids"][0].tolist()
    tiles = split_tiles(image[None], *info.tiles, policy.tile).astype(np.float32) / 255
    mean, std = (
        np.array(processor.image_processor.image_mean),
        np.array(processor.image_processor.image_std),
    )
    ours_pixels = ((tiles - mean) / std).transpose(0, 3, 1, 2)
    assert np.abs(ours_pixels - theirs["pixel_values"].numpy()).max() < 1e-5


def test_resized_pixels_equal_the_stock_processor(kit):
    """Bit-equal before normalisation, so equal to rounding after it."""
    _, _, policy, processor = kit
    rng = np.random.default_rng(3)
    for height, width in [(60, 200), (333, 217), (128, 128)]:
        image = picture(rng, height, width)
        size = policy.image_size(height, width)
        ours = resize(image[None], size)[0]
        theirs = processor.image_processor(
            images=[image], do_normalize=False, do_rescale=False, return_tensors="pt"
        )["pixel_values"]
        # the order of patches differs from ours; equal multisets of values per channel sum are enough here,
        # tests of `sequence.pixels` compare element by element
        repeat = theirs.numel() // ours.size
        assert np.array_equal(
            np.repeat(np.sort(ours.ravel()), repeat), np.sort(theirs.numpy().ravel())
        )


def test_labels(kit):
    template, layout, policy, _ = kit
    sample = make_sample(
        *QA, Turn("user", ("Sure?",)), Turn("assistant", ("Yes.",)), media=[image_ref()]
    )
    encoded = encode(
        sample, [plan_media(image_ref(), MediaHeader((80, 80)), policy)], template, layout
    )
    supervised = encoded.labels != -100
    assert np.array_equal(encoded.labels[supervised], encoded.input_ids[supervised])
    assert template.decode(encoded.labels[supervised]) == "Left.<|im_end|>Yes.<|im_end|>"
    assert not supervised[encoded.token_kind != 0].any()
    assert encoded.num_label_tokens == supervised.sum()


def test_prefix_ends_behind_the_media(kit):
    template, layout, policy, _ = kit
    info = plan_media(image_ref(), MediaHeader((80, 80)), policy)
    encoded = encode(make_sample(*QA, media=[image_ref()]), [info], template, layout)
    head = encoded.token_kind[: encoded.prefix_len]
    assert (head != 0).sum() == encoded.num_visual_tokens
    assert encoded.input_ids[encoded.prefix_len - 1] == layout.vision_end_id
    later = make_sample(
        Turn("user", ("Ready?",)), Turn("assistant", ("Yes.",)), *QA, media=[image_ref()]
    )
    assert encode(later, [info], template, layout).prefix_len == 0
    assert encode(make_sample(Turn("user", ("q",)), QA[1]), [], template, layout).prefix_len == 0


def test_geometry_groups(tiny_checkpoint):
    template = ChatTemplate.from_checkpoint(tiny_checkpoint("qwen3vl"))
    on = make_layout(template, insertion="in_place", size=SizePolicy())
    off = make_layout(template)
    image, video = image_ref(), MediaRef("video", "file", "v")

    def groups(layout, *media, **fields):
        return geometry_groups(make_sample(*QA, media=media, **fields), layout)

    assert groups(on, video) == (0,)
    assert groups(on, image) == (-1,)
    assert groups(on, image, image) == (-1, -1)
    assert groups(on, image, image, same_scene=True) == (0, 0)
    assert groups(on, image, video, image, same_scene=True) == (0, 1, 0)
    assert groups(on, image, image, geometry="on") == (0, 1)
    assert groups(on, video, geometry="off") == (-1,)
    assert groups(off, video, geometry="on") == (-1,)
    with pytest.raises(DataError, match="has no media"):
        groups(on, geometry="on")


LAYOUTS = [
    {},
    {"text_after_vision": "stock"},
    {"insertion": "interleaved", "spatial_id": 999, "camera_token": True},
    {"insertion": "sequential", "spatial_id": 999},
    {"insertion": "in_place"},
    {"insertion": "interleaved", "spatial_id": 999, "time": "seconds"},
]


@pytest.mark.parametrize("options", LAYOUTS)
def test_remembered_beginnings_change_nothing(kit, options):
    """Ids and positions equal those of the layout for the whole sample at once."""
    template, _, policy, _ = kit
    size = SizePolicy() if "insertion" in options else None
    layout = make_layout(template, size=size, **options)
    heads = HeadCache(2)
    rng = np.random.default_rng(0)
    refs = [MediaRef("video", "file", "v"), image_ref("a"), image_ref("b")]
    for _ in range(30):
        media = [refs[i] for i in rng.permutation(3)[: rng.integers(0, 4)]]
        question = [p for i in range(len(media)) for p in (f"t{rng.integers(3)} ", i)]
        turns = [Turn("user", (*question, "what?")), Turn("assistant", ("this",))]
        if rng.random() < 0.5 and media:  # media in a later turn
            turns = [Turn("user", ("hi",)), Turn("assistant", ("ho",)), *turns]
        sample = make_sample(
            *turns, media=media, same_scene=True, geometry="on" if media else "auto"
        )
        infos = [
            plan_media(
                ref, video_header(5) if ref.kind == "video" else MediaHeader((80, 120)), policy
            )
            for ref in media
        ]
        ours = encode(sample, infos, template, layout, heads=heads)
        groups = geometry_groups(sample, layout)
        items = [
            MediaItem(i.ref.kind, i.grid, i.times_s, i.second_per_grid_t, group)
            for i, group in zip(infos, groups, strict=True)
        ]
        pieces = template.pieces(sample.turns)
        whole = layout.expand(
            [items[p] if isinstance(p, int) else p.ids for p in pieces], template.encode
        )
        assert np.array_equal(ours.input_ids, whole.input_ids)
        assert np.array_equal(ours.token_kind, whole.token_kind)
        assert np.array_equal(ours.position_ids, whole.position_ids)


class TestOverlong:
    @pytest.fixture(scope="class")
    def qwen(self, tiny_checkpoint):
        return make_kit(tiny_checkpoint("qwen2_5vl"))

    def video_sample(self, **fields):
        return make_sample(*QA, media=[MediaRef("video", "file", "v")], **fields)

    def test_drop_frames_takes_the_largest_even_count(self, qwen):
        template, layout, policy, _ = qwen
        sample = self.video_sample()
        info = plan_media(sample.media[0], video_header(100), policy)
        full = encode(sample, [info], template, layout)
        assert len(info.times_s) == 32
        per_unit = full.num_visual_tokens // 16
        limit = len(full.input_ids) - 1
        fitted = fit(sample, [info], template, layout, OverlongPolicy(limit, "drop_frames"))
        assert fitted.outcome == "frames_dropped"
        assert fitted.tokens_removed == per_unit
        assert fitted.encoded.frames[0] == tuple(np.linspace(0, 99, 30, dtype=int))
        assert fitted.media[0].size == info.size
        with pytest.raises(DataError, match="frames are pinned") as caught:
            fit(
                self.video_sample(frames_pinned=True),
                [info],
                template,
                layout,
                OverlongPolicy(limit, "drop_frames"),
            )
        assert caught.value.reason == "overlong"
        with pytest.raises(DataError, match="overlong"):
            fit(sample, [info], template, layout, OverlongPolicy(9 * per_unit // 2, "drop_frames"))

    def test_truncate_removes_whole_trailing_pairs(self, qwen):
        template, layout, policy, _ = qwen
        more = [
            t
            for i in range(3)
            for t in (Turn("user", (f"again {i}?",)), Turn("assistant", ("no",)))
        ]
        sample = make_sample(*QA, *more, media=[image_ref()])
        info = plan_media(image_ref(), MediaHeader((80, 80)), policy)
        first = encode(make_sample(*QA, media=[image_ref()]), [info], template, layout)
        limit = len(first.input_ids) + 3
        fitted = fit(sample, [info], template, layout, OverlongPolicy(limit, "truncate_text_turns"))
        assert fitted.outcome == "turns_dropped"
        assert fitted.encoded.input_ids.tolist() == first.input_ids.tolist()
        with pytest.raises(DataError, match="overlong"):
            fit(
                sample,
                [info],
                template,
                layout,
                OverlongPolicy(len(first.input_ids) - 1, "truncate_text_turns"),
            )

    def test_no_policy_ever_cuts_media(self, qwen):
        template, layout, policy, _ = qwen
        rng = np.random.default_rng(0)
        seen = set()
        for _ in range(200):
            pairs = int(rng.integers(1, 5))
            media = [MediaRef("video", "file", "v")] if rng.random() < 0.5 else [image_ref()]
            turns = [
                t
                for i in range(pairs)
                for t in (
                    Turn("user", ("so " * int(rng.integers(1, 9)),)),
                    Turn("assistant", ("x",)),
                )
            ]
            place = 2 * int(rng.integers(pairs))
            turns[place] = Turn("user", (0, "see"))
            sample = make_sample(*turns, media=media)
            header = video_header(40) if media[0].kind == "video" else MediaHeader((80, 120))
            info = plan_media(media[0], header, policy)
            name = str(rng.choice(["reject", "drop_frames", "truncate_text_turns"]))
            limit = int(rng.integers(20, 400))
            try:
                fitted = fit(sample, [info], template, layout, OverlongPolicy(limit, name))
            except DataError as error:
                seen.add(error.reason)
                continue
            seen.add(fitted.outcome)
            assert len(fitted.encoded.input_ids) <= limit
            assert fitted.encoded.num_visual_tokens == fitted.media[0].num_patches // 4
            assert (fitted.encoded.labels != -100).any()
        assert seen == {"overlong", "kept", "frames_dropped", "turns_dropped"}
