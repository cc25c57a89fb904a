"""Print which parameters a recipe trains, by part, without loading weights.

python tools/show_params.py configs/stage2/qwen2_5vl_7b_interleaved.yaml
python tools/show_params.py configs/stage1/qwen3vl_8b_ssr2d.yaml optim.vision_lr=null
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from spatialvlm.config import TrainConfig, load_config
from spatialvlm.errors import SpatialVLMError, run_command

BACKBONES = Path(__file__).resolve().parents[1] / "configs" / "backbones"


def main() -> int:
    """Build the model of a recipe on the meta device and print its parameter table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="training recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    try:
        config = load_config(args.config, args.overrides, TrainConfig)
        from spatialvlm.models.build import build_meta_model
        from spatialvlm.training.build import build_groups
        from spatialvlm.training.optim import group_table

        model = build_meta_model(
            BACKBONES / f"{config.model.backbone}.json", config.geometry, config.lora
        )
        parts, groups = build_groups(config, model)
    except SpatialVLMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(group_table(parts, groups))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
