"""One suite and how it is run, for one SAE or for all in a folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mmsae.evaluation.card.card import RESULTS, check_control, check_files, read_card, run_card
from mmsae.evaluation.card.gallery import check_host
from mmsae.evaluation.card.many import CACHE, Cards, settings_of
from mmsae.evaluation.card.reading import complete, host_name, read_sae
from mmsae.evaluation.options import Drawing, EvaluationRun, Foreign
from mmsae.evaluation.suite import Suite, load_suite
from mmsae.evaluation.suite_data import SuiteData
from mmsae.hosts import Host, load_host, pick_device
from mmsae.load import load_pair, other_host_warnings
from mmsae.metrics.concepts.names import LatentName, names_beside, read_names
from mmsae.recipes import find_recipe
from mmsae.sae import SAE
from mmsae.sae.fingerprint import sae_fingerprint
from mmsae.types import InputError


def asked_suite(suite: str, root: str, host: str, heads: Sequence[str]) -> Suite:
    """A suite with the heads that are asked for, or with all, after what it names was looked for.

    Raises:
        InputError: It has no such head, or what it names is not there.
    """
    asked = load_suite(find_recipe(suite), root, host)
    if not heads:
        check_files(asked)
        return asked
    if odd := [h for h in heads if h not in asked.heads]:
        raise InputError(f"{suite} has no head {odd[0]}, it has {', '.join(asked.heads)}")
    return replace(asked, heads={h: asked.heads[h] for h in heads})


@dataclass
class Scoring:
    """How SAEs are scored."""

    suite: Suite  #: Data and heads
    quick: bool  #: Whether at most 1,500 images a set are taken
    drawing: Drawing  #: Latents of each kind in a gallery, and their names
    seed: int  #: Of controls and draws
    foreign: Foreign  #: How SAEs of other libraries are read
    run: EvaluationRun  #: How to compute

    def __post_init__(self) -> None:
        self._hosts: dict[str, Host] = {}

    def say(self, text: str) -> None:
        """Print a line, where progress is asked for."""
        if self.run.progress:
            print(text, flush=True)

    def announce(self, folder: Path) -> None:
        """Say what will be done."""
        images = "at most 1,500 images a set" if self.quick else "all images that the suite asks for"
        n = len(self.suite.heads)
        what = f"{n} heads" if n > 1 else "one head"
        self.say(f"mmsae evaluate: {what} on {', '.join(self.suite.data)}, {images}; to {folder}")

    def host(self, name: str) -> Host:
        """A host, loaded once."""
        if name not in self._hosts:
            self._hosts[name] = load_host(name, device=pick_device(self.run.device), precision=self.run.precision)
        return self._hosts[name]

    def one(self, sae: str | SAE, folder: Path, controls: Sequence[str] = ()) -> Path:
        """The card of an SAE, written to ``folder``; returns its page.

        Args:
            sae: Folder, hub id, or the SAE.
            folder: Where the card appears.
            controls: Trained controls, as NAME=FOLDER.
        """
        trained, library = (sae, "mmsae") if isinstance(sae, SAE) else read_sae(sae)
        return self._card(trained, library, str(sae), folder, controls)

    def _card(self, trained: SAE, library: str, name: str, folder: Path, controls: Sequence[str] = ()) -> Path:
        mark, foreign = sae_fingerprint(trained), self.foreign
        loaded = self.host(host_name(trained, self.suite.host, name, foreign))
        warnings = complete(trained, library, loaded, self.suite, foreign, self.run)
        model = load_pair(trained, loaded, allow_other_site=self.run.allow_other_site)[0]
        called: dict[int, LatentName] = {}
        if self.drawing.gallery:
            check_host(loaded)
            try:
                called = read_names(self.drawing.names or names_beside(name), mark)
            except InputError as e:
                if self.drawing.names:
                    raise
                warnings = [*warnings, f"the gallery is without names: {e}"]
        others = {}
        for text in controls:
            own, sep, path = text.partition("=")
            if not sep or own in others:
                raise InputError(f"--controls takes NAME=FOLDER, each name once, not {text!r}")
            others[own] = load_pair(path, loaded, allow_other_site=self.run.allow_other_site)[0]
            check_control(own, others[own], model)
        data = SuiteData(self.suite, model, loaded, self.run, self.quick, self.seed)
        about = {"sae": name, "fingerprint": mark}
        said = [*other_host_warnings(trained, loaded), *warnings]
        return run_card(data, folder, about, self.drawing.gallery, said, others, called)

    def all_in(self, root: Path, out: Path) -> Path:
        """The cards of all SAEs in a folder, and their table; returns its page.

        What the host gives is kept until all are done, where no cache is named.
        """
        settings = settings_of(
            self.suite, quick=self.quick, gallery=self.drawing.gallery, seed=self.seed, **vars(self.foreign)
        )
        cards = Cards(root, out, settings, self._unless_done, self.say)
        if self.run.cache:
            return cards.run()
        kept = out / CACHE
        self.run = replace(self.run, cache=str(kept))
        try:
            return cards.run()
        finally:
            if cards.through:
                shutil.rmtree(kept, ignore_errors=True)

    def _unless_done(self, path: str, folder: Path) -> None:
        sae, library = read_sae(path)
        if (folder / RESULTS).exists() and read_card(folder).get("fingerprint") == sae_fingerprint(sae):
            self.say("  done before")
            return
        self._card(sae, library, path, folder)
