"""Features of a frozen encoder on disk, addressed by content.

One safetensors file per group of frames and layer. Its name is the hash of everything that determines
the features: encoder fingerprint, layer, parts, world frame, stored precision, and the uint8 frames
themselves (which cover file, frame choice, decoder and resize). Raw encoder output is stored, so fusion
settings can change without invalidating anything.
"""

import errno
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from spatialvlm.errors import CacheError, ConfigError
from spatialvlm.models.geometry.base import GeometryEncoder, GeometryFeatures

logger = logging.getLogger(__name__)

StoreDtype = Literal["bf16", "fp32", "fp8"]
MIN_COSINE = {"fp32": 0.999, "bf16": 0.999, "fp8": 0.998}
"""Per token, between stored and recomputed features; fp8 has 2.6 % relative error."""
EVICT_TO = 0.95  # of the budget, so that not every write has to evict


@dataclass
class CacheStats:
    """What happened since the cache was opened; one count per group of frames and layer."""

    hits: int = 0
    misses: int = 0
    corrupt: int = 0
    verified: int = 0
    evicted: int = 0


class CachedEncoder(GeometryEncoder):
    """An encoder that remembers its features on disk; a drop-in for the encoder itself.

    Features that are computed go through the stored precision as well, so the first epoch sees the
    same values as all later ones.

    Args:
        encoder: Frozen encoder with a fingerprint.
        folder: Folder of the cache; created if needed. Any number of processes may share it.
        dtype: Stored precision. ``bf16`` is exact for features in bfloat16; ``fp8`` halves the size.
        verify_every: Every so many hits one is recomputed and compared.
        max_gb: Disk budget in 10^9 bytes; least recently used entries go first. ``None`` = no limit.

    Raises:
        ConfigError: An unknown dtype, or an encoder without fingerprint.
    """

    def __init__(
        self,
        encoder: GeometryEncoder,
        folder: str | Path,
        *,
        dtype: StoreDtype = "bf16",
        verify_every: int = 1000,
        max_gb: float | None = None,
    ) -> None:
        super().__init__()
        if dtype not in MIN_COSINE:
            raise ConfigError(f"geometry.cache.dtype={dtype!r} is not one of: bf16, fp32, fp8")
        if not encoder.fingerprint:
            raise ConfigError(
                f"the {encoder.name} encoder has no fingerprint, so its features cannot be cached; "
                "load it with its load function"
            )
        self.encoder = encoder
        for name in ("name", "patch_size", "pixel_multiple", "feature_dim", "num_special"):
            setattr(self, name, getattr(encoder, name))
        for name in ("depends_on_first_frame", "num_layers", "default_layers", "fingerprint"):
            setattr(self, name, getattr(encoder, name))
        self.reference_frame = encoder.reference_frame
        self.output_dtype = encoder.output_dtype
        self.folder = Path(folder)
        self.dtype: StoreDtype = dtype
        self.verify_every = verify_every
        self.max_bytes = None if max_gb is None else int(max_gb * 1e9)
        self.stats = CacheStats()
        self._writes = True
        self._hits_since_check = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self._bytes = sum(size for _, size, _ in self._entries())
        self.freeze()

    def encode(
        self, frames: UInt8[Tensor, "B S 3 H W"], layers: tuple[int, ...], return_special: bool
    ) -> tuple[dict[int, Float[Tensor, "B S gh gw C"]], Float[Tensor, "B S R C"] | None]:
        """Encode without the cache."""
        return self.encoder.encode(frames, layers, return_special)

    @torch.no_grad()
    def forward(
        self,
        videos: Sequence[UInt8[Tensor, "_ 3 _ _"]],
        layers: Iterable[int] | None = None,
        return_special: bool = False,
    ) -> list[GeometryFeatures]:
        """As :meth:`GeometryEncoder.forward`; only groups that are not on disk are encoded.

        Raises:
            CacheError: A spot check found stored features that differ from recomputed ones.
        """
        wanted = self.resolve_layers(self.default_layers if layers is None else layers)
        for video in videos:
            self._check(video)
        media = [media_hash(video) for video in videos]
        found = [
            self._read_group(medium, wanted, return_special, video.device)
            for medium, video in zip(media, videos, strict=True)
        ]
        missing = [index for index, features in enumerate(found) if features is None]
        if missing:
            fresh = self.encoder([videos[index] for index in missing], wanted, return_special)
            for index, features in zip(missing, fresh, strict=True):
                found[index] = self._write_group(media[index], features, return_special)
        self._spot_check(videos, found, missing, wanted, return_special)
        return [features for features in found if features is not None]

    # -- one group of frames -------------------------------------------------------------------------

    def _read_group(
        self, media: str, layers: tuple[int, ...], special: bool, device: torch.device
    ) -> GeometryFeatures | None:
        entries: dict[int, dict[str, Tensor]] = {}
        for layer in layers:
            fields = self.key_fields(media, layer, special and layer == layers[-1])
            entry = self._read(fields)
            if entry is None:
                self.stats.misses += len(layers)
                return None
            entries[layer] = {
                name: tensor.to(device, self.output_dtype) for name, tensor in entry.items()
            }
        self.stats.hits += len(layers)
        return _features(entries, special)

    def _write_group(
        self, media: str, features: GeometryFeatures, special: bool
    ) -> GeometryFeatures:
        """Store a group; returns what a later read will return."""
        last = max(features.layers)
        entries: dict[int, dict[str, Tensor]] = {}
        for layer, feature in features.layers.items():
            entry = {"feat": feature}
            if special and layer == last and features.special is not None:
                entry["special"] = features.special
            stored = {
                k: v for name, x in entry.items() for k, v in pack(name, x, self.dtype).items()
            }
            self._write(self.key_fields(media, layer, special and layer == last), stored)
            entries[layer] = {name: unpack(name, stored).to(x.dtype) for name, x in entry.items()}
        return _features(entries, special)

    def _spot_check(
        self,
        videos: Sequence[Tensor],
        found: Sequence[GeometryFeatures | None],
        missing: Sequence[int],
        layers: tuple[int, ...],
        special: bool,
    ) -> None:
        hits = [index for index in range(len(videos)) if index not in missing]
        self._hits_since_check += len(hits)
        if not hits or self._hits_since_check < self.verify_every:
            return
        self._hits_since_check = 0
        index = hits[0]
        stored, fresh = found[index], self.encoder([videos[index]], layers, special)[0]
        assert stored is not None
        self.stats.verified += 1
        for layer in layers:
            a, b = stored.layers[layer].float(), fresh.layers[layer].float()
            worst = F.cosine_similarity(a, b, dim=-1).min().item() if a.shape == b.shape else -1.0
            if not worst >= MIN_COSINE[self.dtype]:
                raise CacheError(
                    f"cached features of layer {layer} differ from recomputed ones (cosine {worst:.4f} "
                    f"of the worst token, {MIN_COSINE[self.dtype]} required) in {self.folder}. The cache "
                    "was written by other software or hardware: delete the folder, or use another one"
                )

    # -- one file ------------------------------------------------------------------------------------

    def key_fields(self, media: str, layer: int, special: bool) -> dict[str, str]:
        """Everything that determines an entry; its canonical JSON is hashed to the file name."""
        return {
            "fingerprint": self.fingerprint,
            "layer": str(layer),
            "parts": str(getattr(self.encoder, "parts", "all")),
            "special": str(special),
            "dtype": self.dtype,
            "reference_frame": self.reference_frame,
            "media": media,
        }

    def path(self, fields: dict[str, str]) -> Path:
        """File of an entry."""
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        key = hashlib.sha256(text.encode()).hexdigest()
        return self.folder / key[:2] / f"{key}.safetensors"

    def _read(self, fields: dict[str, str]) -> dict[str, Tensor] | None:
        path = self.path(fields)
        try:
            with safe_open(path, framework="pt") as file:
                metadata: dict[str, str] = file.metadata() or {}
                stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            self._discard(path, str(error))
            return None
        expected = {**fields, "payload": payload_hash(stored)}
        if metadata != expected:
            wrong = [name for name in expected if metadata.get(name) != expected[name]]
            self._discard(path, f"{', '.join(wrong) or 'metadata'} does not match")
            return None
        with suppress(FileNotFoundError):  # another process may just have evicted it
            os.utime(path)  # least recently used goes first
        return {name: unpack(name, stored) for name in ("feat", "special") if name in stored}

    def _discard(self, path: Path, reason: str) -> None:
        self.stats.corrupt += 1
        logger.warning("cache entry %s is damaged (%s); it is recomputed", path, reason)
        path.unlink(missing_ok=True)

    def _write(self, fields: dict[str, str], stored: dict[str, Tensor]) -> None:
        if not self._writes:
            return
        tensors = {name: value.cpu().contiguous() for name, value in stored.items()}
        content = save(tensors, metadata={**fields, "payload": payload_hash(tensors)})
        if self.max_bytes is not None and self._bytes + len(content) > self.max_bytes:
            if len(content) > self.max_bytes:
                return  # larger than the whole budget: computed every time
            self._evict(self.max_bytes, len(content))
        path = self.path(fields)
        temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._writes = False
            logger.warning(
                "no space left for the feature cache in %s; features are computed but no longer stored",
                self.folder,
            )
            return
        self._bytes += len(content)

    def _evict(self, budget: int, incoming: int) -> None:
        """Delete the least recently used entries until ``incoming`` bytes fit."""
        entries = sorted(self._entries())
        self._bytes = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if self._bytes + incoming <= EVICT_TO * budget:
                return
            path.unlink(missing_ok=True)
            self._bytes -= size
            self.stats.evicted += 1

    def _entries(self) -> list[tuple[float, int, Path]]:
        """Time of last use, bytes and path of every entry, other processes' included."""
        found = []
        for path in self.folder.glob("??/*.safetensors"):
            try:
                stat = path.stat()
            except FileNotFoundError:  # evicted by another process
                continue
            found.append((stat.st_mtime, stat.st_size, path))
        return found


def media_hash(video: UInt8[Tensor, "S 3 H W"]) -> str:
    """BLAKE2b-256 of the frames and their shape."""
    digest = hashlib.blake2b(str(tuple(video.shape)).encode(), digest_size=32)
    digest.update(video.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def payload_hash(tensors: dict[str, Tensor]) -> str:
    """BLAKE2b-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=32)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pack(name: str, x: Float[Tensor, "... C"], dtype: StoreDtype) -> dict[str, Tensor]:
    """Tensors to store for one feature tensor."""
    if dtype != "fp8":
        return {name: x.to(torch.bfloat16 if dtype == "bf16" else torch.float32)}
    limit = torch.finfo(torch.float8_e4m3fn).max
    scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / limit
    return {name: (x.float() / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}


def unpack(name: str, stored: dict[str, Tensor]) -> Float[Tensor, "... C"]:
    """Inverse of :func:`pack`, up to rounding."""
    scale: Any = stored.get(f"{name}_scale")
    return stored[name] if scale is None else stored[name].float() * scale


def _features(entries: dict[int, dict[str, Tensor]], special: bool) -> GeometryFeatures:
    layers = {layer: entry["feat"] for layer, entry in entries.items()}
    last = layers[max(layers)]
    rows = entries[max(layers)].get("special") if special else None
    return GeometryFeatures(layers, rows, (last.shape[0], last.shape[1], last.shape[2]))
