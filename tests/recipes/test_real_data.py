"""Stage 2 on real photographs, walks and videos, in the formats of published data sets: the loss falls.

Some of these frames show VSI-Bench scenes, so a recipe that does not say otherwise must refuse them.
"""

import json

import pytest

RECIPE = """
stage: 2
run: {{dir: unset}}
model: {{backbone: tiny_{family}, init_from: {model}}}
precision: fp32
optim: {{lr: 2.0e-3, vision_lr: 2.0e-4, projector_lr: 1.0e-3, embedding_lr: 2.0e-3, geometry_lr: 2.0e-3, weight_decay: 0.0}}
geometry: {{source: {vggt}, precision: fp32, layers: [-1], size_policy: match_grid}}
data:
  length: {{steps: 8}}
  families: {{spatial: 1}}
  index_dir: {index}
  media: {{num_frames: 4}}
  sources:
    - {{name: walks, family: spatial, files: [formats/sensenova_si.jsonl], root: {root}, base: formats, geometry: 'on'}}
    - {{name: clips, family: spatial, files: [formats/llava_video.json], root: {root}, base: formats}}
    - {{name: cells, family: spatial, files: [formats/vst.parquet], root: {root}, base: formats}}
    - {{name: mixed, family: spatial, files: [formats/openai_messages.jsonl], root: {root}, base: formats}}
step: {{global_batch_size: 8}}
packing: {{max_tokens: 2048}}
memory: {{checkpoint_language_model: false}}
loader: {{num_workers: 0}}
log: {{every: 1, progress: none}}
"""


@pytest.fixture(params=["qwen3vl", "qwen2_5vl", "internvl3"])
def real_recipe(request, tmp_path, real_dir, tiny_checkpoint, tiny_vggt):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        RECIPE.format(
            family=request.param,
            model=tiny_checkpoint(request.param),
            vggt=tiny_vggt,
            index=tmp_path / "index",
            root=real_dir,
        )
    )
    return path


@pytest.mark.real
def test_loss_falls_on_real_media(run, real_recipe, tmp_path):
    out = tmp_path / "run"
    assert run(2, real_recipe, f"run.dir={out}", "data.decontamination.on_hit=allow") == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(8))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    seen = {key for line in lines for key in line if key.startswith("loss/source/")}
    assert seen == {f"loss/source/{name}" for name in ("walks", "clips", "cells", "mixed")}
    assert all(line["grad_norm/geometry_fusion"] > 0 for line in lines)
    assert not (out / "quarantine.jsonl").exists()


@pytest.mark.real
def test_evaluation_scenes_are_refused(run, real_recipe, tmp_path, capsys):
    assert run(2, real_recipe, f"run.dir={tmp_path / 'run'}") == 3
    said = capsys.readouterr()
    assert "evaluation scenes" in said.err + said.out
    assert "walks/sensenova_si#0" in said.err + said.out
