"""Gates: what they exclude stays bit-identical, and disjoint ones add up."""

import pytest
import torch

from mmsae import InputError
from mmsae.hosts.sites import COND, UNCOND, Where
from mmsae.steering import Edit, Gate, Intervention
from tests.helpers.steer_saes import make, orthonormal

#: two prompts of BOS, words, EOS and padding
TEXT = Where(
    item=torch.arange(2).repeat_interleave(6),
    position=torch.arange(6).repeat(2),
    special=torch.tensor([1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]).bool(),
)
MAP = Where(  # one prompt, both branches, a map of 2 x 4 cells
    item=torch.zeros(16, dtype=torch.long),
    position=torch.arange(8).repeat(2),
    special=torch.zeros(16, dtype=torch.bool),
    grid=(2, 4),
    branch=torch.tensor([UNCOND, COND]).repeat_interleave(8),
    step=3,
)


def rows(gate, where, modality=""):
    return gate.weight(where, modality)[:, 0]


def kept(gate, where, modality=""):
    return rows(gate, where, modality).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("tokens", "modality", "want"),
    [
        ("content", "text", [1, 2]),
        (None, "text", [1, 2]),
        (None, "image", list(range(12))),
        ("all", "text", list(range(12))),
        ("eos", "text", [3, 7]),  # the second prompt is empty: BOS, EOS, padding
        ("pad", "text", [4, 5, 8, 9, 10, 11]),
        ([0, 2], "text", [0, 2, 6, 8]),
        ("text", "text", list(range(12))),
    ],
)
def test_tokens_of_a_text_encoder(tokens, modality, want):
    assert kept(Gate(tokens), TEXT, modality) == want


def test_tokens_of_a_language_model():
    where = TEXT._replace(image=TEXT.position == 1)
    assert kept(Gate("image"), where, "text") == [1, 7]
    assert kept(Gate("text"), where, "text") == [i for i in range(12) if i not in (1, 7)]
    with pytest.raises(InputError, match="text encoders"):
        rows(Gate("eos"), where, "text")


def test_branches():  # T11: without guidance everything is conditional
    assert kept(Gate(), MAP) == list(range(8, 16)) and kept(Gate(branch="uncond"), MAP) == list(range(8))
    assert rows(Gate(branch="sign"), MAP).tolist() == [-1.0] * 8 + [1.0] * 8
    assert kept(Gate(branch="all"), MAP) == list(range(16))
    undoubled = Where(torch.arange(4), branch=torch.full((4,), COND))
    for branch in ("cond", "all", "sign"):
        assert rows(Gate(branch=branch), undoubled).tolist() == [1.0] * 4
        assert rows(Gate(branch=branch), Where(torch.arange(4))).tolist() == [1.0] * 4
    assert not rows(Gate(branch="uncond"), undoubled).any()
    with pytest.raises(InputError, match="'uncond' at a site without"):
        rows(Gate(branch="uncond"), Where(torch.arange(4)))


def test_space_is_average_pooled_to_the_grid():
    space = torch.zeros(4, 8)
    space[:2, :2] = 1  # two by two pixels are a cell
    space[2, 6] = 1
    want = torch.zeros(2, 4)
    want[0, 0], want[1, 3] = 1, 0.25
    assert torch.equal(rows(Gate(space=space, branch="all"), MAP), want.flatten().repeat(2))
    small = Gate(space=[[1.0, 0.0]], branch="cond")
    assert kept(small, MAP) == [8, 9, 12, 13]
    per_item = Gate(space=torch.stack([space, 1 - space]), branch="all")
    assert torch.equal(rows(per_item, MAP._replace(item=MAP.item + 1)), 1 - want.flatten().repeat(2))
    with pytest.raises(InputError, match="no map"):
        rows(small, TEXT)
    with pytest.raises(InputError, match="maps of 2 items, the batch has 3"):
        rows(per_item, MAP._replace(item=MAP.item + 2))


def test_steps_and_phase():
    assert len(kept(Gate(steps=(3, 4)), MAP)) == 8 and not kept(Gate(steps=(0, 3)), MAP)
    assert Gate(steps=range(2, 5)).steps == (2, 5) and not kept(Gate(steps=(4, 9)), MAP)
    with pytest.raises(InputError, match=r"\[2, 5\) leave the schedule, which has 4 steps"):
        Gate(steps=(2, 5)).check_steps(4)
    Gate(steps=(2, 4)).check_steps(4)
    with pytest.raises(InputError, match="outside of a generation's steps"):
        rows(Gate(steps=(0, 1)), TEXT)
    one = Where(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), start=0)
    assert kept(Gate(phase="prefill"), one) == [0] and not kept(Gate(phase="decode"), one)  # T16: one token, no cache
    assert kept(Gate(phase="decode"), one._replace(start=7)) == [0] == kept(Gate(), one._replace(start=7))
    piece = one._replace(start=7, prompt=9)  # a prompt in pieces
    assert kept(Gate(phase="prefill"), piece) == [0] and not kept(Gate(phase="decode"), piece)
    with pytest.raises(InputError, match="cannot be told"):
        kept(Gate(phase="decode"), piece._replace(prompt=None))


GATES = {
    "branch": [{}, {"branch": "cond"}, {"branch": "uncond"}],
    "space": [{}, {"space": [[1.0, 0.0]]}, {"space": [[0.0, 1.0]]}],
    "tokens": [{}, {"tokens": [0, 5]}, {"tokens": [1, 2, 3, 4, 6, 7]}],
}


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("composition", ["topk", "paired_topk", "vl_sae"])
def test_untouched_rows_are_bit_identical_and_gates_add_up(name, composition):  # T8, T9
    sae, x = make(composition)
    x, edit = x[:16], Edit.add([3, 7], 2.0) + Edit.scale(11, -4)
    whole, *parts = ({"branch": "all"} | g for g in GATES[name])

    def run(gate):
        return Intervention(edit, unit="raw", **gate).bind(sae, "image")(x, MAP)

    total = run(whole)
    union = x.clone()
    for part in parts:
        new, on = run(part), rows(Gate(**part), MAP) != 0
        assert torch.equal(new[~on], x[~on]) and not torch.equal(new[on], x[on]) and on.any() and not on.all()
        union[on] = new[on]
    assert torch.allclose(union, total, atol=1e-5)
    idle = Intervention(edit, unit="raw", steps=(0, 3)).bind(sae, "image")
    assert idle(x, MAP) is x and idle.log.table()[0]["share"] == 0 and idle.log.table()[0]["step"] == 3


def test_sign_moves_the_branches_apart():
    sae, x = make("topk")
    x = x[:8].repeat(2, 1)
    new = Intervention(Edit.add(3, 2.0), unit="raw", branch="sign").bind(sae)(x, MAP)
    assert torch.allclose(new[8:] - x[8:], x[:8] - new[:8], atol=1e-6) and not torch.equal(new, x)


def test_fractional_weights_scale_the_change():
    sae, x = make("topk")
    iv = Intervention(Edit.set(3, 2.0), unit="raw", branch="all")
    full = iv.bind(sae)(x[:16], MAP) - x[:16]
    half = iv.vary(space=[[[0.5]]])[0].bind(sae)(x[:16], MAP) - x[:16]
    assert torch.allclose(half, full / 2, atol=1e-6)
    spliced = iv.vary(writeback=["splice"], space=[[[0.5]], [[1.0]]])
    half, full = (i.bind(sae)(x[:16], MAP) - x[:16] for i in spliced)
    assert torch.allclose(half, full / 2, atol=1e-6)


def test_active_rows_only():
    sae = orthonormal()
    x = torch.zeros(3, 8)
    x[1, 2], x[2, 2], x[2, 5] = 0.5, 2.0, 0.1
    where = Where(torch.arange(3))
    edit = Edit.add(4, 1.0) + Edit.scale(2, 1.0)

    def changed(**gate):
        new = Intervention(edit, unit="raw", **gate).bind(sae)(x, where)
        return (new != x).any(1).nonzero()[:, 0].tolist()

    assert changed() == [0, 1, 2] and changed(active=0.0) == [1, 2] and changed(active=1.0) == [2]
    assert changed(active=[1.0, 9.0]) == [2] and changed(active=[3.0, 9.0]) == []
    with pytest.raises(InputError, match="3 thresholds, the edit 2"):
        changed(active=[1.0, 1.0, 1.0])


def test_guard_skips_samples_that_the_sae_does_not_explain():
    sae = orthonormal(8, k=2)
    sae.fit_normaliser({"image": torch.randn(4000, 8)})  # variance 8
    x = torch.zeros(4, 8)
    x[0, :2] = 3.0  # explained
    x[1] = 2.0  # two of eight are kept: 24 of 32 are lost
    x[2, :2] = 3.0
    x[3] = 0.5  # 6 * .25 = 1.5 lost
    own = Where(torch.arange(4))
    pairs = Where(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]))

    def changed(where, q):
        new = Intervention(Edit.add(7, 1.0), unit="raw", guard=q).bind(sae)(x, where)
        return (new != x).any(1).tolist()

    assert changed(own, 0.5) == [True, False, True, True]  # FVU 0, 3, 0, .19
    assert changed(own, 0.1) == [True, False, True, False]
    assert changed(pairs, 0.5) == [False, False, True, True]  # by sample: (0 + 24) / 16, (0 + 1.5) / 16
    assert changed(own, 0.0) == [False] * 4


def test_guard_without_a_fitted_normaliser_counts_from_the_bias():
    sae = orthonormal(8, k=1)
    x = torch.tensor([[3.0, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]])  # 1 of 10 lost, 3 of 4
    new = Intervention(Edit.add(7, 1.0), unit="raw", guard=0.5).apply(sae, x)
    assert (new != x).any(1).tolist() == [True, False]


@pytest.mark.parametrize(
    ("gate", "says"),
    [
        ({"branch": "both"}, "branch 'both' is not one of"),
        ({"phase": "first"}, "phase 'first' is not one of"),
        ({"tokens": "cls"}, "tokens 'cls' is not one of"),
        ({"steps": (3, 3)}, "hold no step"),
        ({"steps": range(0, 10, 2)}, "no window"),
        ({"space": [0.5, 1.0]}, "space has shape"),
        ({"space": [[1.5]]}, r"within \[0, 1\]"),
    ],
)
def test_refused(gate, says):
    with pytest.raises(InputError, match=says):
        Gate(**gate)
