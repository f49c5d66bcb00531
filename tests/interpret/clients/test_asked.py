"""Answers are kept, failures are tried again, counted and gone past (oracle O5: a resume makes no new call)."""

import importlib
import json
import sys
import threading

import pytest

from mmsae.interpret.clients.asked import Asked
from mmsae.interpret.clients.client import Client, Message, NoReply, Reply
from mmsae.interpret.clients.options import Asking
from mmsae.interpret.clients.scripted import ScriptedClient
from mmsae.types import InputError

QUESTIONS = [[Message("user", f"question {i}", (bytes([i]),))] for i in range(6)]


def answer(messages):
    return f"answer to {messages[-1].text}"


def test_a_repeated_run_asks_nothing_and_a_killed_one_the_rest(tmp_path):
    client = ScriptedClient(answer)
    first = Asked(client, tmp_path).chat(QUESTIONS[:4])
    assert first == [f"answer to question {i}" for i in range(4)] and client.calls == 4
    again = Asked(client, tmp_path)
    assert again.chat(QUESTIONS) == [f"answer to question {i}" for i in range(6)] and client.calls == 6
    assert again.counts["cached"] == 4 and again.counts["new"] == 2
    record = json.loads(next(tmp_path.rglob("*.json")).read_text())
    assert record["answer"]["text"].startswith("answer to") and record["model"] == "script"
    assert record["asked"]["chat"][0]["text"].startswith("question")


def test_other_images_models_and_settings_are_other_questions(tmp_path):
    client = ScriptedClient(answer)
    asked = Asked(client, tmp_path)
    assert asked.chat(QUESTIONS[:1] * 50) == ["answer to question 0"] * 50 and client.calls == 1
    asked.chat([[QUESTIONS[0][0]._replace(images=(b"x",))]])
    client.params = {"temperature": 1}
    asked.chat(QUESTIONS[:1])
    client.name = "other"
    asked.chat(QUESTIONS[:1])
    client.identity = {"server": "http://elsewhere/v1"}
    asked.chat(QUESTIONS[:1])
    assert client.calls == 5


def test_a_function_whose_code_was_changed_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    said = []
    for answer in ("yes", "no", "no"):
        (tmp_path / "a_judge.py").write_text(f"def judge(messages):\n    return {answer!r}  # a comment\n")
        sys.modules.pop("a_judge", None)
        importlib.invalidate_caches()
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        client = ScriptedClient.of("a_judge:judge")
        said += [*Asked(client, tmp_path / "answers").chat(QUESTIONS[:1]), client.calls]
    assert said == ["yes", 1, "no", 1, "no", 0]


def test_failures_are_tried_again_with_growing_waits_and_then_counted(tmp_path):
    tries, waits = {}, []

    def shaky(messages):
        text = messages[0].text
        tries[text] = tries.get(text, 0) + 1
        if text.endswith("1") and tries[text] < 3:
            raise NoReply("busy")
        if text.endswith("2"):
            raise NoReply("refused", again=False)
        if text.endswith("3"):
            raise NoReply("slow down", after=7.0)
        return "yes"

    asked = Asked(ScriptedClient(shaky), tmp_path, Asking(retries=2, concurrency=1), waits.append)
    assert asked.chat(QUESTIONS[:4]) == ["yes", "yes", None, None]
    assert tries == {"question 0": 1, "question 1": 3, "question 2": 1, "question 3": 3}
    assert waits == [1.0, 2.0, 7.0, 7.0]
    assert asked.account["failed"] == 2 and asked.account["reasons"] == {"refused": 1, "slow down": 1}
    assert Asked(ScriptedClient(answer), tmp_path).chat(QUESTIONS[2:3]) == [
        "answer to question 2"
    ]  # not kept: asked again


def test_a_model_that_is_away_is_one_sentence_and_one_that_refuses_is_not():
    def away(messages):
        raise NoReply("connection refused")

    def refuses(messages):
        raise NoReply("I cannot help with that", again=False)

    quick = Asking(retries=0, concurrency=1)
    with pytest.raises(InputError, match="client script answered none of 5 questions: connection refused"):
        Asked(ScriptedClient(away), None, quick).chat(QUESTIONS)
    asked = Asked(ScriptedClient(refuses), None, quick)
    assert asked.chat(QUESTIONS) == [None] * 6 and asked.account["failed"] == 6


def test_empty_answers_are_none_and_the_account_adds_up():
    class Counting(Client):
        name, parallel = "counting", True

        def chat(self, messages):
            return Reply("" if messages[0].text.endswith("0") else "yes", 1000, 10)

    asked = Asked(Counting(), None, Asking(price_in=2.0, price_out=50.0))
    assert asked.chat(QUESTIONS) == [None, *["yes"] * 5]
    assert asked.account["nonsense"] == 1 and asked.account["failed"] == 0
    assert asked.account["tokens_in"] == 6000 and asked.account["cost"] == pytest.approx(0.012 + 0.003)


def test_no_more_questions_are_under_way_than_allowed():
    lock, now, most = threading.Lock(), [0], [0]

    def slow(messages):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        threading.Event().wait(0.02)
        with lock:
            now[0] -= 1
        return "yes"

    Asked(ScriptedClient(slow), None, Asking(concurrency=2)).chat(QUESTIONS * 2)
    assert most[0] == 2


def test_log_probabilities_are_kept_too(tmp_path):
    client = ScriptedClient(score=lambda prefix, text: [-0.5] * len(text.split()))
    assert Asked(client, tmp_path).score([("a", "b c")]) == [[-0.5, -0.5]]
    assert Asked(client, tmp_path).score([("a", "b c")]) == [[-0.5, -0.5]] and client.calls == 1
