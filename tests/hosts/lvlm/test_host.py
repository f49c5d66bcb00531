"""Vision-language hosts: what tokens are, capture, grids, loading."""

import json
import math
import pickle

import pytest
import torch

from mmsae.hosts import as_encoder, embed_width, load_host, site_width
from mmsae.hosts.lvlm.host import recovered
from mmsae.hosts.lvlm.tokens import ANSWER, BREAK, PAD, PATCH, QUESTION, SPECIAL
from mmsae.hosts.lvlm.tokens import TEMPLATE as ROLE
from mmsae.shards import FaultLog, ShardWriter, unit_batches
from mmsae.types import InputError
from tests.helpers import lvlm as made
from tests.helpers.lvlm import TEMPLATE, picture, sample

ONE, LONG = "is there a red circle?", "is there a blue square left of a red circle?"


@pytest.fixture(scope="session")
def hosts(tmp_path_factory):
    """``hosts(kind)``, made once, loaded from its folder."""
    root, ready = tmp_path_factory.mktemp("lvlm"), {}

    def get(kind):
        if kind not in ready:
            ready[kind] = load_host(getattr(made, kind)(root / kind))
        return ready[kind]

    return get


@pytest.fixture(params=["llava", "llava_next", "qwen", "qwen3", "gemma", "internvl", "idefics", "smolvlm"])
def host(request, hosts):
    return hosts(request.param)


def three(host, side="left", text="question"):
    several = [sample(0, ONE), sample(1, LONG, size=(40, 24)), sample(2, "what", None)]
    return several, host.collator(text, side)(several)


def test_kinds_agree_with_the_processors_ids(host):
    _, batch = three(host)
    ids, kinds = batch.inputs["input_ids"], batch.inputs["kinds"]
    assert torch.equal(ids == host.vocabulary.image, kinds >= PATCH)
    assert torch.equal(batch.inputs["attention_mask"] == 0, kinds == PAD)
    words = host.processor.tokenizer.convert_ids_to_tokens
    for row, caption in enumerate(batch.captions):
        assert words(ids[row][kinds[row] == QUESTION]) == caption.replace("?", " ?").split()
        assert {"user", "assistant", ":"} <= set(words(ids[row][kinds[row] == ROLE])) <= {"user", "assistant", ":"}
        assert "<s>" in words(ids[row][kinds[row] == SPECIAL])
    counts = [(kinds[0] >= PATCH).sum(), (kinds[1] >= PATCH).sum()]
    assert counts == [g.layout.length for g in host.grid(batch)]
    assert not (kinds[2] >= PATCH).any()


def test_answers_are_content_only_where_asked_for(host):
    qa = sample(3, "a red circle", meta={"question": ONE, "answer": "yes"})
    words = host.processor.tokenizer.convert_ids_to_tokens
    for text, answer in (("question", []), ("question+answer", ["yes"])):
        batch = host.collator(text)([qa, sample(4, "no answer")])
        ids, kinds = batch.inputs["input_ids"], batch.inputs["kinds"]
        assert words(ids[0][kinds[0] == ANSWER]) == answer
        assert words(ids[0][kinds[0] == QUESTION]) == ["is", "there", "a", "red", "circle", "?"]
        assert words(ids[1][kinds[1] == QUESTION])[0] == "no"
        assert not (kinds[1] == ANSWER).any()


def test_batched_equals_single_and_padding_side_does_not_matter(host):
    samples, batch = three(host)
    left = host.capture(batch, "layers.1:out")
    right = host.capture(host.collator(padding_side="right")(samples), "layers.1:out")
    for m in ("image", "text"):
        single = [host.capture(host.collate([s]), "layers.1:out") for s in samples]
        alone = torch.cat([t.x[m] for t in single])
        assert len(alone) and torch.allclose(left.x[m], alone, atol=1e-5)
        assert torch.allclose(left.x[m], right.x[m], atol=1e-5)
        assert torch.equal(left.item[m], right.item[m]) and torch.equal(left.position[m], right.position[m])
        assert torch.equal(left.position[m], torch.cat([t.position[m] for t in single]))
    # the same without our reading: the host's hidden states at those positions
    state = host.forward(batch, output_hidden_states=True).hidden_states[2]
    mask = batch.inputs["kinds"] >= PATCH
    assert torch.equal(state[mask], left.x["image"])


def test_sequences_of_several_images(host):
    pictures = [picture(1), picture(2, (24, 40))]
    batch = host.collate.batch([ONE, "what"], [pictures, pictures[:1]])
    grids = host.grid(batch)
    assert [g.item for g in grids] == [0, 0, 1]
    assert grids[1].start >= grids[0].start + grids[0].layout.length
    image = host.capture(batch, "layers.0:in").x["image"]
    alone = [host.capture(host.collate.batch(["what"], [p]), "layers.0:in").x["image"] for p in pictures]
    assert torch.allclose(image, torch.cat([*alone, alone[0]]), atol=1e-5)  # what the projector puts there


def test_means_are_those_of_the_rows(host):
    _, batch = three(host)
    tokens = host.capture(batch, ["layers.2:in[image_mean]", "layers.2:in[text_mean]"])
    assert tokens.item["image"].tolist() == [0, 1] and tokens.item["text"].tolist() == [0, 1, 2]
    state = host.forward(batch, output_hidden_states=True).hidden_states[2]
    for i in range(3):
        kinds = batch.inputs["kinds"][i]
        last = (kinds >= PATCH).nonzero().max().item() if (kinds >= PATCH).any() else -1
        after = [j for j in range(len(kinds)) if j > last and kinds[j] != PAD]
        assert torch.allclose(tokens.x["text"][i], state[i, after].mean(0), atol=1e-5)
        if i < 2:
            assert torch.allclose(tokens.x["image"][i], state[i, kinds >= PATCH].mean(0), atol=1e-5)


def test_text_policies(host):
    _, batch = three(host)
    rows = {p: host.read(batch, [f"layers.1:out[{p}]"])[0] for p in ("image", "text", "text_all", "all")}
    assert len(rows["all"].x) == len(rows["image"].x) + len(rows["text_all"].x) == batch.inputs["attention_mask"].sum()
    assert not rows["text"].special.any()
    assert rows["text_all"].special.sum() == len(rows["text_all"].x) - len(rows["text"].x)
    assert rows["text_all"].special[rows["text_all"].position == 0].all()  # BOS


def test_sites(host):
    site = host.site("layers.1:in[image]")
    assert (site.module, site.modality, site.width) == (f"{host.decoder}.layers.1", "image", 32)
    assert host.site(site) == site == host.site(f"{host.decoder}.layers.1:in[image]")
    assert host.site("layers.1.mlp.gate_proj:out[text]").width == 48
    assert set(host.default_sites()) == {"image", "text"}
    for bad in ("layers.9:out[image]", "layers.1:out[cls]", "layers.1:at[image]", "lm_head:out[text]", "lay er"):
        with pytest.raises(InputError, match=r"site|no module"):
            host.site(bad)
    assert embed_width(host.hint) == site_width(host.hint, "layers.1:out[text]") == 32


def test_early_stop_does_not_run_later_layers(hosts):
    host, calls = hosts("llava"), []
    host.sites("layers.1:out"), host.sites("layers.2:out")  # finding out what their tensors look like runs the host
    hook = host.model.model.language_model.layers[2].register_forward_hook(lambda *_: calls.append(1))
    host.capture(three(host)[1], "layers.1:out")
    assert not calls
    host.capture(three(host)[1], "layers.2:out")
    hook.remove()
    assert calls == [1]


def test_fingerprint_is_of_config_and_weights(hosts, tmp_path):
    host = hosts("llava")
    host.model.save_pretrained(tmp_path / "copy")
    host.processor.save_pretrained(tmp_path / "copy")
    copy = load_host(f"lvlm:{tmp_path / 'copy'}")
    assert copy.fingerprint == host.fingerprint
    other = load_host(made.llava(tmp_path / "other", seed=1))
    assert other.fingerprint != host.fingerprint
    site = host.site("layers.1:out[image]")
    assert copy.site(site).host == host.fingerprint
    with pytest.raises(InputError, match=host.fingerprint):
        other.site(site)
    assert load_host(copy.hint, dtype="bf16").model.dtype == torch.bfloat16


def test_chat_template_is_used_where_there_is_one(tmp_path):
    plain = load_host(made.llava(tmp_path / "a"))
    assert plain.prompt(ONE) == f"USER: <image>\n{ONE} ASSISTANT:"
    assert plain.prompt(ONE, "no", images=0) == f"USER: {ONE} ASSISTANT: no</s>"
    chat = load_host(made.llava(tmp_path / "b", template="<s>" + TEMPLATE))
    assert chat.prompt(ONE, images=2) == f"<s>USER: <image>\n<image>\n{ONE} ASSISTANT:"
    one, two = (h.collate.batch([ONE], [picture(0)]).inputs for h in (plain, chat))
    assert torch.equal(one["input_ids"], two["input_ids"])  # one BOS, by tokenizer or template
    assert torch.equal(one["kinds"], two["kinds"])


def test_long_text_is_cut_and_counted_and_image_tokens_never(tmp_path):
    host = load_host(made.llava(tmp_path / "h", context=20))
    words = " ".join(["red", "circle"] * 10)
    batch = host.collator("question+answer")([
        sample(0, words), sample(1, "a red circle"),
        sample(2, "", meta={"question": "is there a", "answer": words}),
        sample(3, "<image> a <image>"),
    ])  # fmt: skip
    assert batch.faults.counts == {"long_caption": 2, "special_token": 1}
    assert [e[1:3] for e in batch.faults.examples] == [("s.tar", "k0"), ("s.tar", "k2"), ("s.tar", "k3")]
    assert batch.inputs["attention_mask"].sum(1).tolist()[:3] == [20, 17, 20]
    assert ((batch.inputs["kinds"] >= PATCH).sum(1) == 9).all()  # an image token in a caption is no image
    kinds = batch.inputs["kinds"][2]
    assert (kinds == QUESTION).sum() == 3 and (kinds == ANSWER).sum() > 0  # the answer loses its end first
    narrow = load_host(made.llava(tmp_path / "n", context=12))
    with pytest.raises(InputError, match=r"s.tar k0.* 14 tokens.* 12"):
        narrow.collate([sample(0, "what")])


def test_losses(hosts):
    host = hosts("llava")
    qa = [sample(i, "", meta={"question": ONE, "answer": "yes there is"}) for i in range(2)]
    batch = host.collator("question+answer")([*qa, sample(2, "what", None)])
    loss = host.loss(batch)
    logits, ids, kinds = host.forward(batch).logits, batch.inputs["input_ids"], batch.inputs["kinds"]
    want = [
        -logits[b, j - 1].log_softmax(-1)[ids[b, j]]
        for b in range(3) for j in range(1, ids.shape[1]) if kinds[b, j] in (QUESTION, ANSWER)
    ]  # fmt: skip
    assert torch.allclose(loss.ce, torch.stack(want), atol=1e-5)
    assert loss.item.tolist() == [0] * 9 + [1] * 9 + [2]
    vocabulary = host.model.config.text_config.vocab_size
    zero = host.loss(batch, [("layers.1:out[all]", torch.zeros_like)])
    assert torch.allclose(zero.ce, torch.full_like(zero.ce, math.log(vocabulary)), atol=1e-5)
    same = host.loss(batch, [("layers.1:out[all]", lambda x: x.clone())])
    assert torch.allclose(same.ce, loss.ce, atol=1e-5)
    assert recovered(2.610, 2.776, 10.375) == pytest.approx(0.97862, abs=1e-5)


def test_grid_of_llava_next_at_336(tmp_path):
    host = load_host(made.llava_next(tmp_path, side=336, patch=14, context=3000))
    batch = host.collate.batch(["what", "what"], [picture(0, (336, 336)), picture(0, (672, 672))])
    (layout, large) = (image.layout for image in host.grid(batch))
    assert (batch.inputs["kinds"] >= PATCH).sum(1).tolist() == [1176, 576 + 48 * 49] == [layout.length, large.length]
    assert layout.breaks.tolist() == [600 + 25 * r for r in range(24)] and layout.breaks[-1] == 1175
    base, tile = layout.grids
    assert base.shape == tile.shape == (24, 24) and base[1, 0] == 24 and tile[0, 0] == 576 and tile[1, 0] == 601
    every = torch.cat([base.flatten(), tile.flatten(), layout.breaks])
    assert torch.equal(every.sort().values, torch.arange(1176))


def test_breaks_are_flagged_and_heat_is_the_mean_of_base_and_tile(hosts):
    host = hosts("llava_next")
    batch = host.collate.batch(["what"], [picture(0, (24, 48))])
    (image,) = host.grid(batch)
    tokens = host.capture(batch, "layers.0:in")
    assert (batch.inputs["kinds"] == BREAK).sum() == len(image.layout.breaks) > 0
    flagged = tokens.position["image"][tokens.special["image"]] - image.start
    assert torch.equal(flagged, image.layout.breaks)
    newline = host.model.model.image_newline
    assert torch.allclose(tokens.x["image"][image.layout.breaks], newline.expand(len(flagged), -1))
    base, tiles = image.layout.grids
    values = torch.zeros(image.layout.length)
    values[base[0, 0]], values[tiles] = 2.0, 4.0
    heat = image.heat(values)
    assert heat[0, 0] == 3 and heat[2, 2] == 2


def test_shards_to_capture_through_the_pipeline(hosts, tmp_path):
    host = hosts("llava")
    with ShardWriter(tmp_path, "s", per_shard=10) as w:
        for i in range(5):
            import io

            png = io.BytesIO()
            picture(i).save(png, "PNG")
            text = ONE if i else " ".join(["red"] * 200)
            w.write(f"k{i}", {"png": png.getvalue() if i != 3 else b"", "txt": text, "json": {"answer": "yes"}})
    assert len(pickle.dumps(host.collate)) < 100_000  # no weights on the way to the workers
    got = {}
    for workers in (0, 1):
        log, got[workers] = FaultLog(), []
        stream = unit_batches(sorted(map(str, tmp_path.glob("*.tar"))), None, None, 3, workers=workers,
                              collate=host.collate)  # fmt: skip
        for packet in stream:
            log.merge(packet.batch.faults)
            if packet.batch.uids:
                got[workers].append(host.capture(packet.batch, "layers.1:out"))
        assert dict(log.counts) == {"broken_image": 1, "long_caption": 1} and log.n_seen == 5
    assert [len(set(t.item["text"].tolist())) for t in got[0]] == [3, 1]
    assert all(torch.equal(a.x["text"], b.x["text"]) for a, b in zip(got[0], got[1], strict=True))


def test_bad_input(hosts, tmp_path):
    host = hosts("llava")
    with pytest.raises(InputError, match="processor inputs"):
        host.capture(three(host)[1]._replace(inputs=None))
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        load_host(f"lvlm:{tmp_path}")
    with pytest.raises(InputError, match="does not exist"):
        load_host(f"lvlm:{tmp_path / 'none'}")
    with pytest.raises(InputError, match="padded on the left"):
        host.generate(three(host, "right")[1])
    with pytest.raises(InputError, match="neither 'question' nor 'question\\+answer'"):
        host.collator("answer")
    with pytest.raises(InputError, match=r"filter needs embeddings of images or texts, and host lvlm:.*has none"):
        as_encoder(host, "filter")


def words_of(host, batch, kind, row=0):
    ids, kinds = batch.inputs["input_ids"][row], batch.inputs["kinds"][row]
    return host.processor.tokenizer.convert_ids_to_tokens(ids[kinds == kind])


@pytest.mark.parametrize(
    "mark", ["\ue000", "\ue001", "\ue000 \ue001 \ue000", "\uf8ff", "{question}", "%s", "\\1", "ASSISTANT:"]
)
def test_any_character_of_a_question_stays_a_character_of_the_question(hosts, mark):
    host = hosts("llava")
    plain = host.collator("question+answer").batch(["is there zebra red circle"], [picture(0)], ["blue"])
    odd = host.collator("question+answer").batch([f"is there {mark} red circle"], [picture(0)], [f"blue {mark}"])
    extra = len(host.processor.tokenizer.tokenize(mark))
    question = words_of(host, odd, QUESTION)
    assert question[:2] == ["is", "there"] and question[-2:] == ["red", "circle"] and len(question) == 4 + extra
    assert words_of(host, odd, ANSWER)[0] == "blue" and len(words_of(host, odd, ANSWER)) == 1 + extra
    assert words_of(host, odd, ROLE) == words_of(host, plain, ROLE)
    assert host.prompt(f"a {mark}", f"b {mark}").count(f" {mark}") == 2 + (mark == "ASSISTANT:")


def test_tokens_that_a_text_names_are_taken_out_and_counted(host):
    own = host.processor.tokenizer.convert_ids_to_tokens(5)  # what begins an image, by its family
    tokens = ["<|video_pad|>", own, "</s>", "<pad>", host.collate.image_token]
    texts = ["what is this ?", *(f"what {t} is {t} this ?" for t in tokens)]
    batch = host.collate([sample(i, t) for i, t in enumerate(texts)])
    want = words_of(host, batch, QUESTION)
    for row, text in enumerate(texts):
        assert words_of(host, batch, QUESTION, row) == want, text
    assert batch.faults.counts == {"special_token": len(tokens)} and batch.faults.seen == 0
    assert ("special_token", "s.tar", "k1", "<|video_pad|>") in batch.faults.examples
    log = FaultLog()
    log.merge(batch.faults)
    assert log.dropped == 0


@pytest.mark.parametrize(
    ("meta", "question", "answer"),
    [
        ({"question": ["is there", "what"], "answer": ["red", "blue"]}, "is there", "red"),
        ({"question": [], "answer": []}, "a red circle", None),
        ({"question": "", "answer": ""}, "a red circle", None),
        ({"question": "is there", "answer": 0}, "is there", "0"),
        ({"question": "is there", "answer": False}, "is there", "false"),
        ({"question": 3, "answer": None}, "3", None),
    ],
)
def test_questions_that_are_lists_and_answers_that_are_no_words(hosts, meta, question, answer, monkeypatch):
    seen = {}
    collate = hosts("llava").collator("question+answer")
    monkeypatch.setattr(collate, "batch", lambda questions, images, answers, *rest: seen.update(q=questions, a=answers))
    collate([sample(0, "a red circle", meta=meta)])
    assert seen == {"q": [question], "a": [answer]}


def edited_folder(folder, change):
    """A LLaVA's folder whose processor configuration went through ``change``."""
    name = made.llava(folder)
    for file in (folder / "processor_config.json", folder / "preprocessor_config.json"):
        if file.exists():
            config = json.loads(file.read_text())
            change(config)
            file.write_text(json.dumps(config))
    return name


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("patch_size", None, "patch_size is None in processor_config.json .*, but 8 in the model"),
        ("patch_size", 12, "patch_size is 12 in processor_config.json .*, but 8 in the model"),
        ("num_additional_image_tokens", 0, "num_additional_image_tokens is 0 in .*, but 1 in the model"),
        (
            "vision_feature_select_strategy",
            "full",
            "vision_feature_select_strategy is full in .*, but default in the model",
        ),
    ],
)
def test_a_processor_that_disagrees_with_its_model_is_refused(tmp_path, field, value, why):
    with pytest.raises(InputError, match=why):
        load_host(edited_folder(tmp_path / "h", lambda c: c.update({field: value}) if "patch_size" in c else None))


def test_pictures_of_another_size_than_the_models(tmp_path):
    def smaller(config):
        images = config.get("image_processor", config)
        if "crop_size" in images:
            images["crop_size"] = {"height": 16, "width": 16}

    with pytest.raises(InputError, match=r"size is 16 in .*, but 24 in the model"):
        load_host(edited_folder(tmp_path / "h", smaller))


def test_a_family_that_is_not_known_is_refused_by_name(tmp_path):
    import transformers as t

    vision = t.SiglipVisionConfig(**{**made.CLIP, "image_size": 24})
    pins, text = [[24, 48], [48, 24]], t.Qwen2Config(**made._text(96, num_key_value_heads=2))
    config = t.LlavaOnevisionConfig(
        vision_config=vision, text_config=text, image_token_index=4, video_token_index=7, image_grid_pinpoints=pins
    )
    images = t.LlavaOnevisionImageProcessor(size={"height": 24, "width": 24}, image_grid_pinpoints=pins)
    video = t.LlavaOnevisionVideoProcessor(size={"height": 24, "width": 24})
    processor = t.LlavaOnevisionProcessor(images, made.tokenizer(), video, num_image_tokens=9, chat_template=TEMPLATE)
    with pytest.raises(InputError, match=r"of the family llava_onevision .*LlavaOnevisionProcessor.* not known here"):
        load_host(made._save(tmp_path / "h", t.LlavaOnevisionForConditionalGeneration(config), processor))
