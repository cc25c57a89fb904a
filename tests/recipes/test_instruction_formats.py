"""Generated rows change their instruction format while training, and only there."""

import pytest

from spatialvlm.data import build
from spatialvlm.synthesis.formats import FormatExpander


@pytest.mark.parametrize(
    ("stage", "family", "dialect"), [(1, "qwen3vl", "qwen"), (2, "internvl3", "internvl")]
)
def test_training_rows_are_expanded_and_held_out_ones_are_not(
    run, recipe, rows, tmp_path, monkeypatch, stage, family, dialect
):
    used = []
    plain = build.build_data

    def spy(config, **options):
        names = [source.name for source in config.data.sources]
        used.append((names, options.get("expand_format")))
        return plain(config, **options)

    monkeypatch.setattr("spatialvlm.training.build.build_data", spy)
    later = f"[{{name: later, family: spatial, files: [spatial.jsonl], root: {rows}}}]"
    changes = [
        f"run.dir={tmp_path / 'run'}",
        "data.length.steps=1",
        f"evaluation.sources={later}",
        "evaluation.every_steps=1",
        "evaluation.max_samples=8",
    ]
    assert run(stage, recipe(stage, family), *changes) == 0
    training, *held_out = used
    assert training == (["squares", "chat"], FormatExpander(dialect))
    assert held_out
    assert all(one == (["later"], None) for one in held_out)
