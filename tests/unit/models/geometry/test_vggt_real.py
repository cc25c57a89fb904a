"""Released weights and a GPU, where there are any; real frames in any case."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from spatialvlm.models.geometry.vggt import Aggregator, Vggt, VggtConfig
from spatialvlm.models.geometry.vggt_checkpoint import load_vggt
from spatialvlm.sequence.sizes import SizePolicy


def real_frames(folder, count, size):
    """uint8 ``[S, 3, H, W]`` of the first pictures below a folder."""
    files = sorted(folder.glob("**/*.jpg"))[:count]
    pictures = [Image.open(file).convert("RGB").resize(size[::-1], Image.BICUBIC) for file in files]
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2)


@pytest.mark.real
def test_real_frames_through_the_small_encoder(real_dir, data_dir):
    folder = real_dir / "vlm3r_arkit_47334096"
    first = Image.open(min(folder.glob("**/*.jpg")))
    size = SizePolicy(policy="native", native_long=112).target(first.size[::-1], (8, 8))
    frames = real_frames(folder, 4, size)
    encoder = load_vggt(
        data_dir / "vggt_tiny.safetensors", layers=(-1,), output_dtype=torch.float32
    )
    features = encoder([frames])[0].layers[2]
    assert features.shape == (4, size[0] // 14, size[1] // 14, 128)
    assert features.isfinite().all()
    # Different pictures, different features: nothing collapses on natural images.
    flat = torch.nn.functional.normalize(features.flatten(1), dim=-1)
    assert (flat @ flat.T)[0, 1] < 0.999


@pytest.mark.weights
@pytest.mark.skipif("SPATIALVLM_VGGT" not in os.environ, reason="SPATIALVLM_VGGT names no weights")
def test_released_weights(real_dir):
    frames = real_frames(real_dir / "vlm3r_arkit_47334096", 4, (392, 518))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    features = {
        precision: load_vggt(
            os.environ["SPATIALVLM_VGGT"],
            layers=(22, 23),
            precision=precision,
            device=device,
            output_dtype=torch.float32,
        )([frames.to(device)])[0]
        for precision in ("bf16", "fp32")
    }
    for layer in (22, 23):
        low, high = (features[p].layers[layer] for p in ("bf16", "fp32"))
        assert low.isfinite().all()
        assert torch.cosine_similarity(low, high, dim=-1).min() > 0.999


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_full_size_on_a_gpu_without_host_synchronisation():
    config = VggtConfig()
    with torch.device("cuda"):
        aggregator = Aggregator(config, 23)
    for module in aggregator.modules():
        if isinstance(module, torch.nn.Linear):
            module.bfloat16()
    encoder = Vggt(aggregator, (22,))
    video = torch.randint(0, 256, (8, 3, 364, 504), dtype=torch.uint8, device="cuda")
    encoder([video])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.nn.attention.sdpa_kernel(
            [
                torch.nn.attention.SDPBackend.FLASH_ATTENTION,
                torch.nn.attention.SDPBackend.CUDNN_ATTENTION,
            ]
        ):
            features = encoder([video])[0].layers[22]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert features.shape == (8, 26, 36, 2048)
    assert features.isfinite().all()
