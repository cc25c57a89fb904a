"""Tags and captions from a vision-language model behind an OpenAI-compatible endpoint (off by default)."""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from spatialvlm.scenes.endpoint import Endpoint

MAX_TAGS = 24
_TAGS = (
    "List the kinds of furniture and large objects in this picture, one per line, lower case, singular, "
    "no numbers and no other words."
)
_CAPTION = (
    "The picture shows one {label}. Describe it in at most ten words that tell it apart from others of its "
    "kind: colour, material, form. Answer with the phrase only."
)


class EndpointTagger:
    """Asks which things are in a picture."""

    id = "endpoint-tags"

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint, self.version = endpoint, endpoint.model

    def tags(self, images: UInt8[np.ndarray, "B H W 3"]) -> list[list[str]]:
        """Labels per image, in the order of the answer, without repeats."""
        return [read_tags(self._endpoint.chat(_TAGS, images=[image])) for image in images]


class EndpointCaptioner:
    """Asks what an object looks like."""

    id = "endpoint-captions"

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint, self.version = endpoint, endpoint.model

    def captions(
        self, crops: Sequence[UInt8[np.ndarray, "h w 3"]], labels: Sequence[str]
    ) -> list[str]:
        """One line per object."""
        answers = [
            self._endpoint.chat(_CAPTION.format(label=label), images=[crop])
            for crop, label in zip(crops, labels, strict=True)
        ]
        return [" ".join(answer.split()).rstrip(".") for answer in answers]


def read_tags(answer: str) -> list[str]:
    """Labels of an answer that lists one per line or separates them by commas."""
    found: list[str] = []
    for line in re.split(r"[\n,;]", answer):
        label = re.sub(r"^[\s\-*\d.)]+|[\s.]+$", "", line).lower()
        if label and len(label) <= 40 and label not in found:
            found.append(label)
    return found[:MAX_TAGS]
