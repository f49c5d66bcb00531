"""A client of a server with OpenAI's interface, against a server on this machine."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from mmsae.interpret.clients.asked import Asked
from mmsae.interpret.clients.client import Message, NoReply
from mmsae.interpret.clients.server import ServerClient, data_uri
from mmsae.types import InputError

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.fixture
def server():
    seen, answers = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, dict(self.headers), body))
            code, said = answers.pop(0)
            data = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data) + 50 * (said == b"cut")))
            if code == 429:
                self.send_header("Retry-After", "3")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}/v1", seen, answers
    made.shutdown()
    made.server_close()


def test_a_question_with_an_image(server, monkeypatch):
    url, seen, answers = server
    monkeypatch.setenv("MY_KEY", "secret")
    answers.append((200, {"choices": [{"message": {"content": "a red circle"}}],
                          "usage": {"prompt_tokens": 12, "completion_tokens": 3}}))  # fmt: skip
    client = ServerClient("model", url, "MY_KEY", max_tokens=7)
    said = client.chat([Message("system", "be brief"), Message("user", "what?", (PNG,))])
    assert said == ("a red circle", 12, 3)
    path, headers, body = seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["model"] == "model" and body["temperature"] == 0 and body["max_tokens"] == 7
    assert body["messages"][0] == {"role": "system", "content": "be brief"}
    image, text = body["messages"][1]["content"]
    assert base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,")) == PNG
    assert text == {"type": "text", "text": "what?"}


@pytest.mark.parametrize(
    ("said", "says"), [(b"<html>busy</html>", "the answer is no JSON"), (b"cut", "IncompleteRead")]
)
def test_answers_that_are_no_json(server, said, says):
    url, _, answers = server
    answers.append((200, said))
    with pytest.raises(NoReply, match=says):
        ServerClient("model", url).chat([Message("user", "x")])


def test_another_server_does_not_answer_for_this_one(server, tmp_path):
    """``qwen`` on two servers is two models: answers are kept by the address, and never with a password in it."""
    url, seen, answers = server
    host = url.removeprefix("http://")
    answers += [(200, {"choices": [{"message": {"content": said}}]}) for said in ("a dog", "a cat")]
    questions = [[Message("user", "what?")]]
    first, second = url, f"http://localhost:{host.partition(':')[2]}"
    for address, said in ((first, "a dog"), (second, "a cat"), (first, "a dog"), (f"http://me:pw@{host}/", "a dog")):
        assert Asked(ServerClient("qwen", address), tmp_path).chat(questions) == [said]
    assert len(seen) == 2
    assert {json.loads(p.read_text())["server"] for p in tmp_path.rglob("*.json")} == {first, second}


def test_without_a_key_none_is_sent(server, monkeypatch):
    url, seen, answers = server
    monkeypatch.delenv("NO_KEY", raising=False)
    answers.append((200, {"choices": [{"message": {"content": None}}]}))
    assert ServerClient("model", url, "NO_KEY").chat([Message("user", "x")]).text == ""
    assert "Authorization" not in seen[0][1]


@pytest.mark.parametrize(
    ("code", "said", "again", "after"),
    [
        (429, {"error": "slow down"}, True, 3.0),
        (500, {"error": "down"}, True, 0.0),
        (400, {"error": "content filter"}, False, 0.0),
        (200, b"no json", True, 0.0),
        (200, {"error": "odd"}, False, 0.0),
        (200, [1], True, 0.0),
    ],
)
def test_answers_that_are_none(server, code, said, again, after):
    url, _, answers = server
    answers.append((code, said))
    with pytest.raises(NoReply) as e:
        ServerClient("model", url).chat([Message("user", "x")])
    assert e.value.again == again and e.value.after == after


def test_nobody_there_a_timeout_and_a_wrong_key(server):
    url, _, answers = server
    with pytest.raises(NoReply):
        ServerClient("model", "http://127.0.0.1:9/v1", timeout=0.5).chat([Message("user", "x")])
    answers.append((401, {"error": "bad key"}))
    with pytest.raises(InputError, match=r"answers 401 for model model .*bad key.*the key in \$OPENAI_API_KEY"):
        ServerClient("model", url).chat([Message("user", "x")])
    with pytest.raises(InputError, match="is no http:// or https:// address"):
        ServerClient("model", "file:///etc/passwd")


def test_log_probabilities_are_those_of_the_continuation(server):
    url, seen, answers = server
    tokens = {"text_offset": [0, 3, 6, 9], "token_logprobs": [None, -1.0, -2.0, -9.0]}
    answers += [(200, {"choices": [{"logprobs": tokens}]}), (200, {"choices": [{"text": "x"}]})]
    client = ServerClient("model", url)
    assert client.score("abc", "defghi").tolist() == [-1.0, -2.0]  # not the token made after it
    assert seen[0][2]["prompt"] == "abcdefghi" and seen[0][2]["echo"] is True
    with pytest.raises(InputError, match="echoes no log-probabilities"):
        client.score("abc", "def")


def test_embeddings_come_in_order_and_unit_length(server):
    url, _, answers = server
    answers.append((200, {"data": [{"index": 1, "embedding": [0, 2]}, {"index": 0, "embedding": [3, 4]}]}))
    assert np.allclose(ServerClient("model", url).embed(["a", "b"]), [[0.6, 0.8], [0, 1]])


def test_kinds_of_images():
    assert data_uri(b"\xff\xd8\xffx").startswith("data:image/jpeg") and data_uri(b"RIFFx").startswith("data:image/webp")
