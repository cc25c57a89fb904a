"""The chat endpoint against a local server: requests, pictures, retries, refusals."""

import base64
import http.client
import io

import numpy as np
import pytest
from PIL import Image

from spatialvlm.errors import BackendUnavailableError
from spatialvlm.scenes.endpoint import KEY_VARIABLE, Endpoint
from spatialvlm.scenes.lifting.endpoint_backends import (
    EndpointCaptioner,
    EndpointTagger,
    read_tags,
)

IMAGE = np.full((20, 30, 3), 200, np.uint8)


def test_pictures_key_and_model_are_sent(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    with serve_text("a chair") as (url, requests):
        answer = Endpoint(url, "m1").chat("What is it?", images=[IMAGE], system="Be brief.")
    assert answer == "a chair"
    (request,) = requests
    assert request["path"] == "/v1/chat/completions"
    assert request["headers"]["Authorization"] == "Bearer secret"
    assert request["body"]["model"] == "m1"
    system, user = request["body"]["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    data = user["content"][0]["image_url"]["url"].removeprefix("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.size == (30, 20)
    assert user["content"][1] == {"type": "text", "text": "What is it?"}


def serve_text(text, statuses=()):
    from tests.unit.chat_server import serve

    return serve(lambda _: text, statuses)


def test_a_busy_server_is_asked_again():
    with serve_text("yes", statuses=(503, 429)) as (url, requests):
        assert Endpoint(url, "m", pause_s=0.0).chat("?") == "yes"
        assert len(requests) == 3
    with (
        serve_text("yes", statuses=(503, 503)) as (url, _),
        pytest.raises(BackendUnavailableError, match="after 2 attempts: HTTP 503"),
    ):
        Endpoint(url, "m", attempts=2, pause_s=0.0).chat("?")


def test_refusals_are_not_repeated():
    with serve_text({"error": "no such model"}, statuses=(404,)) as (url, requests):
        with pytest.raises(BackendUnavailableError, match=r"HTTP 404: .*no such model"):
            Endpoint(url, "m", pause_s=0.0).chat("?")
        assert len(requests) == 1
    with (
        serve_text({"choices": []}) as (url, _),
        pytest.raises(BackendUnavailableError, match="not a chat completion"),
    ):
        Endpoint(url, "m").chat("?")
    with pytest.raises(BackendUnavailableError, match=r"no answer .* 1 attempts"):
        Endpoint("http://127.0.0.1:9", "m", attempts=1, timeout_s=2).chat("?")
    with pytest.raises(BackendUnavailableError, match="begins with http"):
        Endpoint("file:///etc", "m").chat("?")


def test_a_reply_without_text_is_an_error():
    with (
        serve_text(None) as (url, _),
        pytest.raises(BackendUnavailableError, match="the reply holds no text: None"),
    ):
        Endpoint(url, "m").chat("?")


def test_a_reply_cut_short_is_asked_for_again(monkeypatch):
    def cut(*_, **__):
        raise http.client.IncompleteRead(b"{")

    monkeypatch.setattr("urllib.request.urlopen", cut)
    with pytest.raises(BackendUnavailableError, match="2 attempts: IncompleteRead"):
        Endpoint("http://127.0.0.1:9", "m", attempts=2, pause_s=0.0).chat("?")


def test_tags_and_captions():
    with serve_text("1. Chair\n- coffee table.\nChair\n") as (url, requests):
        tagger = EndpointTagger(Endpoint(url, "m"))
        assert tagger.tags(np.stack([IMAGE, IMAGE])) == [["chair", "coffee table"]] * 2
        assert len(requests) == 2
    with serve_text(" a red wooden\nchair. ") as (url, requests):
        captions = EndpointCaptioner(Endpoint(url, "m")).captions([IMAGE], ["chair"])
        assert captions == ["a red wooden chair"]
        assert "one chair" in requests[0]["body"]["messages"][0]["content"][1]["text"]
    assert read_tags("sofa, lamp; sofa") == ["sofa", "lamp"]
    assert read_tags(" \n" + "x" * 60) == []
