"""The trainable part of the branch: equations, starting points, token order, dummy pass."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spatialvlm.errors import AlignmentError, ConfigError, GeometryError
from spatialvlm.models.geometry.base import GeometryFeatures
from spatialvlm.models.geometry.fusion import Float32LayerNorm, GeometryFusion

V, D, C = 8, 12, 6  # width of the vision tower, of the language model, of features
GRIDS = [(1, 4, 4), (3, 4, 6), (1, 2, 2), (1, 4, 4)]
GROUPS = [0, 1, -1, 0]
TOKENS = [4, 18, 1, 4]


class QwenLike(nn.Module):
    """Takes consecutive patches of a unit as rows."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(V)
        self.fc1 = nn.Linear(4 * V, 4 * V)
        self.fc2 = nn.Linear(4 * V, D)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(self.norm(x).view(-1, 4 * V))))


class InternLike(QwenLike):
    """Takes a unit as one row."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4 * V)


def fusion_for(projector, **kwargs):
    torch.manual_seed(1)
    settings = {
        "flatten_units": isinstance(projector, InternLike),
        "vision_dim": V,
        "text_dim": D,
        "feature_dim": C,
    }
    return GeometryFusion(projector, **(settings | kwargs))


@pytest.fixture
def scene():
    """Projector, vision states, their tokens, and features of a two-view and a five-frame group."""
    torch.manual_seed(0)
    projector = QwenLike()
    vision = torch.randn(sum(t * h * w for t, h, w in GRIDS), V, requires_grad=True)
    features = [
        GeometryFeatures({1: torch.randn(2, 3, 3, C)}, torch.randn(2, 5, C), (2, 3, 3)),
        GeometryFeatures({1: torch.randn(5, 4, 6, C)}, torch.randn(5, 5, C), (5, 4, 6)),
    ]
    return projector, vision, projector(vision), features


def run(fusion, scene, **kwargs):
    projector, vision, tokens, features = scene
    return fusion(vision, tokens, features, GRIDS, GROUPS, projector, **kwargs)


def with_geometry(tokens):
    return torch.cat([part for part, g in zip(tokens.split(TOKENS), GROUPS, strict=True) if g >= 0])


MODES = [
    (fusion, insertion, camera)
    for fusion, insertion, camera in itertools.product(
        ("pre_projector", "post_projector"),
        ("interleaved", "sequential", "in_place"),
        (False, True),
    )
    if not (camera and insertion == "in_place")
]


@pytest.mark.parametrize("merge", ["concat", "mean", "first"])
@pytest.mark.parametrize(("fusion", "insertion", "camera"), MODES)
def test_every_mode_trains_every_parameter(scene, fusion, insertion, camera, merge):
    module = fusion_for(
        scene[0],
        fusion=fusion,
        insertion=insertion,
        camera_token=camera,
        temporal_merge=merge,
        init="scratch",
    )
    out = run(module, scene)
    extra = 0 if insertion == "in_place" else 4 + 18 + 4 + (5 if camera else 0)
    assert out.spatial_tokens.shape == (extra, D)
    assert out.visual_tokens.shape == (27, D)
    (out.spatial_tokens.square().sum() + out.visual_tokens.square().sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize(("fusion", "insertion", "camera"), MODES)
def test_warm_start_equals_the_2d_model(scene, fusion, insertion, camera):
    module = fusion_for(scene[0], fusion=fusion, insertion=insertion, camera_token=camera)
    out = run(module, scene)
    assert (out.visual_tokens - scene[2]).abs().max() < 1e-6
    if insertion != "in_place" and not camera:
        # Groups: first view, video, second view; sequential puts both views behind the video.
        expected = with_geometry(scene[2]).split([4, 18, 4])
        order = [0, 1, 2] if insertion == "interleaved" else [1, 0, 2]
        assert (out.spatial_tokens - torch.cat([expected[i] for i in order])).abs().max() < 1e-6
    assert out.norm_ratio.tolist() == [0.0, 26.0 if fusion == "post_projector" else 104.0]


def test_camera_tokens_end_their_units(scene):
    plain = run(fusion_for(scene[0]), scene).spatial_tokens
    out = run(fusion_for(scene[0], camera_token=True), scene).spatial_tokens
    # Units of 4, 6, 6, 6 and 4 tokens, each followed by its camera token (zero at a warm start).
    rows, expected = [], []
    start = 0
    for size in (4, 6, 6, 6, 4):
        rows += range(start, start + size)
        start += size + 1
        expected.append(start - 1)
    assert torch.equal(out[rows], plain)
    assert (out[expected] == 0).all()


def test_camera_token_is_the_first_special_row(scene):
    module = fusion_for(scene[0], camera_token=True, init="scratch")
    before = run(module, scene).spatial_tokens
    scene[3][1].special[2:4, 1:] += 1  # registers: ignored
    assert torch.equal(run(module, scene).spatial_tokens, before)
    scene[3][1].special[2:4, 0] += 1 * torch.arange(C)  # camera rows of the video's second unit
    changed = (run(module, scene).spatial_tokens != before).any(1).nonzero().flatten().tolist()
    assert changed == [4 + 1 + 6 + 1 + 6]


def test_pre_projector_equations():
    """SSR eq. 2-4, written out once more: s' = W2 gelu(W1 [norm(s_a), norm(s_b)]), MLP(v + s')."""
    torch.manual_seed(0)
    projector = QwenLike()
    module = fusion_for(projector, init="scratch")
    vision = torch.randn(16, V)
    frames = torch.randn(2, 4, 4, C)
    features = [GeometryFeatures({0: frames}, None, (2, 4, 4))]
    tokens = module(vision, projector(vision), features, [(1, 4, 4)], [0], projector).spatial_tokens
    order = [r * 4 + c for R in (0, 2) for C_ in (0, 2) for r in (R, R + 1) for c in (C_, C_ + 1)]
    normed = F.layer_norm(frames, (C,)).view(2, 16, C)[:, order]
    hidden = F.gelu(torch.cat([normed[0], normed[1]], -1) @ module.trans.fc1.weight.T)
    added = hidden @ module.trans.fc2.weight.T
    assert (tokens - module.projector_3d(vision + added)).abs().max() < 1e-6


def test_post_projector_equation(scene):
    projector, vision, tokens, features = scene
    module = fusion_for(projector, fusion="post_projector", init="scratch", hidden=5)
    out = module(
        vision[:16], tokens[:4], [GeometryFeatures({1: features[1].layers[1][:1, :, :4]}, None, (1, 4, 4))],
        [(1, 4, 4)], [0], projector,
    ).spatial_tokens  # fmt: skip
    still = features[1].layers[1][0, :, :4]  # [4, 4, C]: a still image fills both slots
    units = still.view(2, 2, 2, 2, C).transpose(1, 2).reshape(4, 4, C)
    row = F.layer_norm(units, (C,)).repeat(1, 1, 2).flatten(1)  # [4 units, 4 patches * 2 slots * C]
    added = F.gelu(row @ module.post.fc1.weight.T) @ module.post.fc2.weight.T
    assert (out - (tokens[:4] + added)).abs().max() < 1e-6


def test_in_place_uses_the_vision_projector(scene):
    module = fusion_for(scene[0], insertion="in_place", init="scratch")
    assert module.projector_3d is None
    out = run(module, scene)
    untouched = slice(22, 23)
    assert torch.equal(out.visual_tokens[untouched], scene[2][untouched])
    assert (with_geometry(out.visual_tokens) - with_geometry(scene[2])).abs().min() > 0
    out.visual_tokens.sum().backward()
    assert scene[0].fc1.weight.grad.abs().sum() > 0


def test_in_place_keeps_the_2d_tokens_in_the_graph(scene):
    projector, vision, _, features = scene
    module = fusion_for(projector, insertion="in_place")
    tokens = projector(vision[:16]).detach().requires_grad_()
    one = [GeometryFeatures({1: features[0].layers[1][:1]}, None, (1, 3, 3))]
    out = module(vision[:16], tokens, one, [(1, 4, 4)], [0], projector)
    (out.visual_tokens.sum() + out.anchor).backward()
    assert tokens.grad is not None
    assert (tokens.grad == 0).all()


def test_several_layers_have_their_own_norms(scene):
    projector, vision, tokens, features = scene
    doubled = [
        GeometryFeatures({5: f.layers[1] + 1, 2: f.layers[1]}, f.special, f.grid) for f in features
    ]
    module = fusion_for(projector, num_layers=2, init="scratch")
    assert len(module.trans.norm) == 2
    assert module.trans.fc1.in_features == 2 * 2 * C
    with torch.no_grad():
        module.trans.norm[0].weight.zero_()  # layer 2 comes first
    before = module(vision, tokens, doubled, GRIDS, GROUPS, projector).spatial_tokens
    doubled[0].layers[2].add_(torch.randn(2, 3, 3, C))
    assert torch.equal(
        module(vision, tokens, doubled, GRIDS, GROUPS, projector).spatial_tokens, before
    )
    with pytest.raises(AlignmentError, match=r"layers \[1\], the fusion was built for 2"):
        run(module, scene)


@pytest.mark.parametrize("projector_type", [QwenLike, InternLike])
@pytest.mark.parametrize("tau", [1, 2])
def test_planted_signal_lands_in_one_token(projector_type, tau):
    """Change one patch of one frame; exactly the token that covers it may change."""
    torch.manual_seed(0)
    projector = projector_type()
    module = fusion_for(projector, tau=tau, init="scratch")
    units = 4 // tau
    grids, groups = [(1, 2, 2), (units, 4, 6)], [-1, 0]
    vision = torch.randn(4 + units * 24, V)
    rows = vision if projector_type is QwenLike else vision.view(-1, 4 * V)
    frames = torch.randn(4, 4, 6, C)

    def tokens():
        features = [GeometryFeatures({0: frames}, None, (4, 4, 6))]
        return module(vision, projector(rows), features, grids, groups, projector).spatial_tokens

    before = tokens()
    for frame, row, col in [(0, 0, 0), (1, 3, 5), (2, 1, 4), (3, 2, 0)]:
        saved = frames[frame, row, col].clone()
        frames[frame, row, col] = torch.randn(C)
        changed = (tokens() != before).any(1).nonzero().flatten().tolist()
        assert changed == [(frame // tau) * 6 + (row // 2) * 3 + col // 2]
        frames[frame, row, col] = saved


def test_after_a_warm_start_fc2_moves_first_and_then_fc1(scene):
    module = fusion_for(scene[0])
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    moved = []
    for _ in range(2):
        before = [module.trans.fc1.weight.clone(), module.trans.fc2.weight.clone()]
        optimizer.zero_grad()
        run(module, scene).spatial_tokens.square().sum().backward(retain_graph=True)
        optimizer.step()
        now = [module.trans.fc1.weight, module.trans.fc2.weight]
        moved.append([not torch.equal(a, b) for a, b in zip(before, now, strict=True)])
    assert moved == [[False, True], [True, True]]


@pytest.mark.parametrize("fusion", ["pre_projector", "post_projector"])
def test_scratch_forgets_the_projector(scene, fusion):
    module = fusion_for(scene[0], fusion=fusion, init="scratch", hidden=64)
    out = run(module, scene)
    assert (out.spatial_tokens - with_geometry(scene[2])).abs().max() > 1e-3
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            assert (layer.bias == 0).all()
            assert 0.015 < layer.weight.std() < 0.025
        elif isinstance(layer, nn.LayerNorm):
            assert (layer.weight == 1).all()
            assert (layer.bias == 0).all()
    if fusion == "pre_projector":
        assert not torch.equal(module.projector_3d.fc1.weight, scene[0].fc1.weight)


def test_the_copy_is_independent_and_trains(scene):
    scene[0].requires_grad_(False)
    module = fusion_for(scene[0])
    assert all(p.requires_grad for p in module.projector_3d.parameters())
    with torch.no_grad():
        module.projector_3d.fc2.bias.add_(1)
    assert not torch.equal(module.projector_3d.fc2.bias, scene[0].fc2.bias)


@pytest.mark.parametrize("fusion", ["pre_projector", "post_projector"])
@pytest.mark.parametrize("detach", [False, True])
def test_gradient_reaches_the_vision_tower_unless_detached(scene, fusion, detach):
    module = fusion_for(scene[0], fusion=fusion, detach_vit=detach, init="scratch")
    run(module, scene).spatial_tokens.sum().backward()
    assert (scene[1].grad is None) == detach


def test_norm_ratio_by_hand(scene):
    projector = scene[0]
    module = fusion_for(projector, temporal_merge="first")
    vision = torch.zeros(4, V)
    vision[:, 0] = torch.tensor([1.0, 2.0, 4.0, 5.0])
    with torch.no_grad():
        module.trans.fc2.bias.copy_(torch.tensor([3.0, 4.0] + [0.0] * (V - 2)))  # |s'| = 5
    features = [GeometryFeatures({0: torch.zeros(1, 2, 2, C)}, None, (1, 2, 2))]
    out = module(vision, projector(vision), features, [(1, 2, 2)], [0], projector)
    assert out.norm_ratio.tolist() == pytest.approx([5 + 2.5 + 1.25 + 1, 4])
    assert not out.norm_ratio.requires_grad


@pytest.mark.parametrize(("fusion", "insertion", "camera"), MODES)
def test_without_geometry_every_module_is_still_in_the_graph(scene, fusion, insertion, camera):
    projector, vision, _, _ = scene
    module = fusion_for(
        projector, fusion=fusion, insertion=insertion, camera_token=camera, init="scratch"
    )
    states = vision[:8]
    tokens = projector(states)
    out = module(states, tokens, [], [(1, 2, 4)], [-1], projector)
    assert out.anchor.item() == 0
    assert out.spatial_tokens.shape == (0, D)
    assert torch.equal(out.visual_tokens, tokens)
    assert out.norm_ratio.tolist() == [0, 0]
    out.anchor.backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in module.parameters())
    assert vision.grad is not None
    with torch.no_grad():
        assert not module(states, tokens, [], [(1, 2, 4)], [-1], projector).anchor.requires_grad


def test_norms_are_float32_in_a_bfloat16_model(scene):
    module = fusion_for(scene[0], init="scratch").bfloat16()
    dtypes = []
    module.trans.norm[0].register_forward_hook(lambda *args: dtypes.append(args[2].dtype))
    projector = scene[0].bfloat16()
    vision = scene[1].bfloat16()
    out = module(vision, projector(vision), scene[3], GRIDS, GROUPS, projector)
    assert dtypes == [torch.float32]
    assert out.spatial_tokens.dtype == torch.bfloat16
    norm = Float32LayerNorm(4).bfloat16()
    x = torch.tensor([1000.0, 1001.0, 1002.0, 1003.0])
    assert torch.allclose(norm(x), F.layer_norm(x, (4,)))


@pytest.mark.parametrize(
    ("dims", "flat", "expected"),
    [
        # Qwen2.5-VL-7B, Qwen3-VL-8B, InternVL3-8B with VGGT (2048 channels)
        ((1280, 3584, 2), False, {"trans": 6_887_936, "post": 81_796_608 + 4096}),
        ((1152, 4096, 2), False, {"trans": 6_052_096, "post": 83_894_272 + 4096}),
        ((1024, 3584, 1), True, {"trans": 3_151_872, "post": 48_242_176 + 4096}),
    ],
)
def test_parameter_counts_at_full_size(dims, flat, expected):
    vision_dim, text_dim, tau = dims
    for fusion, name in (("pre_projector", "trans"), ("post_projector", "post")):
        with torch.device("meta"):
            module = GeometryFusion(
                nn.Linear(4, 4),
                flatten_units=flat,
                vision_dim=vision_dim,
                text_dim=text_dim,
                feature_dim=2048,
                tau=tau,
                fusion=fusion,
            )
        assert sum(p.numel() for p in getattr(module, name).parameters()) == expected[name]


def test_letterboxed_views_are_cropped(scene):
    projector, vision, tokens, features = scene
    module = fusion_for(projector, init="scratch")
    padded = GeometryFeatures({1: F.pad(features[0].layers[1], (0, 0, 0, 2))}, None, (2, 3, 5))
    content = [(3, 3), None, None, (3, 3)]
    out = run(module, (projector, vision, tokens, [padded, features[1]]), media_content=content)
    assert torch.equal(out.spatial_tokens, run(module, scene).spatial_tokens)


# --- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"fusion": "early"}, "pre_projector, post_projector"),
        ({"insertion": "none"}, "interleaved, sequential, in_place"),
        ({"temporal_merge": "max"}, "concat, mean, first"),
        ({"init": "cold"}, "warm, scratch"),
        ({"insertion": "in_place", "camera_token": True}, "camera_token=true has no place"),
    ],
)
def test_settings_without_meaning(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        fusion_for(QwenLike(), **kwargs)


def test_partitioned_projector():
    projector = QwenLike()
    projector.norm.weight.data = torch.empty(0)
    with pytest.raises(GeometryError, match="GatheredParameters"):
        fusion_for(projector)


def test_states_that_do_not_fit(scene):
    projector, vision, tokens, features = scene
    module = fusion_for(projector)
    with pytest.raises(AlignmentError, match="108 patches, the vision tower returned 100"):
        module(vision[:100], tokens, features, GRIDS, GROUPS, projector)
    with pytest.raises(AlignmentError, match="5 encoder frames"):
        module(vision, tokens, features[::-1], GRIDS, GROUPS, projector)
    with pytest.raises(AlignmentError, match="needs 4 states of a dummy image, got 2"):
        module(vision[:2], tokens, [], [], [], projector)
    camera = fusion_for(projector, camera_token=True)
    bare = [GeometryFeatures(f.layers, None, f.grid) for f in features]
    with pytest.raises(AlignmentError, match="return_special=True"):
        camera(vision, tokens, bare, GRIDS, GROUPS, projector)
