"""A chat model behind an OpenAI-compatible HTTP endpoint; nothing is contacted unless a user names one.

endpoint = Endpoint("http://localhost:8000/v1", "my-model")
text = endpoint.chat("Name the furniture.", images=[image])

The key, if one is needed, comes from the environment variable ``SPATIALVLM_ENDPOINT_KEY``.
"""

import base64
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from spatialvlm.errors import BackendUnavailableError

KEY_VARIABLE = "SPATIALVLM_ENDPOINT_KEY"
RETRY_STATUS = (429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Endpoint:
    """Where to ask.

    Args:
        url: Base address; ``/chat/completions`` is added.
        model: Name of the served model, also the version of backends that use it.
        timeout_s: Longest wait for one answer.
        attempts: Tries when the server is busy or away.
        pause_s: Wait before the second try; doubles with every further one.
    """

    url: str
    model: str
    timeout_s: float = 60.0
    attempts: int = 3
    pause_s: float = 1.0

    def chat(
        self, text: str, *, images: Sequence[UInt8[np.ndarray, "h w 3"]] = (), system: str = ""
    ) -> str:
        """Answer of the model to one message.

        Raises:
            BackendUnavailableError: No answer after all attempts, or not an answer of this protocol.
        """
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": _data_url(image)}} for image in images
        ]
        content.append({"type": "text", "text": text})
        messages = [{"role": "system", "content": system}] if system else []
        body = {
            "model": self.model,
            "messages": [*messages, {"role": "user", "content": content if images else text}],
            "temperature": 0,
        }
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.pause_s * 2 ** (attempt - 1))
            answer, problem = self._post(body)
            if answer is not None:
                return answer
        raise BackendUnavailableError(
            f"{self.url}: no answer from {self.model!r} after {self.attempts} attempts: {problem}."
        )

    def _post(self, body: dict[str, Any]) -> tuple[str | None, str]:
        """Answer, or ``None`` and what went wrong when another try may help."""
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {os.environ[KEY_VARIABLE]}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        if not address.startswith(("http://", "https://")):
            raise BackendUnavailableError(
                f"{self.url}: an endpoint begins with http:// or https://."
            )
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as reply:
                answer = json.load(reply)["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            if error.code in RETRY_STATUS:
                return None, f"HTTP {error.code}"
            detail = error.read(300).decode("utf-8", "replace")
            raise BackendUnavailableError(f"{address}: HTTP {error.code}: {detail}") from error
        except (OSError, http.client.HTTPException) as error:
            return None, f"{type(error).__name__}: {error}"
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise BackendUnavailableError(
                f"{address}: the reply is not a chat completion: {error!r}."
            ) from error
        if not isinstance(answer, str):
            raise BackendUnavailableError(f"{address}: the reply holds no text: {answer!r}.")
        return answer, ""


def _data_url(image: UInt8[np.ndarray, "h w 3"]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
