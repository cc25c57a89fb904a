r"""Let a language model rewrite the scene captions of generated rows; facts are checked, nothing else changes.

    python tools/rewrite_captions.py data/qa/train --scenes data/rooms/train --out data/qa/train_rewritten \
        --endpoint http://localhost:8000/v1 --model my-model

The endpoint speaks the OpenAI chat protocol; a key is read from SPATIALVLM_ENDPOINT_KEY. A caption whose
numbers, labels or relations changed, or their order within a sentence, is refused and the one made of facts
stays. An interrupted run continues with the files that are missing. ``tools/verify_qa.py`` accepts the result and checks it by the same rule.
"""

import argparse
import sys
from pathlib import Path

from spatialvlm.errors import SpatialVLMError, run_command
from spatialvlm.scenes.endpoint import Endpoint
from spatialvlm.synthesis.caption_rewrite import INSTRUCTION, rewrite_rows


def main(argv: list[str] | None = None) -> int:
    """Rewrite; exit 2 when the endpoint or the rows are not there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path, help="folder written by synthesize.py")
    parser.add_argument("--scenes", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--endpoint", required=True, help="address up to /v1")
    parser.add_argument("--model", required=True)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds per answer")
    arguments = parser.parse_args(argv)
    if arguments.out.resolve() == arguments.rows.resolve():
        parser.error("--out must be another folder than the rows")
    endpoint = Endpoint(arguments.endpoint, arguments.model, timeout_s=arguments.timeout)
    try:
        counts = rewrite_rows(
            arguments.rows,
            arguments.scenes,
            arguments.out,
            lambda caption: endpoint.chat(INSTRUCTION + caption),
        )
    except SpatialVLMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    for reason, number in counts.items():
        print(f"{reason:20s} {number}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
