"""Neural backends from transformers: Depth Anything V2, Depth Pro, Grounding DINO, SAM 2.

Everything heavy is imported inside the constructors. ``checkpoint`` is a folder or a hub id; the backend's
version is the checkpoint name and a hash of its weights. SAM 2 keeps its image embeddings, so refining masks
does not encode a frame again; Depth Pro gives depth and focal length in one pass.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from spatialvlm.errors import BackendUnavailableError
from spatialvlm.scenes.lifting.features import Features, FeatureStore
from spatialvlm.scenes.lifting.protocols import Detection, Mask
from spatialvlm.scenes.transforms import Array

BOX_THRESHOLD = 0.3
TEXT_THRESHOLD = 0.25


def _load(model_class: str, checkpoint: str, device: str) -> tuple[Any, Any]:
    """Processor and model in evaluation mode.

    Raises:
        BackendUnavailableError: transformers, the class, or the weights are missing.
    """
    try:
        import transformers

        processor_class = (
            "AutoImageProcessor"
            if model_class in ("AutoModelForDepthEstimation", "DepthProForDepthEstimation")
            else "AutoProcessor"
        )
        processor = getattr(transformers, processor_class).from_pretrained(checkpoint)
        model = getattr(transformers, model_class).from_pretrained(checkpoint)
    except (ImportError, AttributeError, OSError) as error:
        raise BackendUnavailableError(
            f"{model_class} from {checkpoint!r} is not available: {error}. Install transformers with vision "
            "support and pass a local folder or a hub id whose weights can be read."
        ) from error
    return processor, model.eval().to(device)


def _version(checkpoint: str, model: Any) -> str:
    """Name and weights: another fine-tune of the same name must not reuse stored results."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(_uint8()).numpy().tobytes())
    return f"{checkpoint.rstrip('/').split('/')[-1]}-{digest.hexdigest()}"


def _uint8() -> Any:
    import torch

    return torch.uint8


class DepthAnythingDepth:
    """Depth Anything V2; ``metric`` checkpoints give metres."""

    id = "depth-anything-v2"

    def __init__(self, checkpoint: str, *, metric: bool, device: str = "cpu") -> None:
        self._processor, self._model = _load("AutoModelForDepthEstimation", checkpoint, device)
        self.metric, self._device = metric, device
        reading = "metric" if metric else "relative"
        self.version = f"{_version(checkpoint, self._model)}-{reading}"

    def depth(self, images: Array) -> Array:
        """Z-depth at the size of the images; relative checkpoints give inverse depth, turned round here."""
        import torch

        inputs = self._processor(images=list(images), return_tensors="pt").to(self._device)
        with torch.inference_mode():
            predicted = self._model(**inputs).predicted_depth[:, None]
            resized = torch.nn.functional.interpolate(
                predicted, images.shape[1:3], mode="bilinear"
            )[:, 0]
        values: Array = resized.float().cpu().numpy()
        return values if self.metric else 1.0 / np.maximum(values, 1e-3)


class DepthPro:
    """Depth Pro: metric depth and, from the same pass, the focal length of single images.

    Args:
        checkpoint: Folder or hub id; needs the field-of-view head.
        device: Where the model runs.
        store: Keeps results, so that depth and calibration of an image take one pass.
    """

    id = "depth-pro"
    metric = True

    def __init__(
        self, checkpoint: str, device: str = "cpu", store: FeatureStore | None = None
    ) -> None:
        self._processor, self._model = _load("DepthProForDepthEstimation", checkpoint, device)
        if not self._model.config.use_fov_model:
            raise BackendUnavailableError(
                f"{checkpoint} has no field-of-view head; the focal length needs it."
            )
        self._device, self._store = device, store or FeatureStore()
        self.version = _version(checkpoint, self._model)

    def depth(self, images: Array) -> Array:
        """Z-depth in metres at the size of the images."""
        return np.stack([found["depth"] for found in self._both(images)])

    def intrinsics(self, images: Array) -> Array:
        """Pinhole matrices ``[B, 3, 3]`` with square pixels and the principal point in the middle."""
        height, width = images.shape[1:3]
        focals = [float(found["focal"]) for found in self._both(images)]
        return np.array([[[f, 0, width / 2], [0, f, height / 2], [0, 0, 1]] for f in focals])

    def _both(self, images: Array) -> list[Features]:
        import torch

        def compute(missing: list[int]) -> list[Features]:
            chosen = images[missing]
            inputs = self._processor(images=list(chosen), return_tensors="pt").to(self._device)
            with torch.inference_mode():
                outputs = self._model(**inputs)
            found = self._processor.post_process_depth_estimation(
                outputs, target_sizes=[chosen.shape[1:3]] * len(chosen)
            )
            return [
                {
                    "depth": item["predicted_depth"].float().cpu().numpy(),
                    "focal": np.array(float(item["focal_length"])),
                }
                for item in found
            ]

        return self._store.lookup([self._store.key(self, image) for image in images], compute)


class GroundingDinoDetector:
    """Grounding DINO: boxes for a list of labels."""

    id = "grounding-dino"

    def __init__(self, checkpoint: str, device: str = "cpu") -> None:
        self._processor, self._model = _load(
            "AutoModelForZeroShotObjectDetection", checkpoint, device
        )
        self._device = device
        self.version = _version(checkpoint, self._model)

    def detect(self, images: Array, labels: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """Boxes per image; phrases that are not one of the asked labels are left out."""
        return [
            self._detect_one(image, list(asked))
            for image, asked in zip(images, labels, strict=True)
        ]

    def _detect_one(self, image: Array, labels: list[str]) -> list[Detection]:
        import torch

        if not labels:
            return []
        text = ". ".join(labels) + "."
        inputs = self._processor(images=image, text=text, return_tensors="pt").to(self._device)
        with torch.inference_mode():
            outputs = self._model(**inputs)
        found = self._processor.post_process_grounded_object_detection(
            outputs,
            inputs["input_ids"],
            threshold=BOX_THRESHOLD,
            text_threshold=TEXT_THRESHOLD,
            target_sizes=[image.shape[:2]],
        )[0]
        names = found["text_labels"] if "text_labels" in found else found["labels"]
        height, width = image.shape[:2]
        detections = []
        for box, score, name in zip(
            found["boxes"].tolist(), found["scores"].tolist(), names, strict=True
        ):
            x0, y0, x1, y1 = np.clip(box, 0, [width, height, width, height]).tolist()
            label = match_label(str(name), labels)
            if label is not None and x1 > x0 and y1 > y0:
                detections.append(Detection(label, (x0, y0, x1, y1), float(score)))
        return detections


def match_label(phrase: str, labels: Sequence[str]) -> str | None:
    """The asked label that a decoded phrase stands for: the shortest one that has all its words."""
    words = set(phrase.replace(".", " ").split())
    fitting = [label for label in labels if words and words <= set(label.split())]
    return min(fitting, key=lambda label: (len(label), label), default=None)


class Sam2Segmenter:
    """SAM 2 with box prompts.

    Args:
        checkpoint: Folder or hub id.
        device: Where the model runs.
        store: Keeps image embeddings between calls; ``None`` encodes every image anew.
    """

    id = "sam2"

    def __init__(
        self, checkpoint: str, device: str = "cpu", store: FeatureStore | None = None
    ) -> None:
        self._processor, self._model = _load("Sam2Model", checkpoint, device)
        self._device, self._store = device, store
        self.version = _version(checkpoint, self._model)

    def segment(self, images: Array, boxes: Sequence[Sequence[Detection]]) -> list[list[Mask]]:
        """One mask per detection, with the model's own estimate of its quality as score."""
        return [
            self._segment_one(image, list(found))
            for image, found in zip(images, boxes, strict=True)
        ]

    def _segment_one(self, image: Array, boxes: list[Detection]) -> list[Mask]:
        import torch

        if not boxes:
            return []
        prompts = [[list(detection.bbox) for detection in boxes]]
        inputs = self._processor(images=image, input_boxes=prompts, return_tensors="pt").to(
            self._device
        )
        with torch.inference_mode():
            outputs = self._model(
                input_boxes=inputs["input_boxes"],
                image_embeddings=self._embeddings(image, inputs["pixel_values"]),
                multimask_output=False,
            )
        masks = self._processor.post_process_masks(
            outputs.pred_masks.cpu(), inputs["original_sizes"].cpu()
        )[0]
        scores = outputs.iou_scores[0, :, 0].float().cpu().numpy()
        return [
            Mask(np.asarray(mask[0]).astype(bool), float(score))
            for mask, score in zip(masks, scores, strict=True)
        ]

    def _embeddings(self, image: Array, pixel_values: Any) -> list[Any]:
        """Feature maps of the image encoder, from the store when there is one."""
        import torch

        if self._store is None:
            maps: list[Any] = self._model.get_image_embeddings(pixel_values)
            return maps

        def compute(_: list[int]) -> list[Features]:
            maps = self._model.get_image_embeddings(pixel_values)
            return [{str(level): part.cpu().numpy() for level, part in enumerate(maps)}]

        (found,) = self._store.lookup([self._store.key(self, "embedding", image)], compute)
        return [torch.from_numpy(found[str(level)]).to(self._device) for level in range(len(found))]
