"""The values of every shipped recipe, written down a second time; and a dry run of each at full size."""

import re
from pathlib import Path

import pytest

from spatialvlm.config import TrainConfig, load_config
from spatialvlm.sequence.pixels import PixelSpec
from spatialvlm.training import dry_run as dry_run_module
from spatialvlm.training.dry_run import pack_flops, planned_steps
from spatialvlm.training.session import build_schedule
from spatialvlm.typing import CostCoefficients

ROOT = Path(__file__).resolve().parents[2]
ALL = sorted(p for d in ("stage1", "stage2", "tiny") for p in (ROOT / "configs" / d).glob("*.yaml"))
BIG = ("qwen2_5vl_7b", "qwen3vl_8b", "internvl3_8b")

# lr, vision, projector, embeddings, geometry, weight decay, warm-up, epochs, families, (unit, per step), pack tokens
SSR2D = (2e-5, 2e-6, 2e-5, 2e-5, None, 0.0, 0.03, 1, {"spatial": 1}, ("packs", 128), 16384)
OPENSPATIAL = (
    5e-5,
    5e-6,
    5e-6,
    5e-5,
    None,
    0.0,
    0.1,
    1,
    {"spatial": 1, "general": 1},
    ("packs", 128),
    16384,
)
STAGE2 = (1e-5, 1e-6, 1e-5, 1e-5, 1e-5, 0.0, 0.03, 3, {"spatial": 1}, ("samples", 128), 16384)
SCRATCH = (*STAGE2[:4], 5e-5, *STAGE2[5:])
BOTH = {"spatial": 1, "general": 1}
LORA1 = (2e-5, None, 2e-5, None, None, 0.0, 0.03, 1, BOTH, ("samples", 64), 8192)
LORA2 = (2e-5, None, 2e-5, None, 5e-5, 0.0, 0.03, 1, BOTH, ("samples", 64), 8192)
TABLE = {
    **{f"stage1/{f}_ssr2d": SSR2D for f in (*BIG, "qwen2_5vl_3b")},
    **{f"stage1/{f}_openspatial": OPENSPATIAL for f in (*BIG, "qwen2_5vl_3b")},
    "stage1/qwen3vl_8b_sensenova_si": (1e-5, 1e-5, 1e-5, 1e-5, None, 0.0, 0.01, 1, {"spatial": 1}, ("samples", 128), 32768),
    "stage1/internvl3_8b_sensenova_si": (5e-6, None, 5e-6, 5e-6, None, 0.05, 0.03, 1, {"spatial": 1}, ("samples", 128), 16384),
    "stage1/internvl3_8b_internspatial": (2e-5, None, 2e-5, 2e-5, None, 0.05, 0.03, 1, BOTH, ("samples", 128), 16384),
    "stage1/qwen2_5vl_7b_internspatial": (1e-5, None, 1e-5, 1e-5, None, 0.0, 0.03, 1, BOTH, ("samples", 128), 16384),
    **{f"stage2/{f}_interleaved": STAGE2 for f in ("qwen2_5vl_7b", "qwen3vl_8b", "qwen2_5vl_3b")},
    "stage2/internvl3_8b_interleaved": (*STAGE2[:10], 20480),
    **{f"stage2/qwen2_5vl_7b_{k}": STAGE2 for k in ("sequential", "in_place", "no_stage1")},
    "stage2/qwen2_5vl_7b_interleaved_scratch": SCRATCH,
    **{f"stage1/{f}_lora": LORA1 for f in ("qwen2_5vl_7b", "qwen2_5vl_3b")},
    **{f"stage2/{f}_lora": LORA2 for f in ("qwen2_5vl_7b", "qwen2_5vl_3b")},
}  # fmt: skip
# Key -> who states its value: P the paper, S a released script; everything else is ours.
SSR1_MARKS = {"length": "P", "families": "P", "media": "P", "sources": "P"}
STAGE2_MARKS = {**SSR1_MARKS, "geometry": "P"}
OPENSPATIAL_MARKS = {
    "model": "P", "lr": "P", "vision_lr": "P", "projector_lr": "S", "embedding_lr": "S", "schedule": "S", "length": "P",
    "families": "P", "media": "S", "sources": "P", "step": "SP",
}  # fmt: skip
SENSENOVA_MARKS = dict.fromkeys(("model", "lr", "projector_lr", "embedding_lr", "length", "families", "media", "sources"), "S")  # fmt: skip
INTERNVL_MARKS = {
    "lr": "S",
    "projector_lr": "S",
    "embedding_lr": "S",
    "weight_decay": "S",
    "step": "S",
}
MARKS = {
    **{name: SSR1_MARKS for name in TABLE if name.endswith("ssr2d")},
    **{name: OPENSPATIAL_MARKS for name in TABLE if name.endswith("openspatial")},
    **{name: STAGE2_MARKS for name in TABLE if name.startswith("stage2/")},
    **{name: {"lora": "S", "lr": "S"} for name in TABLE if name.endswith("_lora")},
    "stage1/qwen3vl_8b_sensenova_si": {**SENSENOVA_MARKS, "vision_lr": "S", "schedule": "S"},
    "stage1/internvl3_8b_sensenova_si": {**SENSENOVA_MARKS, **INTERNVL_MARKS, "checkpoint": "S"},
    "stage1/internvl3_8b_internspatial": {
        **INTERNVL_MARKS, "model": "P", "length": "S", "media": "S", "sources": "P",
    },
    "stage1/qwen2_5vl_7b_internspatial": {"model": "P", "length": "S", "sources": "P", "step": "S"},
}  # fmt: skip
# What the media section sets, by the end of a recipe's name; everything else is the checkpoint's.
UNIFORM = {"num_frames": 32}
FPS2 = {"frames": "fps", "fps": 2.0}
MEDIA = {
    **{f"stage1/{f}_ssr2d": UNIFORM for f in (*BIG, "qwen2_5vl_3b")},
    **{name: UNIFORM for name in TABLE if name.startswith("stage2/")},
    **{f"stage1/{f}_openspatial": FPS2 | {"max_pixels": 3_211_264, "video_total_pixels": 10_276_044} for f in ("qwen2_5vl_7b", "qwen2_5vl_3b")},
    "stage1/qwen3vl_8b_openspatial": FPS2 | {"max_pixels": 3_211_264, "video_total_pixels": 13_421_772},
    "stage1/internvl3_8b_openspatial": FPS2 | {"max_tiles": 12},
    "stage1/qwen3vl_8b_sensenova_si": {"frames": "fps", "fps": 1.0, "max_frames": 512, "video_max_pixels": 50_176, "video_total_pixels": 512 * 50_176},
    "stage1/internvl3_8b_sensenova_si": {"max_tiles": 12},
    "stage1/internvl3_8b_internspatial": {"max_tiles": 12},
    "stage1/qwen2_5vl_7b_internspatial": {"max_pixels": 401_408},
    **{name: {"num_frames": 16} for name in TABLE if name.endswith("_lora")},
}  # fmt: skip
SOURCES = {
    "ssr2d": "spar 3d_llm sqa3d scanqa vla_3d scanrefer referit3d multi3drefer",
    "openspatial": "openspatial sensenova onevision",
    "sensenova_si": "sensenova",
    "internspatial": "internspatial general",
    "lora": "spatial general",
}
STAGE2_SOURCES = "cogmap vica vlm3r vsi590k"
DROPS_FRAMES = ("ssr2d", "lora", "interleaved", "sequential", "in_place", "scratch", "no_stage1")
SAVES = {"sensenova_si": (500, 2), "lora": (200, 2)}
INSERTION = {
    "stage2/qwen2_5vl_7b_sequential": "sequential",
    "stage2/qwen2_5vl_7b_in_place": "in_place",
}


LAUNCHERS = {"gpu1": "ddp"}


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs").with_suffix(""))


def test_table_and_folder_hold_the_same_recipes():
    assert {_name(p) for p in ALL if p.parent.name != "tiny"} == set(TABLE)
    tiny = {p.stem for p in ALL if p.parent.name == "tiny"}
    staged = {f"stage{s}_{f}" for s in (1, 2) for f in ("qwen2_5vl", "qwen3vl", "internvl3")}
    assert tiny == staged | {f"pretrain{rung}_qwen3vl" for rung in (1, 2, 3)}


@pytest.mark.parametrize("name", sorted(TABLE))
def test_values(name):
    config = load_config(ROOT / "configs" / f"{name}.yaml", [], TrainConfig)
    optim = config.optim
    assert (
        optim.lr, optim.vision_lr, optim.projector_lr, optim.embedding_lr, optim.geometry_lr, optim.weight_decay,
        config.schedule.warmup_ratio, config.data.length.epochs, config.data.families,
        (config.step.unit, config.step.packs_per_step or config.step.global_batch_size), config.packing.max_tokens,
    ) == TABLE[name]  # fmt: skip
    assert (optim.betas, optim.eps, optim.max_grad_norm) == ((0.9, 0.999), 1e-8, 1.0)
    assert (config.run.seed, config.precision, config.data.loss_weighting) == (42, "bf16", "token")
    assert config.memory.checkpoint_language_model
    assert config.shared_prefix.enabled == ("sensenova_si" not in name)
    assert (config.lora is not None) == name.endswith("lora")
    if config.lora is not None:
        assert (config.lora.parts, config.lora.r, config.lora.alpha, config.lora.dropout) == (("language_model",), 128, 256.0, 0.0)  # fmt: skip
    assert config.data.media.model_dump(exclude_unset=True) == MEDIA[name]
    kind = next((k for k in SOURCES if name.endswith(k)), None)
    assert " ".join(s.name for s in config.data.sources) == SOURCES.get(kind, STAGE2_SOURCES)
    assert config.data.overlong == ("drop_frames" if name.endswith(DROPS_FRAMES) else "reject")
    saves = (1000, 3) if name == "stage1/internvl3_8b_sensenova_si" else SAVES.get(kind, (500, 2))
    assert (config.checkpoint.every, config.checkpoint.keep_last) == saves
    assert config.schedule.kind == "cosine"
    assert (config.geometry is not None) == name.startswith("stage2/")
    if config.geometry is not None:
        assert config.geometry.layers == (22,)
        assert config.geometry.fusion == "pre_projector"
        assert config.geometry.insertion == INSERTION.get(name, "interleaved")
        assert config.geometry.init == ("scratch" if name.endswith("scratch") else "warm")


@pytest.mark.parametrize("name", sorted(TABLE))
def test_every_stated_value_names_its_source(name):
    """``# P`` behind a value of the paper, ``# S`` behind one of a released script, nothing or ``# O`` behind ours."""
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    assert "# Marks     P = stated by the paper, S = from a released script, O = ours" in text
    found = {}
    for line in text.splitlines():
        key, _, comment = line.partition("#")
        marks = "".join(re.findall(r"\b[PS]\b", comment))
        if marks and key.strip() and not key.strip().startswith("-"):
            found[key.split(":")[0].strip()] = marks[:2] if len(set(marks)) > 1 else marks[0]
    assert found == MARKS[name]


@pytest.mark.parametrize("path", ALL, ids=_name)
def test_command_of_the_header_is_real(path):
    text = path.read_text()
    command = next(line for line in text.splitlines() if line.startswith("# Command")).split()
    named = [ROOT / word for word in command if word.endswith((".yaml", ".py"))]
    assert path in named
    assert all(p.is_file() for p in named)
    stage = "stage2" if "stage2" in _name(path) else "stage1"
    assert f"recipes/{stage}.py" in text


@pytest.mark.smoke
@pytest.mark.parametrize("path", ALL, ids=_name)
def test_dry_run_at_full_size(path, run, capsys, monkeypatch):
    """No weights, no data, no GPU: groups with rates, mixture, memory for every strategy; it fits the header's GPUs."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", "32")  # one more number of devices in the table of memory
    stage = 2 if "stage2" in str(path.relative_to(ROOT)) else 1
    assert run(stage, path, "--dry-run") == 0
    out = capsys.readouterr().out
    config = load_config(path, [], TrainConfig)
    for part, rate in config.optim.lr_by_part().items():
        if rate is not None and config.lora is None:
            assert f"{part}/" in out, part
    if config.lora is not None:
        assert "lora/no_decay" in out
    assert "mixture by samples" in out
    for word in ("ddp", "zero1", "zero2", "zero3", "fsdp2", "with recomputation"):
        assert word in out
    hardware = re.search(r"# Hardware  (\d+) GPUs? with (\d+) GB", path.read_text())
    assert (hardware is None) == (path.parent.name == "tiny")
    if hardware is not None:
        launcher = re.search(r"accelerate/([a-z]+[0-9])", path.read_text())[1]
        row = re.search(
            rf"^{LAUNCHERS.get(launcher, launcher)} +{hardware[1]} +\S+ +\S+ +(\S+)",
            out,
            flags=re.M,
        )
        assert float(row[1]) <= 0.9 * int(hardware[2])  # the rest is for what nobody counts


def test_the_time_of_a_pack_includes_the_geometry_encoder():
    """A 16k pack of stage 2 is one video of 32 frames with 1,024 patches each; VGGT sees 32,768 tokens of it."""
    config = load_config(ROOT / "configs/stage2/qwen2_5vl_7b_interleaved.yaml", [], TrainConfig)
    pixels = PixelSpec("patches", (0.5,) * 3, (0.5,) * 3, 14)
    only = CostCoefficients(0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1e6, 1e12)
    expected = 32_768 + 1e6 * 32 * 1024**2 + 1e12 * 32_768**2
    assert pack_flops(config, only, pixels) == pytest.approx(expected)
    vision = CostCoefficients(0.0, 0.0, 0.0, 1.0, 0.0)
    assert pack_flops(config, vision, pixels) == 16_384
    beside = load_config(ROOT / "configs/stage2/qwen2_5vl_7b_in_place.yaml", [], TrainConfig)
    assert pack_flops(beside, vision, pixels) == 32_768  # no spatial twins among the tokens


@pytest.mark.parametrize(
    ("name", "rows", "steps", "warmup"),
    [
        ("stage1/qwen3vl_8b_sensenova_si", 832_132, 6501, 66),
        ("stage1/internvl3_8b_sensenova_si", 832_132, 6501, 196),
        ("stage2/qwen2_5vl_7b_interleaved", 917_000, 21_492, 645),
        ("stage1/qwen2_5vl_7b_internspatial", 100_000, 1562, 47),  # 1:1 with general data
    ],
)
def test_steps_follow_from_rows(name, rows, steps, warmup, monkeypatch):
    config = load_config(ROOT / "configs" / f"{name}.yaml", [], TrainConfig)
    first = config.data.sources[0].name
    monkeypatch.setattr(
        dry_run_module, "rows_of", lambda source: rows if source.name == first else 0
    )
    assert planned_steps(config) == steps
    assert build_schedule(config, steps).warmup_steps == warmup


def test_dry_run_tells_the_disk_space(run, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = ROOT / "configs" / "stage1" / "qwen2_5vl_3b_ssr2d.yaml"
    assert run(1, recipe, "export.dtype=fp32", "--dry-run") == 0
    out = capsys.readouterr().out
    assert (
        "checkpoints: 45.1 GB each, every 500 steps" in out
    )  # 12 bytes of 3,754,622,976 parameters
    assert "runs/qwen2_5vl_3b_ssr2d/final, about 15.0 GB, twice the size of bf16" in out
    assert "steps: unknown, a step is a number of packs" in out
