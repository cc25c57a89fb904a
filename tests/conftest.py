"""Fixtures shared by all tests: threads, real and golden data, tiny checkpoints."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", os.environ.get("SPATIALVLM_TEST_GPU", ""))

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "real"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Fixtures that are part of the repository."""
    return ROOT / "tests" / "data"


@pytest.fixture(scope="session")
def real_dir() -> Path:
    """Real images, videos and scenes; not part of the repository."""
    if not REAL.is_dir():
        pytest.skip("real samples are not beside the checkout (../shared/real)")
    return REAL


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """Function family -> directory of a tiny random Hugging Face checkpoint, built once per session."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            from spatialvlm.testing import make_checkpoint

            made[family] = tmp_path_factory.mktemp(f"tiny_{family}")
            make_checkpoint(family, made[family], seed=0)
        return made[family]

    return get


@pytest.fixture(scope="session")
def tiny_vggt(tmp_path_factory) -> Path:
    """A tiny random VGGT file in the released layout."""
    from spatialvlm.testing import make_vggt

    path = tmp_path_factory.mktemp("tiny_vggt") / "model.safetensors"
    make_vggt(path, seed=0)
    return path
