"""The stages of ``mmsae look``; each leaves its result whole and is skipped when it is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmsae.errors import InputError, NothingToGoBy
from mmsae.files import duration, write_json
from mmsae.hosts import Host, pick_device
from mmsae.interpret.browser.command import explore
from mmsae.interpret.names.command import name
from mmsae.interpret.scores.command import score
from mmsae.jobs.folder import JobFolder
from mmsae.jobs.stages import StageLog
from mmsae.look.host import choose_host, patch_site
from mmsae.look.options import Seen, Sight
from mmsae.look.photographs import list_photographs, write_photographs
from mmsae.look.summary import sentence, summary
from mmsae.options import Run, SAERun, call
from mmsae.types import IMAGE

FILE, SUMMARY = "look.json", "summary.json"
BATCH = 512  #: Patches of a training step
FEWEST = 32  #: Latents of the smallest SAE
LEAST = 50  #: Photographs without which there is nothing to learn


def look_at(
    folder: str, out: str, host: str = "", sight: Sight = Sight(), seen: Seen = Seen(), run: Run = Run()
) -> str:
    """Do the job of :func:`mmsae.look.command.look`; arguments are those.

    Raises:
        InputError: No photographs, too few that can be read, no host, or another job in OUT.
    """
    root, say = Path(out), print if run.progress else lambda *text, **_: None
    shards = root / "shards"
    n = _photographs(folder, root, sight.short_side, run, say)
    chosen = choose_host(host or _noted_host(root), pick_device(run.device), run.precision, say)
    site = chosen.site(sight.site or patch_site(chosen))
    job = {"photographs": _identity(shards), "host": chosen.fingerprint, "site": site.spec, **vars(sight)}
    job |= {**vars(seen), "hint": chosen.hint}
    held = JobFolder(root, job, "mmsae look", writes=(), but=("hint",), file=FILE, key="job", holds="a look")
    stages = StageLog(held)
    say(f"{n:,} photographs -> {chosen.hint} at {site.spec} -> an SAE -> the browser of its latents, in {root}")
    look = _Look(root, chosen, site.spec, sight, seen, run, Path(folder).resolve().name)
    for stage, work in look.stages().items():
        stages.run(stage, work)
    found = json.loads((root / SUMMARY).read_text())
    say(sentence(found["sae"], found.get("random")))
    page = root / "browser" / "index.html"
    say(f"about {duration(sum(stages.seconds.values()))} in all; open {page}")
    return str(page)


def _photographs(folder: str, root: Path, short_side: int, run: Run, say: Callable[..., None]) -> int:
    """Number of photographs in the shards; a folder that has moved away since they were written is not missed."""
    shards = root / "shards"
    done = (shards / "photographs.json").exists()
    if done and not Path(folder).is_dir():
        say(f"{folder} is not there any more; its photographs are in {shards}")
    else:
        if len(found := list_photographs(folder).photographs) < LEAST:
            raise InputError(f"{folder} has {len(found)} photographs; at least {LEAST} are needed to learn from")
        log = write_photographs(folder, shards, short_side, run.workers, run.progress)
        if log.counts:
            say(log.summary())
    said = json.loads((shards / "photographs.json").read_text())
    return said["job"]["n"] - said["faults"]["dropped"]


def _identity(shards: Path) -> str:
    return json.loads((shards / "photographs.json").read_text())["job"]["photographs"]


def _noted_host(root: Path) -> str:
    """The host that an earlier run in this folder chose: the hub may be there now and not then."""
    try:
        return json.loads((root / FILE).read_text())["job"]["hint"]
    except (OSError, ValueError, KeyError):
        return ""


class _Look:
    """What the stages share."""

    def __init__(self, root: Path, host: Host, site: str, sight: Sight, seen: Seen, run: Run, title: str):
        self.root, self.host, self.site, self.sight, self.seen, self.run = root, host, site, sight, seen, run
        self.title = title

    def stages(self) -> dict[str, Callable[[], Any]]:
        """Names and work, in order."""
        control = {"random": self.random} if self.seen.control else {}
        out = {"extract": self.extract, "fit": self.fit, **control, "evidences": self.collect}
        return out | {"names": self.names, "scores": self.scores, "browser": self.browser, "summary": self.summary}

    def extract(self) -> None:
        """Activations of the patches."""
        from mmsae.activations import extract

        extract(
            self.host, str(self.root / "shards"), self.root / "store", sites=self.site, dtype="float16", run=self.run
        )

    def fit(self) -> None:
        """The SAE, by ``mmsae fit``."""
        from mmsae.activations import ActivationStore
        from mmsae.recipes import find_recipe
        from mmsae.training.cli import run as lightning

        s, device = self.sight, self.host.device
        patches = ActivationStore(self.root / "store").spec.rows[IMAGE]
        latents = s.latents or max(FEWEST, min(2 * self.host.width(self.site), patches // 50))
        at = "model.sae.init_args"
        args = {
            "data.store": self.root / "store", "data.batch_size": BATCH, "trainer.default_root_dir": self.root / "run",
            "trainer.max_steps": s.steps, "trainer.val_check_interval": max(1, s.steps // 4), "seed_everything": s.seed,
            "trainer.accelerator": "gpu" if device.type == "cuda" else "cpu",
            "trainer.enable_progress_bar": str(self.run.progress).lower(),
            f"{at}.ratio": "null", f"{at}.d_sae": latents, f"{at}.selector.init_args.k": s.k,
        }  # fmt: skip
        flat = [part for k, v in args.items() for part in (f"--{k}", str(v))]
        if (self.root / "run" / "checkpoints" / "last.ckpt").exists():
            flat += ["--ckpt_path", "last"]
        lightning(["fit", "-c", find_recipe("configs/train/topk_store.yaml"), *flat])

    def random(self) -> None:
        """The control: the same SAE with random weights."""
        from mmsae.sae import SAE, random_control

        control = random_control(SAE.from_pretrained(self.root / "run" / "sae"), self.sight.seed)
        control.save_pretrained(self.root / "random")

    def collect(self) -> None:
        """What the latents fire on, and those of the control, in one pass of the host."""
        from mmsae.interpret.evidence.job import collect_evidence

        of = {self.root / "run" / "sae": self.root / "evidence"}
        of |= {self.root / "random": self.root / "evidence_random"} if self.seen.control else {}
        run, saes, outs = SAERun(**vars(self.run)), [str(s) for s in of], list(of.values())
        collect_evidence(saes, str(self.root / "shards"), outs, self.host, run=run)

    def names(self) -> None:
        """Names of latents, by captions and by words or classes that the host knows; there may be nothing to go by."""
        for folder in self.evidences():
            own = {"vocabulary": self.seen.vocabulary} if self.seen.vocabulary else {}
            try:
                call(name, str(folder), **own, device=str(self.host.device), progress=self.run.progress)
            except NothingToGoBy as e:
                print(f"latents have no names: {e}")

    def scores(self) -> None:
        """How well latents and their names hold on photographs that names were not made of, beside the control's."""
        first, *control = self.evidences()
        own = {"device": str(self.host.device), "progress": self.run.progress}
        try:
            call(score, str(first), control=str(control[0]) if control else "", **own)
        except NothingToGoBy as e:
            print(f"latents have no scores: {e}")

    def browser(self) -> None:
        """The pages."""
        evidences = [str(p) for p in self.evidences()]
        call(
            explore, evidences[0], out=str(self.root / "browser"), sae=str(self.root / "run" / "sae"),
            control=evidences[1] if len(evidences) > 1 else "", images=self.seen.images, title=self.title,
            progress=self.run.progress,
        )  # fmt: skip

    def summary(self) -> None:
        """What was found, in figures."""
        found = [summary(p) for p in self.evidences()]
        write_json(self.root / SUMMARY, dict(zip(("sae", "random"), found, strict=False)))

    def evidences(self) -> list[Path]:
        """The folders of evidence, that of the SAE first."""
        return [p for p in (self.root / "evidence", self.root / "evidence_random") if p.is_dir()]
