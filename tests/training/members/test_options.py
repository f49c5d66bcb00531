"""Which members a recipe says: names, short options, combinations; and ``mmsae fit`` with them, beside runs of one."""

import json

import pytest
import torch
from PIL import Image

from mmsae.cli import main
from mmsae.errors import InputError
from mmsae.info import describe
from mmsae.training.members.options import Members, as_args, names_of
from tests.helpers.training import RECIPE, SMALL, make_store

K = "model.sae.init_args.selector.init_args.k"
RATIO, WIDTH = "model.sae.init_args.ratio", "model.sae.init_args.d_sae"


def test_members_by_name_and_by_axes():
    assert Members().options() == {}
    named = Members({"wide": {"ratio": 16}, "control": {"freeze": "decoder", "seed": 3}, "plain": {}})
    assert named.options() == {
        "wide": {RATIO: 16, WIDTH: None}, "control": {"model.freeze": "decoder", "seed_everything": 3}, "plain": {},
    }  # fmt: skip
    axes = Members(axes={"k": [8, 16], "ratio": [2, 3.5], "seed": [0, 1]}).options()
    assert list(axes)[:3] == ["k8-ratio2-seed0", "k8-ratio2-seed1", "k8-ratio3.5-seed0"] and len(axes) == 8
    assert axes["k16-ratio3.5-seed1"] == {K: 16, RATIO: 3.5, WIDTH: None, "seed_everything": 1}
    both = Members({"a": {"k": 4}, "b": {}}, {"model.dead_after": [100, 200]}).options()
    assert list(both) == ["a-dead_after100", "a-dead_after200", "b-dead_after100", "b-dead_after200"]
    assert both["a-dead_after200"] == {K: 4, "model.dead_after": 200}
    assert names_of(list(both.values())) == ["k", "model.dead_after"]


def test_options_may_be_nested_or_name_classes():
    term = [{"class_path": "mmsae.sae.Reconstruction"}]
    selector = {"class_path": "mmsae.sae.BatchTopK", "init_args": {"k": 4}}
    nested = {"model": {"sae": {"init_args": {"selector": {"init_args": {"k": 5}}}}, "losses": term}}
    found = Members({"a": nested, "b": {"model.sae.init_args.selector": selector}}).options()
    assert found == {"a": {K: 5, "model.losses": term}, "b": {"model.sae.init_args.selector": selector}}
    assert as_args(found["a"]) == [f"--{K}", "5", "--model.losses", json.dumps(term)]
    assert as_args({WIDTH: None, "model.freeze": "decoder"}) == [f"--{WIDTH}", "null", "--model.freeze", "decoder"]


def test_what_members_share_is_refused():
    with pytest.raises(InputError, match=r"member a has data.batch_size: members differ in options of model and in"):
        Members({"a": {"data": {"batch_size": 4}}}).options()
    with pytest.raises(InputError, match="axes: k has no values"):
        Members(axes={"k": []}).options()
    with pytest.raises(InputError, match="two would be named k4"):
        Members(axes={"k": [4, 4]}).options()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("members")
    make_store(folder / "store", n=300)
    return folder


def fit(folder, root, *args, command="fit"):
    options = ["--data.store", folder / "store", "--trainer.default_root_dir", root, *SMALL, "--trainer.max_steps", 20]
    quiet = ["--trainer.enable_progress_bar", "false"]
    main([command, "-c", RECIPE, *map(str, [*options, *quiet, *args])])


LOSS = '[{"class_path": "mmsae.sae.Reconstruction"}, {"class_path": "mmsae.sae.AuxK"}]'


def test_each_folder_is_what_a_run_of_its_own_writes(place, capsys):
    parts = '{"text": {"class_path": "mmsae.sae.Dictionary"}}'
    text = f'"model.sae.init_args.modalities": ["text"], "model.sae.init_args.dictionaries": {parts}'
    members = f'{{"text": {{{text}, "model.losses": {LOSS}}}, "wide": {{"ratio": 5}}}}'
    many = ["--members", members, "--axes.seed", "[0, 1]", "--trainer.gradient_clip_val", 1]
    fit(place, place / "many", *many)
    said = capsys.readouterr().out
    assert said.count("SAE written to") == 4 and "text-seed0: dead latents" in said and "wide-seed1: val/fvu" in said
    for seed in (0, 1):
        one = ["--seed_everything", seed, "--trainer.gradient_clip_val", 1]
        fit(place, place / f"wide-seed{seed}", "--model.sae.init_args.ratio", 5, *one)
        text = ["--model.sae.init_args.modalities", '["text"]', "--model.losses", LOSS]
        text += ["--model.sae.init_args.dictionaries", parts]
        fit(place, place / f"text-seed{seed}", *text, *one)
        for name in (f"wide-seed{seed}", f"text-seed{seed}"):
            files = sorted(p.relative_to(place / "many" / name) for p in (place / "many" / name).rglob("*.*"))
            assert {str(f) for f in files} >= {"latents.json", "sae/cfg.json", "sae/sae_weights.safetensors"}
            for file in files:
                assert (place / "many" / name / file).read_bytes() == (place / name / file).read_bytes(), (name, file)
    rows = json.loads((place / "many/members.json").read_text())["members"]
    assert [r["member"] for r in rows] == ["text-seed0", "text-seed1", "wide-seed0", "wide-seed1"]
    assert rows[2]["ratio"] == 5 and rows[3]["seed"] == 1 and "fvu/image" not in rows[0] and rows[3]["fvu/image"] > 0
    assert (place / "many/members.md").read_text().count("\n") == 6
    with Image.open(place / "many/members.png") as picture:
        assert picture.format == "PNG"

    found = describe(place / "many")
    assert found["kind"] == "run of 4 SAEs" and found["members"]["wide-seed1"]["d_sae"] == 80

    # measured again, and gone on with
    capsys.readouterr()
    fit(place, place / "many", *many, "--ckpt_path", "last", command="validate")
    said = capsys.readouterr().out
    assert f"text-seed1: val/fvu/text {rows[1]['fvu/text']:.4g}" in said and said.count("val/fvu/text") >= 4
    with pytest.raises(SystemExit) as stop:
        fit(place, place / "many", "--members", members, "--ckpt_path", "last")
    assert stop.value.code == 2
    assert "the checkpoint is of other members: only the checkpoint has text-seed0" in capsys.readouterr().err
    fit(place, place / "many", *many)
    said = capsys.readouterr().out
    assert "many/wide-seed0/sae" in said and "was used before" in said
    assert (place / "many/wide-seed0/sae-earlier").is_dir()


def test_a_killed_run_goes_on(place):
    axes = ["--axes.k", "[2, 3]", "--checkpoint.every_n_train_steps", 7]
    fit(place, place / "whole", *axes)
    stop = ["--trainer.callbacks+", "tests.helpers.lit.StopAt", "--trainer.callbacks.step", 16]
    with pytest.raises(SystemExit):  # Lightning's answer to an interrupt
        fit(place, place / "killed", *axes, *stop)
    assert not (place / "killed/k2/sae").exists()
    fit(place, place / "killed", *axes, "--ckpt_path", "last")
    for name in ("k2/sae/sae_weights.safetensors", "k3/latents.json", "k3/sae-best/cfg.json", "members.json"):
        assert (place / "whole" / name).read_bytes() == (place / "killed" / name).read_bytes(), name
    state = torch.load(place / "killed/checkpoints/last.ckpt", weights_only=True)
    assert list(state["mmsae"]["members"]) == ["k2", "k3"]


def test_bad_input_is_one_sentence(place, capsys):
    def fails(*args):
        with pytest.raises(SystemExit) as stop:
            fit(place, place / "bad", *args)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and not (place / "bad").exists(), err
        return err

    assert "member k200: k = 200 does not fit d_sae = 48" in fails("--axes.k", "[2, 200]")
    assert "member batch_size2 has data.batch_size: members differ in" in fails("--axes", '{"data.batch_size": [2]}')
    assert "--export.folder is where one SAE goes: members go to RUN/NAME" in fails(
        "--axes.k", "[2]", "--export.folder", "elsewhere"
    )
    assert "key \"k\": Expected a <class 'int'>. Got value: many" in fails("--axes.k", '["many"]')
