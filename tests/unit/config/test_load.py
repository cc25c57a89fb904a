import pytest

from spatialvlm.config import TrainConfig, dump_yaml, load_config, read_yaml
from spatialvlm.config.load import parse_yaml
from spatialvlm.errors import ConfigError

MINIMAL = """
stage: 1
run: {dir: runs/x}
model: {backbone: qwen3vl_8b, init_from: some/model}
optim: {lr: 1e-4}
data:
  families: {spatial: 1}
  sources:
    - {name: a, family: spatial, files: [x.jsonl], root: data}
"""


@pytest.fixture
def recipe(tmp_path):
    def write(text: str = MINIMAL):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def test_minimal_recipe_takes_the_documented_defaults(recipe):
    config = load_config(recipe(), [], TrainConfig)
    assert config.optim.lr == 1e-4
    assert config.optim.vision_lr is None
    assert config.shared_prefix.max_branches == 8
    assert config.optim.lr_by_part()["language_model"] == 1e-4


def test_every_problem_is_listed_once_with_its_key(recipe):
    text = MINIMAL.replace(
        "lr: 1e-4", "lr: -1, vision_lrr: 2e-5, projector_lr: true, embedding_lr: '1e-4'"
    )
    text += "geometry: {encoder: vgt, cache: {dirr: x}}\nstep: {global_batch_size: 0}\n"
    with pytest.raises(ConfigError) as error:
        load_config(
            recipe(text), ["data.sources.0.formt=auto", "loader.num_workers=many"], TrainConfig
        )
    message = str(error.value)
    assert "has 9 problems" in message
    for expected in (
        "optim.vision_lrr        unknown key; did you mean 'vision_lr'?",
        "optim.lr                must be greater than 0.0, got -1",
        "geometry.encoder        'vgt' is not one of: dinov2, none, vggt",
        "geometry.cache.dirr     unknown key; did you mean 'dir'?",
        "data.sources.0.formt    unknown key; did you mean 'format'?",
        "step.global_batch_size",
        "optim.projector_lr",
        "optim.embedding_lr",
        "loader.num_workers",
    ):
        assert expected in message, message


def test_missing_required_key(recipe):
    with pytest.raises(ConfigError, match=r"run\.dir\s+is required and has no default"):
        load_config(recipe(MINIMAL.replace("{dir: runs/x}", "{}")), [], TrainConfig)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["optim.lr=null"], "optim "),
        (["optim.geometry_lr=1e-4"], "optim.geometry_lr"),
        (["geometry.encoder=vggt"], "geometry "),
        (["stage=2"], "geometry "),
        (["stage=2", "geometry.encoder=none", "geometry.default_flag=on"], "geometry.default_flag"),
        (
            ["stage=2", "geometry.camera_token=true", "geometry.insertion=in_place"],
            "geometry.camera_token",
        ),
        (["data.sources.0.geometry='on'"], "data.sources.a.geometry"),
        (["data.sources.0.geometry=on"], "data.sources.a.geometry"),
        (["data.length.samples=5", "data.length.epochs=1"], "data.length"),
        (["data.families.general=1"], "data.families.general"),
        (["data.sources.0.family=other"], "data.sources.a.family"),
        (["packing.max_length=20000"], "packing.max_length"),
        (["data.media.frames=fps"], "data.media.fps"),
        (["step.unit=packs"], "step.packs_per_step"),
        (["data.unit=tokens", "data.lengths=lazy"], "data.unit"),
        (["lora.parts=[vision_encoder]"], "lora.parts"),
        (["lora.parts=[embeddings]", "optim.embedding_lr=1e-5"], "lora.parts"),
        (["lora.dropout=0.1"], "lora.dropout"),
        (["schedule.warmup_steps=3", "schedule.warmup_ratio=0.1"], "schedule.warmup_steps"),
        (["evaluation.every_steps=5"], "evaluation.every_steps"),
        (["shared_prefix.min_media_per_step=500"], "shared_prefix.min_media_per_step"),
    ],
)
def test_contradictions_name_their_key(recipe, overrides, key):
    with pytest.raises(ConfigError) as error:
        load_config(recipe(), overrides, TrainConfig)
    assert f"\n  {key}" in str(error.value) + " ", str(error.value)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a: ${oc.env:HOME}", "interpolation"),
        ("a: &x 1\nb: *x", "anchor"),
        ("a: 1\na: 2", "duplicate"),
        ("a: !!python/object/apply:os.system ['true']", "tag"),
        ("- 1\n- 2", "sections"),
        ("a: [", "not a valid recipe"),
    ],
)
def test_yaml_that_could_do_more_than_state_values_is_refused(text, match):
    with pytest.raises(ConfigError, match=match):
        parse_yaml(text, where="x.yaml")


def test_unreadable_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        read_yaml(tmp_path / "nowhere.yaml")


def test_overrides_reach_lists_and_later_ones_win(recipe):
    config = load_config(
        recipe(), ["data.sources.0.repeat=2.5", "run.seed=1", "run.seed=7"], TrainConfig
    )
    assert config.data.sources[0].repeat == 2.5
    assert config.run.seed == 7


@pytest.mark.parametrize("override", ["run.dir", "=3", "a b=1", "run..dir=x"])
def test_malformed_override(recipe, override):
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        load_config(recipe(), [override], TrainConfig)


def test_a_token_on_the_command_line_is_refused(recipe):
    with pytest.raises(ConfigError, match="environment") as error:
        load_config(recipe(), ["log.wandb.entity=hf_abcdefghijklmnop"], TrainConfig)
    assert "abcdefgh" not in str(error.value)


def test_resolved_config_reads_back_equal(recipe, tmp_path):
    config = load_config(recipe(), ["stage=2", "geometry.layers=[-2, 22]", "lora.r=8"], TrainConfig)
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_yaml(config))
    assert load_config(path, [], TrainConfig) == config


def test_sections_are_immutable(recipe):
    config = load_config(recipe(), [], TrainConfig)
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 3
