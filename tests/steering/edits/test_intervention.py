"""Write-backs and top-k policies against the formulas, for every composition of SAEs."""

import pytest
import torch
from torch.nn.functional import normalize

from mmsae import InputError
from mmsae.hosts.sites import Where
from mmsae.sae import TopK
from mmsae.steering import Edit, Intervention
from mmsae.steering.edits import codes as algebra
from tests.helpers.steer_saes import AFFINE, COMPOSITIONS, K, fired, items, make, orthonormal

every = pytest.mark.parametrize("name", COMPOSITIONS)


def raw(edit, **more):
    return Intervention(edit, unit="raw", **more)


def by_hand(sae, x, edit, m="image"):
    """``x + dec(z') - dec(z)`` through dense codes."""
    codes = sae.encode(x, m)
    z = codes.to_dense()
    new = z.clone()
    new[:, list(edit.ids)] = edit.apply(z[:, list(edit.ids)])
    dense = codes._replace(values=new, indices=None)
    return x + sae.decode(dense, m) - sae.decode(codes, m), dense


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", ["post", "pre", "budget"])
def test_edits_that_change_nothing_return_the_same_object(name, dtype, policy):  # T1
    if name == "vl_sae" and policy != "post":
        pytest.skip("refused, see below")
    sae, x = make(name)
    x = x.to(dtype).float()  # what a host of this precision hands over
    on, _ = fired(sae, x)
    z = sae.encode(x, "image").gather(torch.tensor([on]))
    for edit in (Edit(), Edit.scale(on, 1), Edit.add(on, 0), Edit.swap(on, z), Edit.clamp(on), Edit.mix(on, z, 0.7)):
        steer = raw(edit, policy=policy).bind(sae, "image", dtype)
        assert steer(x, items(len(x))) is x
        assert steer.log.share == 0 and steer.log.calls == 1
    one = x[:1]
    z = float(sae.encode(one, "image").gather(torch.tensor([on])))  # not of the batch, where the last bit may differ
    assert raw(Edit.set(on, z), policy=policy).bind(sae, "image")(one, items(1)) is one


@every
@pytest.mark.parametrize("m", ["image", "text"])
def test_delta_is_the_difference_of_reconstructions(name, m):
    sae, x = make(name)
    if m not in sae.modalities:
        pytest.skip("one modality")
    on, off = fired(sae, x, m)
    edit = Edit.scale(on, -3) + Edit.set((off or on + 1) % sae.d_sae, 2.0)
    before = x.clone()
    new = raw(edit).apply(sae, x, m)
    want, dense = by_hand(sae, x, edit, m)
    assert torch.allclose(new, want, atol=1e-5) and torch.equal(x, before)
    splice = raw(edit, writeback="splice").apply(sae, x, m)
    assert torch.allclose(splice, sae.decode(dense, m), atol=1e-5)
    error = x - sae.decode(sae.encode(x, m), m)
    assert torch.allclose(new, splice + error, atol=1e-5)  # T2


def test_delta_equals_splice_where_reconstruction_is_exact():  # T2
    sae = orthonormal()
    x = torch.rand(5, 8)
    edit = Edit.set(3, 2.0) + Edit.scale(1, -1)
    assert torch.allclose(raw(edit).apply(sae, x), raw(edit, writeback="splice").apply(sae, x), atol=1e-7)


def test_reencoding_returns_what_was_set():  # T3
    sae = orthonormal()
    x = torch.rand(5, 8)
    z = sae.encode(raw(Edit.set(3, 2.5)).apply(sae, x)).to_dense()
    assert torch.allclose(z[:, 3], torch.full((5,), 2.5), atol=1e-6)
    others = [i for i in range(8) if i != 3]
    assert torch.equal(z[:, others], x[:, others])


def test_disjoint_edits_commute_bit_exactly_in_the_host():  # T4
    sae, x = make("paired_topk")
    a, b = Edit.scale([3, 40], -5), Edit.set([7, 20], [1.0, 2.0])
    assert torch.equal(raw(a + b).apply(sae, x, "text"), raw(b + a).apply(sae, x, "text"))
    assert torch.equal(raw(Edit.scale(7, 3) + b).apply(sae, x, "text"), raw(b).apply(sae, x, "text"))


def test_bias_cancels_and_row_scale_does_not():  # T5
    sae, x = make("topk")
    sae.encoder.subtract_decoder_bias = False
    edit = Edit.add(5, 2.0)
    dx = raw(edit).apply(sae, x) - x
    sae.dictionary("image").bias.add_(1)
    assert torch.equal(raw(edit).apply(sae, x) - x, dx)
    sae, x = make("paired_topk")
    dx = raw(edit).bind(sae, "image")(x, items(64)) - x
    sigma = torch.rand(64, 1) * 5 + 0.5
    codes = sae.encode(x, "image")
    assert torch.allclose(dx, 2 * sae.dictionary("image").weight[5] * codes.info.inner * codes.info.outer, atol=1e-5)
    change = torch.full((64, 1), 2.0)
    scaled = codes.info._replace(outer=codes.info.outer * sigma)
    ids = torch.tensor([5])
    assert torch.allclose(
        algebra.linear(sae, "image", change, ids, scaled), sigma * algebra.linear(sae, "image", change, ids, codes.info)
    )
    twice = raw(edit).apply(sae, 3 * x, "image") - 3 * x  # the row's own length is what is divided by
    assert torch.allclose(twice, 3 * dx, atol=1e-4)


def test_signed_codes_are_reselected_by_size_and_not_clipped():
    sae, x = make()
    sae.selector = TopK(K, score="abs").eval()
    out = sae({"image": x})["image"]
    codes, u = out.codes, out.pre.dense()
    assert sae.signed and (codes.values < 0).any()
    steer = raw(Edit.set([3, 7], [-2.0, -1.9]), policy="pre").bind(sae, "image")
    after = algebra.reselect(out.pre, codes, steer.edit, K, items(64), signed=True).to_dense()
    edited = u.index_copy(1, torch.tensor([3, 7]), torch.tensor([-2.0, -1.9]).expand(64, 2))
    top = edited.abs().topk(K).indices
    torch.testing.assert_close(after, torch.zeros_like(u).scatter(1, top, edited.gather(1, top)))
    assert (after[:, 3] < 0).any()
    moved = raw(Edit.add(3, -9.0)).apply(sae, x, "image") - x
    want = algebra.linear(sae, "image", torch.full((64, 1), -9.0), torch.tensor([3]), codes.info)
    torch.testing.assert_close(moved, want, atol=1e-4, rtol=1e-4)
    gone = raw(Edit.ablate(5), writeback="project_out").apply(sae, x, "image") - algebra.origin(sae, "image", x)
    atom = torch.nn.functional.normalize(sae.dictionary("image").rows()[5], dim=0)
    assert (gone @ atom).abs().max() < 1e-4  # both poles


@pytest.mark.parametrize("name", AFFINE)
def test_top_k_policies(name):  # T6
    sae, x = make(name)
    codes = sae.encode(x, "image")
    new = next(i for i in range(sae.d_sae) if not (codes.indices == i).any())
    for policy, l0 in (("post", K + 1), ("pre", K), ("budget", K)):
        steer = raw(Edit.set(new, 50.0), policy=policy, writeback="splice").bind(sae, "image")
        out = sae({"image": x})["image"]
        _, touched = steer._change(out, codes, items(64))
        if policy == "post":
            sparse = Edit.set(new, 50.0)
            _, after = by_hand(sae, x, sparse)
            after = after.values
        elif policy == "pre":
            after = algebra.reselect(out.pre, codes, steer.edit, K, items(64)).to_dense()
        else:
            moved = algebra.within_budget(codes, torch.full((64, 1), 50.0), steer.ids, K)
            after = codes.to_dense().scatter_add(1, moved.indices, moved.values)
        before = codes.to_dense()
        full = codes.l0() == K
        assert full.any() and ((after != 0).sum(1)[full] == l0).all() and touched.all()
        assert torch.allclose(
            steer(x, items(64)), sae.decode(codes._replace(values=after, indices=None), "image"), atol=1e-4
        )
        gone = (before != 0) & (after == 0)
        assert (gone.sum(1)[full] == (policy != "post")).all()
        if policy != "post":  # the weakest goes
            weakest = torch.where(before != 0, before, torch.inf).argmin(1)
            assert gone[full].int().argmax(1).equal(weakest[full])


def test_pre_drops_a_set_value_that_is_too_small():
    sae, x = make("topk")
    codes = sae.encode(x)
    full = codes.l0() == K
    new = next(i for i in range(sae.d_sae) if not (codes.indices == i).any())
    x = x[full]
    assert raw(Edit.set(new, 1e-6), policy="pre").bind(sae)(x, items(len(x))) is x
    assert raw(Edit.set(new, 1e-6)).bind(sae)(x, items(len(x))) is not x


@every
def test_rows_do_not_depend_on_their_batch(name):  # T7
    sae, x = make(name)
    policies = ("post", "pre", "budget") if name in AFFINE else ("post",)
    for policy in policies:
        iv = raw(Edit.set(5, 3.0) + Edit.scale(9, -2), policy=policy, guard=0.9)
        whole = iv.apply(sae, x, "image")
        alone = torch.cat([iv.apply(sae, row[None], "image") for row in x])
        assert torch.allclose(whole, alone, atol=1e-5)


@every
@pytest.mark.parametrize("writeback", ["delta", "direction"])
@pytest.mark.parametrize("gamma", [0.3, -2.0])
def test_rel_norm(name, writeback, gamma):  # T20
    sae, x = make(name)
    for ids in (5, [5, 9]):
        new = Intervention(Edit.add(ids, gamma), unit="rel_norm", writeback=writeback).apply(sae, x, "image")
        ratio = (new - x).double().norm(dim=1) / x.double().norm(dim=1)
        assert torch.allclose(ratio, torch.full_like(ratio, abs(gamma)), atol=1e-6)
    along = normalize(sae.dictionary("image").weight[5], dim=0) * (1 if gamma > 0 else -1)
    new = Intervention(Edit.add(5, gamma), unit="rel_norm", writeback=writeback).apply(sae, x, "image")
    assert torch.allclose(normalize(new - x, dim=1), along.expand_as(x), atol=1e-5)


def test_direction_is_absolute_without_rel_norm():
    sae, x = make("vl_sae")  # atoms are not of unit length
    new = raw(Edit.add(5, 2.5), writeback="direction").apply(sae, x, "text")
    assert torch.allclose(new, x + 2.5 * normalize(sae.dictionary("text").weight[5], dim=0), atol=1e-5)
    assert raw(Edit.add(5, 0.0), writeback="direction").bind(sae, "text")(x, items(64)) is x


@every
def test_project_out(name):
    sae, x = make(name)
    atoms = sae.dictionary("image").weight[[5, 9]]
    new = raw(Edit.ablate([5, 9]), writeback="project_out").apply(sae, x, "image")
    u = algebra.atoms(sae, "image", torch.tensor([5, 9]))
    first = normalize(u[0], dim=0)
    second = normalize(u[1] - (u[1] @ first) * first, dim=0)
    codes = sae.encode(x, "image")
    b = sae.decode(codes._replace(values=torch.zeros_like(codes.values)), "image")  # dec(0)
    want = x.clone()
    for d in (first, second):
        want -= ((x - b) @ d).clamp(min=0)[:, None] * d
    assert torch.allclose(new, want, atol=1e-4)
    single = raw(Edit.ablate(5), writeback="project_out").apply(sae, x, "image")
    assert ((single - b) @ atoms[0] <= 1e-4).all() and ((x - b) @ atoms[0] > 1e-2).any()


def test_replace_puts_the_donor_where_the_feature_fires():
    sae = orthonormal(4)
    x = torch.zeros(2 * 9, 4)
    x[4, 2], x[9, 2] = 1.0, 0.4  # the middle of the first map, the corner of the second
    x[:, 0] = torch.arange(18.0)
    where = Where(torch.arange(2).repeat_interleave(9), torch.arange(9).repeat(2), grid=(3, 3))
    donor = torch.full_like(x, -7.0)
    iv = raw(Edit.ablate(2), writeback="replace", donor=lambda rows, at, mask: donor, active=0.5)
    new = iv.bind(sae)(x, where)
    assert torch.equal(new[4], donor[4]) and torch.equal(new[:4], x[:4]) and torch.equal(new[5:], x[5:])
    grown = iv.vary(active=[0.0], dilate=[1])[0].bind(sae)(x, where)
    changed = (grown == -7).all(1)
    assert changed[:9].all() and changed[9:].nonzero()[:, 0].tolist() == [0, 1, 3, 4]  # not over the edge of a map
    rest = raw(Edit.ablate(2), writeback="replace", donor="mean").bind(sae)(x, where)
    free = [i for i in range(9) if i != 4]
    assert torch.allclose(rest[4], x[free].mean(0), atol=1e-6)  # this SAE explains everything: no residual
    assert raw(Edit.ablate(2), writeback="replace", donor="mean", active=2.0).bind(sae)(x, where) is x


def test_replace_by_the_mean_keeps_what_the_sae_does_not_explain_and_goes_part_of_the_way():
    sae = orthonormal(8, k=2)
    x = torch.rand(6, 8)
    x[2, 4] = 3.0
    where = Where(torch.zeros(6, dtype=torch.long), torch.arange(6))
    free = [0, 1, 3, 4, 5]
    want = x[free].mean(0) + x[2] - sae.decode(sae.encode(x))[2]
    iv = raw(Edit.ablate(4), writeback="replace", donor="mean", active=2.0)
    full, half = (i.bind(sae)(x, where) for i in iv.vary(strength=[1.0, 0.5]))
    assert torch.allclose(full[2], want, atol=1e-6) and not torch.allclose(want, x[free].mean(0), atol=0.1)
    assert torch.allclose(half[2], (x[2] + want) / 2, atol=1e-6) and torch.equal(half[free], x[free])


def test_every_active_feature_is_amplified():
    for name in COMPOSITIONS:
        sae, x = make(name)
        new = raw(Edit.scale(None, 1.5)).apply(sae, x, "image")
        codes = sae.encode(x, "image")
        more = sae.decode(codes._replace(values=1.5 * codes.values), "image")
        assert torch.allclose(new, x + more - sae.decode(codes, "image"), atol=1e-5)
        assert raw(Edit.scale(None, 1)).bind(sae, "image")(x, items(64)) is x


def test_splice_without_edit_reconstructs():
    sae, x = make("paired_topk")
    new = raw(Edit(), writeback="splice").apply(sae, x, "image")
    assert torch.allclose(new, sae.decode(sae.encode(x, "image")), atol=1e-6)


def test_half_precision_weights_and_autocast_of_the_host():
    sae, x = make("topk")
    want = raw(Edit.set(5, 3.0)).apply(sae, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(raw(Edit.set(5, 3.0)).apply(sae, x), want)
    assert torch.allclose(raw(Edit.add(5, 3.0), writeback="direction").apply(sae.bfloat16(), x).float(),
                          x + 3 * normalize(sae.dictionary("image").weight[5].float(), dim=0), atol=1e-4)  # fmt: skip


def test_log_tells_the_change_that_remains_after_rounding():
    sae = orthonormal()
    x = torch.full((2, 8), 256.0)
    edit = Edit.add(0, 0.5)  # below half of bfloat16's step at 256
    exact, rounded = (raw(edit).bind(sae, None, t) for t in (torch.float32, torch.bfloat16))
    exact(x, items(2)), rounded(x, items(2))
    assert exact.log.relative == pytest.approx(0.5 / (256 * 8**0.5), rel=1e-4) and rounded.log.relative == 0
    (row,) = exact.log.table()
    assert row["share"] == 1 and row["rows"] == 2 and row["step"] is None and row["phase"] == "prefill"


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"edit": Edit.set(48, 1.0)}, "feature 48 is not one of the SAE's 48"),
        ({"edit": Edit.set(4, 1.0), "unit": "x_max"}, "'x_max' needs statistics"),
        ({"edit": Edit.ablate(4, "corpus")}, "needs statistics"),
        ({"edit": Edit.set(4, 1.0), "unit": "kl"}, "at_kl"),
        ({"edit": Edit.set(4, 1.0), "unit": "x_median"}, "unit 'x_median' is not one of"),
        ({"edit": Edit.set(4, 1.0), "writeback": "inject"}, "'inject' is not one of"),
        ({"edit": Edit.set(4, 1.0), "writeback": "direction"}, "takes an edit of add alone, not set"),
        ({"edit": Edit.set(4, 1.0), "unit": "rel_norm"}, "takes an edit of add alone, not set"),
        ({"edit": Edit.add(4, 1.0), "unit": "rel_norm", "writeback": "splice"}, "splice"),
        ({"edit": Edit.ablate(4), "writeback": "replace"}, "needs a donor"),
        ({"edit": Edit.ablate(4), "writeback": "splice", "branch": "sign"}, "sign"),
        ({"edit": Edit.set(4, 1.0), "policy": "post-hoc"}, "policy 'post-hoc'"),
        ({"edit": Edit.add(4, 1.0), "writeback": "direction", "policy": "pre"}, "about codes"),
    ],
)
def test_refused(kwargs, says):
    sae, _ = make("topk")
    with pytest.raises(InputError, match=says):
        Intervention(**({"unit": "raw"} | kwargs)).bind(sae)


def test_distance_encoders_know_post_only():
    sae, _ = make("vl_sae")
    for policy in ("pre", "budget"):
        with pytest.raises(InputError, match="distance encoders"):
            raw(Edit.set(1, 1.0), policy=policy).bind(sae, "image")


def test_sparse_difference():
    sae, x = make("topk")
    old = sae.encode(x)
    new = old._replace(indices=old.indices.roll(1, 1), values=old.values.roll(1, 1))
    assert not algebra.difference(new, old).values.any()
    new = old._replace(indices=(old.indices + (torch.arange(K) == 0)) % sae.d_sae)
    change = algebra.difference(new, old)
    dense = torch.zeros(64, sae.d_sae).scatter_add(1, change.indices, change.values)
    want = torch.zeros(64, sae.d_sae).scatter_add(1, new.indices, new.values) - old.to_dense()
    assert torch.allclose(dense, want, atol=1e-6)
