"""Modules that have moved: their old names are good for one release, with a warning that says the new one.

Recipes and scripts of users name modules, as ``class_path: mmsae.heads.callbacks.ZeroShotTest`` does. The first import
of such a name gives the module that holds its classes today.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from mmsae.errors import OldName

UNTIL = "0.4"
"""The version in which the old names are gone."""

MODULES = dict(
    pair.split("=")
    for pair in """
    backbones=hosts backbones.base=hosts.base backbones.diffusion=hosts.diffusion.host
    backbones.diffusion_base=hosts.diffusion.host backbones.diffusion_call=hosts.diffusion.call
    backbones.diffusion_load=hosts.diffusion.load backbones.diffusion_probe=hosts.diffusion.sites
    backbones.diffusion_prompts=hosts.diffusion.prompts backbones.diffusion_run=hosts.diffusion.call_state
    backbones.diffusion_sites=hosts.diffusion.sites backbones.diffusion_stream=hosts.diffusion.stream
    backbones.diffusion_tap=hosts.diffusion.edits backbones.hooks=hosts.hooks backbones.load=hosts.load
    backbones.loaded=hosts.loaded backbones.lvlm=hosts.lvlm.host backbones.lvlm_cache=hosts.lvlm.cache
    backbones.lvlm_grid=hosts.lvlm.image_grid backbones.lvlm_kinds=hosts.lvlm.tokens backbones.lvlm_load=hosts.lvlm.load
    backbones.lvlm_prompt=hosts.lvlm.prompt backbones.lvlm_reading=hosts.lvlm.host
    backbones.lvlm_tower=hosts.lvlm.open_clip_tower backbones.lvlm_vision=hosts.lvlm.host backbones.names=hosts.names
    backbones.open_clip=hosts.encoders.open_clip backbones.patch_autoencoder=hosts.diffusion.patch_autoencoder
    backbones.reading=hosts.capture backbones.sites=hosts.sites backbones.timm=hosts.encoders.timm
    backbones.tokenizer=hosts.tokenizer backbones.tokens=hosts.tokens backbones.vision=hosts.encoders.timm
    backbones.where=hosts.sites bench_report=bench.filter.report bench_scores=bench.filter.scores cache=activations
    cache.buffer=activations.mixing_buffer cache.command=activations.command cache.extract=activations.extract
    cache.files=activations.spool cache.generation=activations.generated cache.loader=activations.loader
    cache.memory=activations.memory cache.order=activations.loader cache.part=activations.writer
    cache.plan=activations.extract cache.spec=activations.spec cache.store=activations.store
    cache.stream=activations.stream cache.synthetic=activations.synthetic cache.uids=activations.uids
    cache.writer=activations.writer demo_card=demo.ood demo_diffusion=demo.diffusion demo_drawing=demo.report.drawing
    demo_filter=demo.filter demo_llava=demo.llava demo_ood=demo.ood demo_process=jobs.processes
    demo_report=demo.report.page demo_stages=demo.stages demo_uses=demo.report.uses heads=evaluation
    heads.callbacks=evaluation.callbacks.classify heads.callbacks_features=evaluation.callbacks.features
    heads.card_classes=evaluation.card.classes heads.card_codes=evaluation.card.codes
    heads.card_detect=evaluation.card.detection heads.card_split=evaluation.card.splitting
    heads.card_top=evaluation.card.top_images heads.classifier=evaluation.ood.classifiers
    heads.detectors=evaluation.ood.detectors heads.detectors_sae=evaluation.ood.detectors_sae
    heads.features=evaluation.features heads.generalisation=evaluation.generalisation heads.images=evaluation.images
    heads.labels=evaluation.labels heads.ontology=evaluation.ontology.measures heads.ood=evaluation.ood.head
    heads.ood_figures=evaluation.ood.report heads.ood_fit=evaluation.ood.fit heads.ood_run=evaluation.ood.command
    heads.ood_sets=evaluation.ood.sets heads.opening=load heads.pooling=evaluation.pooling heads.rows=evaluation.rows
    heads.shifts=evaluation.shifts heads.spaces=evaluation.spaces heads.suite=evaluation.suite
    heads.suite_data=evaluation.suite_data heads.tree=evaluation.ontology.tree heads.zeroshot=evaluation.zeroshot.head
    heads.zeroshot_run=evaluation.zeroshot.command interop.convert=interop.vlsae
    interpret.card=evaluation.card.page interpret.evaluate=evaluation.card.command interpret.figures=report.figures
    interpret.filter_report=filtering.command interpret.gallery=report.gallery interpret.jobs=filtering.lightning
    interpret.notebook=report.notebook interpret.report=report.page interpret.steer_report=steering.report
    interpret.template=report.page interpret.token_gallery=lvlm.weights.gallery
    interpret.token_view=lvlm.weights.token_view interpret.top_gallery=evaluation.card.gallery
    metrics.absorption=metrics.concepts.absorption metrics.bridge=metrics.pairs.bridge
    metrics.class_means=metrics.concepts.class_means metrics.correlation=metrics.pairs.correlation
    metrics.cross_modal=metrics.pairs.cross_modal metrics.evidence=metrics.concepts.evidence
    metrics.hallucination=metrics.host.hallucination metrics.hallucination_chair=metrics.host.chair
    metrics.intervals=metrics.statistics metrics.item_codes=metrics.pairs.item_codes
    metrics.modality=metrics.pairs.modality metrics.monosemanticity=metrics.concepts.monosemanticity
    metrics.ood=metrics.host.ood metrics.probing=metrics.concepts.probing metrics.ranking=metrics.statistics
    metrics.recovered=metrics.host.recovered metrics.retrieval=metrics.pairs.retrieval
    metrics.sample_scores=metrics.pairs.sample_scores metrics.similarity=metrics.concepts.similarity
    metrics.uniqueness=metrics.concepts.uniqueness sae.control=sae.random_control sae.io=sae.folder
    shards.files=shards.writer shards.units=jobs.units steering.attach=steering.edits.attach
    steering.attributes=steering.methods.attributes steering.bootstrap=metrics.statistics
    steering.codes=steering.edits.codes steering.concept_stats=steering.methods.unlearn
    steering.concept_vector=steering.methods.concept_vector steering.controls=steering.measure.controls
    steering.donor=steering.edits.rows steering.edit=steering.edits.edit steering.gate=steering.edits.gate
    steering.intervention=steering.edits.intervention steering.kl=steering.methods.kl_strength
    steering.log=steering.edits.log steering.ops=steering.edits.edit steering.plots=steering.measure.plots
    steering.replace=steering.methods.detect_and_replace steering.run=steering.edits.intervention
    steering.scorers=steering.measure.scorers steering.select=steering.methods.choose_features
    steering.sweep=steering.measure.sweep steering.text_steer=steering.methods.text
    steering.unet=steering.methods.denoiser_block steering.units=steering.edits.units
    steering.unlearn=steering.methods.unlearn steering.vs2=steering.methods.zero_shot_vs2
    tasks.chair=lvlm.hallucination.chair tasks.concept_decoding=lvlm.decoding.concept
    tasks.concept_decoding_align=lvlm.decoding.align tasks.concept_decoding_methods=lvlm.decoding.directions
    tasks.filter=filtering.job tasks.filter_calibrate=filtering.calibrate tasks.filter_fit=filtering.job
    tasks.filter_folder=jobs.folder tasks.filter_lit=filtering.lightning tasks.filter_merge=filtering.choose
    tasks.filter_passes=filtering.passes tasks.filter_plan=filtering.job tasks.filter_run=filtering.passes
    tasks.filter_select=filtering.choose tasks.filter_truth=filtering.truth tasks.filter_weights=filtering.pair_weights
    tasks.lit_units=jobs.lightning tasks.mismatch=filtering.truth tasks.pair_scorer=filtering.scorers.clip
    tasks.patch_filter=lvlm.patches.patch_filter tasks.patches=lvlm.patches.command
    tasks.pope=lvlm.hallucination.questions tasks.pope_answers=lvlm.hallucination.answers
    tasks.pope_report=lvlm.hallucination.report tasks.pope_run=lvlm.hallucination.pope
    tasks.sae_v=filtering.scorers.lvlm tasks.sae_v_recovered=lvlm.recovered tasks.selection=filtering.selection
    tasks.selection_exchange=filtering.selection_exchange tasks.weights=lvlm.weights.command
    tasks.weights_file=lvlm.weights.file tasks.weights_job=lvlm.weights.job tasks.zero_shot=evaluation.zeroshot.scores
    threads=options tiny_hosts=demo.tiny_hosts training.cli_jobs=training.cli world.bench_filter=bench.filter.world
    world.captions=world.generator.captions world.clip=world.models.command world.contrastive=world.models.contrastive
    world.data=world.generator.data world.diffusion=world.models.command
    world.diffusion_build=world.models.diffusion.model world.diffusion_edit=world.models.diffusion.evaluate
    world.diffusion_evaluate=world.models.diffusion.evaluate world.diffusion_train=world.models.diffusion.train
    world.evaluate=world.measure.host world.llava=world.models.llava.model world.llava_build=world.models.llava.model
    world.llava_data=world.models.llava.questions world.llava_train=world.models.llava.train
    world.muon=world.models.loop world.ood=world.generator.ood world.pairs=world.models.pairs
    world.probe=world.measure.probe world.render=world.generator.render world.scene=world.generator.scene
    world.score=world.measure.score world.scorers=world.measure.scorers world.shards=world.generator.shards
    world.tokenizer=world.models.tokenizer tasks=
    """.split()
)
"""Old module: new module, both without ``mmsae.``; an empty name stands for a package that was divided."""

NAMES = {
    "backbones": {
        "hosts": "Backbone=Host load_backbone=load_host DiffusionBackbone=DiffusionHost LVLMBackbone=LVLMHost"
        " OpenCLIPBackbone=OpenCLIPHost TimmBackbone=TimmHost"
    },
    "backbones.base": {"hosts.base": "Backbone=Host"},
    "backbones.diffusion": {"hosts.diffusion.host": "DiffusionBackbone=DiffusionHost"},
    "backbones.load": {"hosts.load": "load_backbone=load_host"},
    "backbones.lvlm": {"hosts.lvlm.host": "LVLMBackbone=LVLMHost"},
    "backbones.open_clip": {"hosts.encoders.open_clip": "OpenCLIPBackbone=OpenCLIPHost"},
    "backbones.timm": {"hosts.encoders.timm": "TimmBackbone=TimmHost"},
    "heads.images": {"evaluation.images": "Asked=HostPass Seen=ImageRows"},
    "heads.ood": {"evaluation.ood.head": "Scored=DetectorScores"},
    "heads.ood_fit": {"evaluation.ood.fit": "Setup=FitImages"},
    "heads.ood_sets": {"evaluation.ood.sets": "Sets=OODFeatures Sources=OODShards"},
    "heads.pooling": {"metrics.components": "Moments"},
    "heads.rows": {"metrics.statistics": "wilson", "report.tables": "text_table"},
    "heads.spaces": {"metrics.components": "Components"},
    "heads.suite_data": {"evaluation.suite_data": "Data=SuiteData Found=HeadResult"},
    "heads.zeroshot": {"evaluation.zeroshot.head": "Split=LabelledScores ZeroShot=Accuracies"},
    "interop.convert": {"interop.command": "convert"},
    "interpret.evaluate": {"evaluation.card.card": "read_card run_suite=run_heads"},
    "interpret": {
        "report": "Card Gallery compare_codes concept_cards names_of shown_latents thumbnail Figure bar_chart figure"
        " line_chart zf_plot Fact Section Table render_report markdown_table text_table picture=thumbnail"
    },
    "interpret.gallery": {"report.gallery": "Picture=Thumbnail picture=thumbnail"},
    "interpret.jobs": {"lvlm.weights.lightning": "Weights"},
    "interpret.token_gallery": {"lvlm.weights.command": "weights_command=weights"},
    "metrics": {"metrics.reconstruction": "Reconstruction=ReconstructionMetrics"},
    "metrics.concepts": {
        "metrics.concepts.concepts": "Match concept_report f1_table match_concepts score_concepts thresholds"
    },
    "metrics.pairs": {
        "metrics.pairs.pairs": "ModalityScore alive_counts derangement modality_score pair_report top_concept"
        " top_concept_agreement warnings_of"
    },
    "sae": {"sae.encoder": "Encoder=SAEEncoder"},
    "sae.encoder": {"sae.encoder": "Encoder=SAEEncoder"},
    "shards": {"jobs.units": "Unit units"},
    "steering.measure": {
        "steering.measure.images": "Dose Locality Specificity Unlearning directional dose_response kid locality"
        " specificity unlearning",
        "metrics.statistics": "spearman",
    },
    "steering.attributes": {"steering.methods.attributes": "Pairs=SteeredPairs"},
    "steering.run": {
        "steering.edits.codes": "orthonormal sample_fvu",
        "steering.edits.intervention": "Steer=BoundIntervention",
        "steering.edits.rows": "only",
    },
    "steering.sweep": {"steering.measure.sweep": "Arm=Condition Way=Steering"},
    "steering.vs2": {"steering.methods.zero_shot_vs2": "ZeroShot=SteeredZeroShot"},
    "tasks.concept_decoding_methods": {"lvlm.hallucination.answers": "METHODS make_methods steered"},
    "tasks.filter": {"filtering.command": "filter_shards=filter_command"},
    "tasks.filter_fit": {"metrics.concepts.names": "read_names", "filtering.passes": "sample_tars"},
    "tasks.filter_lit": {"filtering.lightning": "LitFilter=Filter"},
    "tasks.pair_scorer": {
        "filtering.scorers.base": "Evidence=Reasons Only SCORES Scorer ScorerSpec check_score is_clip only",
    },
    "tasks.zero_shot": {"evaluation.zeroshot.head": "CONCEPTS zero_shot"},
    "world.diffusion_evaluate": {
        "world.models.diffusion.evaluate": "Prompts=ObjectPrompts score_pictures=score_images"
    },
    "world.pairs": {"world.models.pairs": "Pairs=LoadedPairs"},
    "tasks.sae_v": {"lvlm.tokens": "encode_tokens segment_sites"},
    "tasks.weights": {
        "lvlm.weights.job": "Subset cross_modal_weights",
        "lvlm.weights.lightning": "LitWeights=Weights",
    },
}
"""Old module: new module: names of the old one that are not where :data:`MODULES` leads; ``OLD=NEW`` where renamed."""


class _Moved(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        known = name.removeprefix("mmsae.")
        return ModuleSpec(name, self, is_package=True) if name != known and known in MODULES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        known = spec.name.removeprefix("mmsae.")
        new = MODULES[known]
        if not new:
            return None
        _tell(spec.name, f"mmsae.{new}")
        found = import_module(f"mmsae.{new}")
        if "." not in known:  # a stand-in: importing an old module below it must not set a name on the new package
            module, own = ModuleType(spec.name, found.__doc__), partial(getattr, found)
            vars(module)["__getattr__"] = earlier(spec.name, own) if known in NAMES else own
            return module
        if known in NAMES:
            vars(found)["__getattr__"] = earlier(spec.name, vars(found).get("__getattr__"))
        self.spec = found.__spec__
        return found

    def exec_module(self, module: ModuleType) -> None:
        known = module.__spec__.name.removeprefix("mmsae.")
        if MODULES[known] and "." in known:
            module.__spec__ = self.spec  # it was executed under its new name


def _tell(old: str, new: str) -> None:
    warnings.warn(f"{old} is {new} now; the old name goes in mmsae {UNTIL}", OldName, stacklevel=3)


def earlier(old: str, own: Callable[[str], Any] | None = None) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module with the names that :data:`NAMES` has for ``old``, and those of its ``own``."""
    home = {}
    for new, names in NAMES[old.removeprefix("mmsae.")].items():
        for name in names.split():
            before, _, after = name.partition("=")
            home[before] = new, after or before

    def find(name: str) -> Any:
        if name in home:
            module, called = home[name]
            _tell(f"{old}.{name}", f"mmsae.{module}.{called}")
            return getattr(import_module(f"mmsae.{module}"), called)
        if own is not None:
            return own(name)
        raise AttributeError(f"module {old!r} has no attribute {name!r}")

    return find


def install() -> None:
    """Let old names be imported."""
    if not any(isinstance(f, _Moved) for f in sys.meta_path):
        sys.meta_path.insert(0, _Moved())  # before the finder of files, which would load a moved file twice
