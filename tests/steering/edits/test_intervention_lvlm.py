"""The same interventions on vision-language models, in one pass and while generating."""

import pytest
import torch

from mmsae import SAE, InputError
from mmsae.hosts import load_host
from mmsae.sae import TopK
from mmsae.steering import Edit, Intervention, attach
from tests.helpers.lvlm import llava, picture
from tests.helpers.steer_saes import mean_kl

pytestmark = pytest.mark.filterwarnings("ignore:.*dx")  # random SAEs push far
QUESTIONS = ["is there a red circle?", "what", "is there a blue square left of a red circle?"]
GREEDY = {"do_sample": False, "eos_token_id": None, "suppress_tokens": [4, 5, 6, 7]}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return load_host(llava(tmp_path_factory.mktemp("llava")))


@pytest.fixture()
def batch(host):
    return host.collate.batch(QUESTIONS, [picture(0), picture(1), None])


def make_sae(width=32, modalities=("image", "text"), seed=0):
    torch.manual_seed(seed)
    return SAE(width, 64, modalities=modalities, selector=TopK(6)).eval().requires_grad_(False)


def raw(edit, **more):
    return Intervention(edit, unit="raw", **more)


PUSH = raw(Edit.add([3, 40], 6.0) + Edit.scale(9, -4.0))


@pytest.mark.parametrize("tokens", ["image", "text", "text_all", "all", "image_mean", "text_mean"])
def test_nothing_changes_without_a_change_and_only_gated_rows_do(host, batch, tokens):
    site, sae = f"layers.1:out[{tokens}]", make_sae()
    clean = host.forward(batch).logits
    with attach(host, {site: (sae, raw(Edit.scale(3, 1.0)))}) as log:
        assert torch.equal(host.forward(batch).logits, clean)
    assert log.share == 0
    with attach(host, {site: (sae, PUSH)}) as log:
        steered = host.forward(batch).logits
    assert not torch.allclose(steered, clean, atol=1e-4) and log.share > 0


def test_image_and_text_gates_on_the_whole_sequence(host, batch):
    site, sae = "layers.1:out[all]", make_sae()
    states = {}
    for tokens in ("image", "text", "all", "content", None):
        with attach(host, {site: (sae, raw(Edit.add(3, 6.0), tokens=tokens))}):
            states[tokens] = host.read(batch, ["layers.2:in[all]"])[0].x
    before = host.read(batch, [site])[0]
    image = host.read(batch, ["layers.1:out[image]"])[0]
    moved = {t: (x != before.x).any(1) for t, x in states.items()}
    assert moved["image"].sum() == len(image.x) and not (moved["image"] & moved["text"]).any()
    assert (moved["image"] | moved["text"]).all() and moved["all"].all()
    assert torch.equal(moved["content"], ~before.special) and torch.equal(moved[None], moved["content"])
    assert torch.equal(states["image"][moved["image"]], states["all"][moved["image"]])  # T9


def test_prefill_and_decode_are_told_apart_by_the_cache(host, batch):
    sae, site = make_sae(), "layers.1:out[all]"

    def run(**gate):
        with attach(host, {site: (sae, raw(Edit.add(3, 6.0), tokens="all", **gate))}) as log:
            host.generate(batch, max_new_tokens=4, **GREEDY)
        return {r["phase"]: r["share"] for r in log.table()}, log

    assert run()[0] == {"prefill": 1.0, "decode": 1.0}
    assert run(phase="prefill")[0] == {"prefill": 1.0, "decode": 0.0}
    shares, log = run(phase="decode")
    assert shares == {"prefill": 0.0, "decode": 1.0}
    assert {r["phase"]: r["calls"] for r in log.table()} == {"prefill": 1, "decode": 3}


@pytest.mark.parametrize("edit", [Edit.add([3, 40], 6.0), Edit.set(7, 9.0) + Edit.scale(3, -5.0)])
def test_cache_and_no_cache_agree(host, batch, edit):  # T16: edits of single rows
    sae = make_sae()
    with attach(host, {"layers.1:out[all]": (sae, raw(edit, tokens="all"))}):
        cached = host.generate(batch, max_new_tokens=5, use_cache=True, **GREEDY)
        plain = host.generate(batch, max_new_tokens=5, use_cache=False, **GREEDY)
    clean = host.generate(batch, max_new_tokens=5, **GREEDY)
    assert torch.equal(cached, plain) and not torch.equal(cached, clean)


def test_a_prompt_of_one_token_is_a_prefill(host):  # T16
    sae, seen = make_sae(), []
    for phase in ("prefill", "decode"):
        with attach(host, {"layers.1:out[all]": (sae, raw(Edit.add(3, 6.0), tokens="all", phase=phase))}) as log:
            host.model(input_ids=torch.tensor([[9]]), use_cache=True)
        seen.append(log.share)
    assert seen == [1.0, 0.0]


def test_positions_and_sources_by_token(host, batch):
    sae, site = make_sae(), "layers.1:out[all]"
    rows = host.read(batch, [site])[0]
    z = torch.rand(int(rows.position.max()) + 1, 2)
    iv = raw(Edit.swap([3, 40], z), tokens=[1, 4])
    with attach(host, {site: (sae, iv)}):
        after = host.read(batch, ["layers.2:in[all]"])[0].x
    on = torch.isin(rows.position, torch.tensor([1, 4]))
    dz = z[rows.position[on]] - sae.encode(rows.x, "text").gather(torch.tensor([3, 40]))[on]
    want = rows.x[on] + dz @ sae.dictionary("text").weight[[3, 40]]
    assert torch.allclose(after[on], want, atol=1e-5) and torch.equal(after[~on], rows.x[~on])


# T15: the vision tower. The projector reads hidden_states[-2] without CLS.


def tower_site(host, layer, tokens="all"):
    names = [n for n, _ in host.model.named_modules() if n.endswith(f"encoder.layers.{layer}") and "vision" in n]
    assert len(names) == 1
    return f"{names[0]}:out[{tokens}]"


def test_the_tap_layer_reaches_the_projector_and_what_is_beyond_does_not(host, batch):  # T15
    sae = make_sae(16, ("image",))
    clean, seen = host.forward(batch).logits, []
    projector = host.model.model.multi_modal_projector
    handle = projector.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))

    def run(layer, tokens):
        with attach(host, {tower_site(host, layer, tokens): (sae, raw(Edit.add(3, 6.0)))}) as log:
            logits = host.forward(batch).logits
        assert log.share > 0
        return logits, seen[-1]

    base = run(0, "all")
    host.forward(batch)
    clean_input = seen[-1]
    handle.remove()
    n_layers = host.model.config.vision_config.num_hidden_layers
    assert n_layers == 2 and not torch.equal(base[1], clean_input) and not torch.allclose(base[0], clean, atol=1e-5)
    handle = projector.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    for layer, tokens in ((1, "all"), (0, "cls")):  # one layer later; the class token alone
        logits, given = run(layer, tokens)
        assert torch.equal(logits, clean) and torch.equal(given, clean_input)
    handle.remove()


def test_states_of_the_tower_are_read_and_belong_to_their_prompts(host, batch):  # two of three have a picture
    site = tower_site(host, 0, "patches")
    tokens = host.capture(batch, [site])
    assert tokens.x["image"].shape == (2 * 9, 16) and tokens.item["image"].tolist() == [0] * 9 + [1] * 9
    assert tokens.position["image"].tolist() == [*range(1, 10)] * 2 and host.site(site).modality == "image"
    alone = host.capture(host.collate.batch(QUESTIONS[1:2], [picture(1)]), [site])
    assert torch.allclose(tokens.x["image"][9:], alone.x["image"], atol=1e-5)
    with attach(host, {site: (make_sae(16, ("image",)), raw(Edit.add(3, 0.0)))}):
        assert torch.equal(host.capture(batch, [site]).x["image"], tokens.x["image"])
    with pytest.raises(InputError, match="has no image for it"):
        host.capture(host.collate.batch(QUESTIONS[:1], [None]), [site])
    with pytest.raises(InputError, match="'image' is not one of all, patches, cls"):
        host.site(tower_site(host, 0, "image"))
    with pytest.raises(InputError, match="part neither of"):  # its tokens have no class token any more
        host.site("model.multi_modal_projector:out[all]")


def test_sites_of_means_and_of_another_width_are_refused_where_they_make_no_sense(host, batch):
    with pytest.raises(InputError, match="has width 32, the SAE takes 16"):
        with attach(host, {"layers.1:out[image]": (make_sae(16), PUSH)}):
            raise AssertionError("attached")
    with pytest.raises(InputError, match="one row per item"):
        with attach(host, {"layers.1:out[text_mean]": (make_sae(), raw(Edit.add(1, 1.0), tokens=[0]))}):
            host.forward(batch)


def test_a_strength_can_be_a_divergence(host, batch):  # T21 on a model
    sae, site = make_sae(), "layers.1:out[text]"
    clean = host.forward(batch).logits[:, -1]

    def measure(iv):
        with attach(host, {site: (sae, iv)}):
            return mean_kl(clean, host.forward(batch).logits[:, -1])

    for target in (0.033, 0.1):
        iv, report = Intervention(Edit.add(3, 1.0), unit="kl", strength=target).at_kl(measure, unit="rel_norm")
        assert report.converged and measure(iv) == pytest.approx(target, rel=0.1) and iv.unit == "rel_norm"
