"""The picture of FVU over L0."""

from mmsae.training.members.table import draw


def test_seeds_that_agree_are_drawn(tmp_path):
    about = {"d_sae": 32, "l0/image": 2.0, "dead/image": 0.1, "fvu/image": 0.1, "curve": "ratio 2"}
    rows = [{**about, "point": k, "seed": seed} for k in (2, 4) for seed in range(3)]
    assert sum([0.1] * 3) / 3 > 0.1  # the mean of three equal values lies above all of them
    draw(rows, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 0
