"""The aggregator against tensors of a reference run, and what an encoder promises."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from spatialvlm.errors import ConfigError, GeometryError
from spatialvlm.models.geometry import blocks, vggt
from spatialvlm.models.geometry.base import IMAGE_MEAN, IMAGE_STD, assert_frozen
from spatialvlm.models.geometry.blocks import Attention, Block, linear, rope_2d
from spatialvlm.models.geometry.vggt import Aggregator, VggtConfig
from spatialvlm.models.geometry.vggt_checkpoint import build_meta, load_vggt
from spatialvlm.testing.memory import PeakMemory

TOLERANCE = 1e-5  # a correct implementation gives 1e-6, the smallest single mistake 1.8e-5


@pytest.fixture(scope="module")
def golden_file(data_dir):
    return data_dir / "vggt_tiny.safetensors"


@pytest.fixture(scope="module")
def golden(golden_file):
    return load_file(golden_file)


@pytest.fixture
def encoder(golden_file):
    return load_vggt(golden_file, layers=(0, 1, 2), precision="fp32", output_dtype=torch.float32)


def errors(aggregator, golden):
    """Largest absolute error per case and layer."""
    with torch.no_grad():
        return {
            (case, layer): (output - golden[f"case{case}.layer{layer}"]).abs().max().item()
            for case in (0, 1)
            for layer, output in aggregator(golden[f"case{case}.images"], [0, 1, 2]).items()
        }


def frames(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def test_golden_parity(encoder, golden, golden_file):
    with safe_open(golden_file, framework="pt") as file:
        cases = json.loads(file.metadata()["cases"])
    assert [list(golden[f"case{i}.images"].shape) for i in (0, 1)] == [
        [b, s, 3, h, w] for b, s, h, w in cases
    ]
    found = errors(encoder.aggregator, golden)
    assert len(found) == 6
    assert max(found.values()) <= TOLERANCE


# --- the test of the test: every single mistake must show -------------------------------------------


def set_eps(aggregator, eps, wanted):
    for name, module in aggregator.named_modules():
        if isinstance(module, nn.LayerNorm) and wanted(name):
            module.eps = eps


def norm_after_rope(self, x, rope):
    qkv = linear(self.qkv, x).view(*x.shape[:2], 3, self.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if rope is not None:
        q, k = rope.rotate(q), rope.rotate(k)
    if self.q_norm is not None:
        q, k = self.q_norm(q), self.k_norm(k)
    out = F.scaled_dot_product_attention(q, k, v)
    return linear(self.proj, out.transpose(1, 2).flatten(2))


def ignore_first_frame(aggregator, monkeypatch):
    for token in (aggregator.camera_token, aggregator.register_token):
        token.data[:, 0] = token.data[:, 1]


def swap_axes(aggregator, monkeypatch):
    monkeypatch.setattr(vggt, "rope_2d", lambda p, d: rope_2d(p.flip(-1), d))


def start_at_zero(aggregator, monkeypatch):
    monkeypatch.setattr(vggt, "rope_2d", lambda p, d: rope_2d((p - 1).clamp_min(0), d))


def no_antialias(aggregator, monkeypatch):
    plain = F.interpolate
    monkeypatch.setattr(
        F, "interpolate", lambda *args, **kwargs: plain(*args, **{**kwargs, "antialias": False})
    )


def tanh_gelu(aggregator, monkeypatch):
    plain = F.gelu
    monkeypatch.setattr(blocks.F, "gelu", lambda x: plain(x, approximate="tanh"))


MUTANTS = {
    "vit eps 1e-5": lambda a, m: set_eps(a, 1e-5, lambda n: n.startswith("patch_embed")),
    "frame/global eps 1e-6": lambda a, m: set_eps(
        a, 1e-6, lambda n: not n.startswith("patch_embed") and "attn" not in n
    ),
    "query/key eps 1e-6": lambda a, m: set_eps(a, 1e-6, lambda n: "attn" in n),
    "tanh gelu": tanh_gelu,
    "first frame variant ignored": ignore_first_frame,
    "rope axes swapped": swap_axes,
    "rope starts at 0": start_at_zero,
    "query/key norm after rope": lambda a, m: m.setattr(Attention, "forward", norm_after_rope),
    "positions without antialias": no_antialias,
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_single_mistake_shows(name, encoder, golden, monkeypatch):
    MUTANTS[name](encoder.aggregator, monkeypatch)
    assert max(errors(encoder.aggregator, golden).values()) > TOLERANCE


def test_tiny_variance_reaches_every_epsilon():
    """With variance near eps a wrong eps is a wrong scale; float64 formula as reference."""
    torch.manual_seed(0)
    block = Block(16, 2, 32, qk_norm=True, eps=1e-5)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = 1e-3 * torch.randn(1, 5, 16)
    rope = rope_2d(torch.tensor([[0, 0], [1, 1], [1, 2], [2, 1], [2, 2]]).float(), 8)

    def norm(layer, y):
        centred = y - y.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return centred * scale * layer.weight.double() + layer.bias.double()

    def dense(layer, y):
        return y @ layer.weight.double().T + layer.bias.double()

    attn, y = block.attn, x.double()
    q, k, v = dense(attn.qkv, norm(block.norm1, y)).view(1, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
    q, k = norm(attn.q_norm, q), norm(attn.k_norm, k)

    def turn(z):
        a, b, c, d = z.split(2, -1)
        return z * rope.cos.double() + torch.cat([-b, a, -d, c], -1) * rope.sin.double()

    weights = (turn(q) @ turn(k).mT / 8**0.5).softmax(-1)
    out = dense(attn.proj, (weights @ v).transpose(1, 2).flatten(2))
    y = y + block.ls1.gamma.double() * out
    hidden = dense(block.mlp.fc1, norm(block.norm2, y))
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    y = y + block.ls2.gamma.double() * dense(block.mlp.fc2, hidden)
    assert (block(x, rope).double() - y).abs().max() < 2e-6


# --- sizes ------------------------------------------------------------------------------------------


def released_names():
    """Names and shapes of the released aggregator, written down from its description."""
    d = 1024
    names = {
        "camera_token": (1, 2, 1, d),
        "register_token": (1, 2, 4, d),
        "patch_embed.cls_token": (1, 1, d),
        "patch_embed.pos_embed": (1, 1370, d),
        "patch_embed.register_tokens": (1, 4, d),
        "patch_embed.mask_token": (1, d),
        "patch_embed.patch_embed.proj.weight": (d, 3, 14, 14),
        "patch_embed.patch_embed.proj.bias": (d,),
        "patch_embed.norm.weight": (d,),
        "patch_embed.norm.bias": (d,),
    }
    block = {f"{norm}.{kind}": (d,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
    for layer, (out, into) in {
        "attn.qkv": (3 * d, d),
        "attn.proj": (d, d),
        "mlp.fc1": (4 * d, d),
        "mlp.fc2": (d, 4 * d),
    }.items():
        block |= {f"{layer}.weight": (out, into), f"{layer}.bias": (out,)}
    block |= {"ls1.gamma": (d,), "ls2.gamma": (d,)}
    normed = {f"attn.{n}_norm.{kind}": (64,) for n in "qk" for kind in ("weight", "bias")}
    for stack, tensors in {
        "patch_embed.blocks": block,
        "frame_blocks": block | normed,
        "global_blocks": block | normed,
    }.items():
        for index in range(24):
            names |= {f"{stack}.{index}.{name}": shape for name, shape in tensors.items()}
    return names


def test_full_size_has_the_released_names_and_counts():
    released = released_names()
    assert len(released) == 1210
    assert sum(torch.Size(shape).numel() for shape in released.values()) == 909_112_320
    unused = {"patch_embed.mask_token": (1, 1024)}
    full = build_meta(VggtConfig(), 24)
    assert {n: tuple(t.shape) for n, t in full.state_dict().items()} | unused == released
    early = build_meta(VggtConfig(), 23)
    assert len(early.state_dict()) == 1173
    assert sum(p.numel() for p in early.parameters()) == 883_914_240


def peak_bytes(layers, dtype):
    """Activations of 32 frames of 392 x 518 at full size, on fake tensors: nothing is computed.

    Fake tensors also have no values, so a host synchronisation (``.item()``) would raise here.
    """
    with FakeTensorMode(), torch.no_grad():
        aggregator = Aggregator(VggtConfig(), 24)
        for module in aggregator.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(module.weight.bfloat16())
                module.bias = nn.Parameter(module.bias.bfloat16())
        images = torch.empty(1, 32, 3, 392, 518)
        with PeakMemory(aggregator.parameters()) as memory:
            aggregator(images, layers, "both", dtype)
    return memory.peak


def test_one_kept_layer_needs_less_than_a_quarter_of_all():
    one = peak_bytes([22], torch.bfloat16)
    everything = peak_bytes(list(range(24)), torch.float32)
    assert one < 1.6e9
    assert one < everything / 4


def test_compiles_without_graph_breaks(encoder, golden):
    torch._dynamo.reset()
    compiled = torch.compile(encoder.aggregator, fullgraph=True, backend="eager", dynamic=False)
    images = golden["case0.images"]
    with torch.no_grad():
        expected, actual = encoder.aggregator(images, [2]), compiled(images, [2])
    assert torch.equal(expected[2], actual[2])


# --- layers, parts, groups ----------------------------------------------------------------------------


def test_layers_parts_and_early_exit(encoder, golden_file):
    video = [frames(3, 3, 56, 84)]
    full = encoder(video)[0]
    for layers, parts, columns in (
        ((-2,), "both", slice(None)),
        ((0, 1), "frame", slice(0, 64)),
        ((1,), "global", slice(64, 128)),
    ):
        part = load_vggt(
            golden_file, layers=layers, parts=parts, precision="fp32", output_dtype=torch.float32
        )
        features = part(video)[0]
        assert sorted(features.layers) == sorted(k % 3 for k in layers)
        assert part.feature_dim == full.layers[0][..., columns].shape[-1]
        for layer, value in features.layers.items():
            assert torch.equal(value, full.layers[layer][..., columns])
        assert len(part.aggregator.frame_blocks) == len(part.aggregator.global_blocks) == 2


def test_number_of_executed_blocks(encoder):
    calls = []
    for module in encoder.modules():
        if isinstance(module, Block):
            module.register_forward_hook(lambda *_: calls.append(1))
    encoder([frames(2, 3, 28, 28)], layers=[0])
    assert len(calls) == 2 + 2  # two ViT blocks, one pair


def test_first_frame_is_the_world_and_other_frames_are_a_set(encoder):
    video = frames(4, 3, 56, 70)
    base = encoder([video])[0].layers[2]
    order = [0, 3, 1, 2]
    permuted = encoder([video[order]])[0].layers[2]
    assert (permuted - base[order]).abs().max() < 1e-5
    moved = encoder([video[[1, 0, 2, 3]]])[0].layers[2]
    assert (moved - base[[1, 0, 2, 3]]).abs().max() > 0.1


def test_last_frame_as_world_reverses_and_restores_order(encoder):
    video = frames(3, 3, 56, 70)
    expected = encoder([video.flip(0)])[0].layers[2].flip(0)
    encoder.reference_frame = "last"
    assert torch.equal(encoder([video])[0].layers[2], expected)


def test_groups_of_equal_shape_share_a_pass_and_keep_their_order(encoder):
    videos = [frames(2, 3, 28, 42, seed=1), frames(1, 3, 28, 28), frames(2, 3, 28, 42, seed=2)]
    calls = []
    encoder.aggregator.register_forward_hook(lambda *_: calls.append(1))
    together = encoder(videos, return_special=True)
    assert len(calls) == 2
    for video, features in zip(videos, together, strict=True):
        alone = encoder([video], return_special=True)[0]
        assert (
            features.grid == alone.grid == (len(video), video.shape[2] // 14, video.shape[3] // 14)
        )
        assert (features.layers[2] - alone.layers[2]).abs().max() < 1e-5
        assert (features.special - alone.special).abs().max() < 1e-5
        assert features.special.shape == (len(video), 5, 128)


def test_a_pass_holds_a_limited_number_of_frames(encoder):
    videos = [frames(3, 3, 28, 28, seed=seed) for seed in range(5)]
    whole = [features.layers[2] for features in encoder(videos)]
    sizes = []
    encoder.aggregator.register_forward_hook(lambda _, args, out: sizes.append(args[0].shape[:2]))
    for limit, expected in {7: [(2, 3), (2, 3), (1, 3)], 1: [(1, 3)] * 5}.items():
        encoder.frames_per_pass = limit
        for features, reference in zip(encoder(videos), whole, strict=True):
            assert (features.layers[2] - reference).abs().max() < 1e-5
        assert sizes == expected
        sizes.clear()


def test_special_tokens_and_patches_are_rows_of_the_state(encoder):
    video = frames(2, 3, 56, 84)
    state = encoder.aggregator(video[None].float() / 255, [2])[2][0]
    features = encoder([video], layers=[-1], return_special=True)[0]
    assert torch.equal(features.special, state[:, :5])
    assert torch.equal(features.layers[2].flatten(1, 2), state[:, 5:])


def test_vit_chunks_do_not_change_the_result(encoder):
    video = [frames(5, 3, 28, 42)]
    whole = encoder(video)[0].layers[2]
    encoder.aggregator.vit_chunk = 1
    assert (encoder(video)[0].layers[2] - whole).abs().max() < 1e-5


# --- precision ----------------------------------------------------------------------------------------


def relative(aggregator, golden, layer=2):
    outputs = [
        (
            aggregator(golden[f"case{case}.images"], [layer])[layer],
            golden[f"case{case}.layer{layer}"],
        )
        for case in (0, 1)
    ]
    return max(((out - ref).norm() / ref.norm()).item() for out, ref in outputs)


def test_bf16_error_is_that_of_a_float32_residual(golden_file, golden, monkeypatch):
    encoder = load_vggt(golden_file, layers=(-1,), precision="bf16")
    with torch.no_grad():
        assert relative(encoder.aggregator, golden) < 0.0045
        plain = Block.forward
        monkeypatch.setattr(Block, "forward", lambda *args: plain(*args).bfloat16().float())
        assert relative(encoder.aggregator, golden) > 0.0045  # the bound would notice


def test_storage_dtypes_and_rotary_tables(golden_file, monkeypatch):
    encoder = load_vggt(golden_file, layers=(0,), precision="bf16")
    for module in encoder.modules():
        for parameter in module.parameters(recurse=False):
            expected = torch.bfloat16 if isinstance(module, nn.Linear) else torch.float32
            assert parameter.dtype == expected
    tables = []
    plain = blocks.Rope.rotate

    def spy(self, x):
        tables.append((self.cos.dtype, self.sin.dtype, x.dtype))
        return plain(self, x)

    monkeypatch.setattr(blocks.Rope, "rotate", spy)
    encoder([frames(1, 3, 28, 28)])
    assert set(tables) == {(torch.float32,) * 3}
    assert len(tables) == 4


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_an_ambient_autocast_changes_nothing(golden_file, precision):
    encoder = load_vggt(golden_file, layers=(-1,), precision=precision)
    video = [frames(2, 3, 56, 84)]
    plain = encoder(video)[0].layers[2]
    with torch.autocast("cpu", torch.bfloat16):
        inside = encoder(video)[0].layers[2]
    assert plain.dtype == torch.bfloat16
    assert torch.equal(plain, inside)


@pytest.mark.parametrize("before", ["tf32", "ieee", "none"])
def test_tf32_is_off_inside_and_restored_outside(encoder, before):
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    saved = matmul.fp32_precision, conv.fp32_precision
    seen = []
    encoder.aggregator.register_forward_pre_hook(
        lambda *_: seen.append((matmul.fp32_precision, conv.fp32_precision))
    )
    try:
        matmul.fp32_precision = conv.fp32_precision = before
        expected = matmul.fp32_precision, conv.fp32_precision
        encoder([frames(1, 3, 28, 28)])
        assert seen == [("ieee", "ieee")]
        assert (matmul.fp32_precision, conv.fp32_precision) == expected
    finally:
        matmul.fp32_precision, conv.fp32_precision = saved


def test_uint8_end_points_are_normalised_exactly(encoder):
    seen = []
    encoder.aggregator.patch_embed.patch_embed.register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    video = torch.zeros(2, 3, 14, 14, dtype=torch.uint8)
    video[1] = 255
    encoder([video])
    mean, std = torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)
    assert torch.equal(seen[0][0, :, 0, 0], (0 - mean) / std)
    assert torch.equal(seen[0][1, :, 0, 0], (1 - mean) / std)


def test_grid_of_the_stored_positions_is_used_as_it_is(encoder, monkeypatch):
    monkeypatch.setattr(F, "interpolate", None)
    assert encoder([frames(1, 3, 70, 70)])[0].grid == (1, 5, 5)


# --- frozen -------------------------------------------------------------------------------------------


def test_an_outer_model_cannot_train_the_encoder(encoder):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = encoder
            self.own = nn.Linear(2, 2)

    outer = Outer().train()
    assert outer.own.training
    assert not any(module.training for module in encoder.modules())
    features = encoder([frames(1, 3, 28, 28)])[0]
    assert not features.layers[0].requires_grad
    assert_frozen(encoder, outer.own.parameters())


def test_assert_frozen_names_what_is_wrong(encoder):
    with pytest.raises(GeometryError, match=r"aggregator\.camera_token .* is in the optimizer"):
        assert_frozen(encoder, encoder.parameters())
    encoder.aggregator.camera_token.ds_id = 0
    with pytest.raises(GeometryError, match="partitioned by DeepSpeed"):
        assert_frozen(encoder)
    del encoder.aggregator.camera_token.ds_id
    encoder.aggregator.register_token.requires_grad_()
    with pytest.raises(GeometryError, match=r"register_token .* requires grad"):
        assert_frozen(encoder)
    encoder.aggregator.training = True
    with pytest.raises(GeometryError, match="train mode"):
        assert_frozen(encoder)


# --- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(1, 3, 28, 28), r"takes uint8 RGB frames .* torch.float32"),
        (frames(1, 3, 30, 28), r"30x28 pixels .* multiples of 14"),
        (frames(0, 3, 28, 28), r"S >= 1, got shape \(0, 3, 28, 28\)"),
        (frames(3, 28, 28), r"\[S, 3, H, W\]"),
        (frames(1, 28, 28, 3), r"\[S, 3, H, W\]"),
    ],
)
def test_bad_frames(encoder, video, message):
    with pytest.raises(GeometryError, match=message):
        encoder([video])


@pytest.mark.parametrize("layers", [(3,), (-4,), ()])
def test_layer_out_of_range(encoder, golden_file, layers):
    with pytest.raises(ConfigError, match=r"layers -3\.\.2"):
        encoder([frames(1, 3, 28, 28)], layers=layers)
    with pytest.raises(ConfigError, match=r"layers -3\.\.2"):
        load_vggt(golden_file, layers=layers)


def test_layer_that_was_not_loaded(golden_file):
    early = load_vggt(golden_file, layers=(0,))
    with pytest.raises(ConfigError, match=r"layer 2 was not loaded.*\[0\]"):
        early([frames(1, 3, 28, 28)], layers=[-1])


def test_unknown_choices(golden_file):
    with pytest.raises(ConfigError, match="both, frame, global"):
        load_vggt(golden_file, layers=(0,), parts="half")
    with pytest.raises(ConfigError, match="bf16, fp32"):
        load_vggt(golden_file, layers=(0,), precision="fp16")
