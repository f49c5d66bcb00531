"""Models of transformers in this process: tiny random ones, against the model's own numbers."""

import io

import numpy as np
import pytest
import torch

from mmsae.interpret.clients.asked import Asked
from mmsae.interpret.clients.client import Message
from mmsae.interpret.clients.load import load_client
from mmsae.interpret.clients.local import LocalClient
from mmsae.interpret.clients.options import Asking
from mmsae.types import InputError
from tests.helpers import lvlm


@pytest.fixture(scope="module")
def sees(tmp_path_factory):
    return LocalClient(lvlm.llava(tmp_path_factory.mktemp("llava")), "cpu", max_tokens=4)


@pytest.fixture(scope="module")
def reads(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**lvlm._text(64))).save_pretrained(folder)
    lvlm.tokenizer().save_pretrained(folder)
    return LocalClient(str(folder), "cpu", max_tokens=3)


def png(seed):
    out = io.BytesIO()
    lvlm.picture(seed).save(out, "PNG")
    return out.getvalue()


def test_a_vision_language_model_answers_about_images(sees):
    one, other = (sees.chat([Message("user", "what is there ?", (png(i),))]) for i in (0, 1))
    host = sees.host
    batch = host.collate.batch(["what is there ?"], [lvlm.picture(0)])
    assert one.text == host.answer(batch, max_new_tokens=4)[0]
    assert one.tokens_in == int(batch.inputs["attention_mask"].sum()) > 9 and other.tokens_in == one.tokens_in
    assert sees.chat([Message("user", "is there a circle ?")]).tokens_in < 15  # no image, no image tokens
    assert LocalClient.around(host, 4).chat([Message("user", "what is there ?", (png(0),))]) == one


@pytest.mark.parametrize("which", ["sees", "reads"])
def test_scores_are_the_models_log_probabilities(which, request):
    client = request.getfixturevalue(which)
    model, tokenizer = client._language
    got = client.score("is there a red", "circle ? yes")
    ids = tokenizer("is there a red circle ? yes", return_tensors="pt")["input_ids"]
    loss = model(input_ids=ids, labels=ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - 3, -100)).loss
    assert got.shape == (3,) and -got.mean() == pytest.approx(loss.item(), abs=1e-4)


def test_a_language_model_reads_and_embeds_texts_but_sees_nothing(reads):
    said = reads.chat([Message("system", "a"), Message("user", "what is there ?")])
    assert 0 < said.tokens_out <= 3
    e = reads.embed(["a red circle", "yes"])
    assert np.allclose(np.linalg.norm(e, axis=1), 1) and not np.allclose(e[0], e[1])
    with pytest.raises(InputError, match="reads no images"):
        reads.chat([Message("user", "x", (png(0),))])


@pytest.mark.parametrize("which", ["sees", "reads"])
def test_another_model_under_the_same_name_is_another_one(which, request, tmp_path):
    """A folder whose weights were exchanged has the same name, and answers of its own."""
    client = request.getfixturevalue(which)
    same, other = (LocalClient(client.name, "cpu", max_tokens=client.params["max_tokens"]) for _ in range(2))
    with torch.no_grad():
        next(other._language[0].parameters()).view(-1)[0] += 1
    keys = [Asked(c, tmp_path).key({"chat": ["what?"]}) for c in (client, same, other)]
    assert keys[0] == keys[1] != keys[2]


def test_clients_by_name(tmp_path):
    from tests.interpret.clients import test_asked

    assert load_client(Asking("openai:gpt", "http://x/v1")).name == "gpt"
    assert load_client(Asking("local:lvlm:folder")).sees and not load_client(Asking("local:folder")).sees
    scripted = load_client(Asking(f"script:{test_asked.__name__}:answer"))
    assert scripted.chat([Message("user", "me")]).text == "answer to me"
    for name, words in (
        ("gpt", "is not openai:MODEL, local:MODEL or script:MODULE:FUNCTION"),
        ("script:no.such:thing", "that can be imported"),
    ):
        with pytest.raises(InputError, match=words):
            load_client(Asking(name))
    with pytest.raises(InputError, match="is no causal language model of transformers"):
        load_client(Asking(f"local:{tmp_path}")).chat([Message("user", "x")])
