"""Measures of SAEs on codes and plain tensors; streaming ones are torchmetrics, exact over batches and ranks."""

from mmsae.metrics.concepts.concepts import concept_report
from mmsae.metrics.concepts.evidence import TopN, TopTable, text_keys, top_evidence
from mmsae.metrics.concepts.similarity import concept_similarity, intra_inter
from mmsae.metrics.evidence_io import LatentEvidence, load_evidence, save_evidence
from mmsae.metrics.host.chair import ChairReport, Objects, chair
from mmsae.metrics.host.hallucination import PopeReport, parse_answer, pope_report, score_answers
from mmsae.metrics.host.ood import OODMetrics, OODScores, ood_metrics
from mmsae.metrics.pairs.correlation import CrossCorrelation, PairScorer, cross_correlation
from mmsae.metrics.pairs.cross_modal import CrossModal, CrossModalWeights, pair_weight
from mmsae.metrics.pairs.item_codes import ItemCodes, content_rows, entries, max_pool
from mmsae.metrics.pairs.modality import CoActivation, Lift, modality_class, modality_index
from mmsae.metrics.pairs.pairs import derangement, modality_score, pair_report, warnings_of
from mmsae.metrics.pairs.retrieval import both_ways, groups_of, recall_at
from mmsae.metrics.pairs.sample_scores import SCORES, sample_scores
from mmsae.metrics.reconstruction import FVU, Reconstruction, fvu
from mmsae.metrics.sparsity import Sparsity, density_histogram, sparsity
from mmsae.metrics.statistics import auroc

__all__ = [
    "FVU",
    "SCORES",
    "ChairReport",
    "CoActivation",
    "CrossCorrelation",
    "CrossModal",
    "CrossModalWeights",
    "ItemCodes",
    "LatentEvidence",
    "Lift",
    "OODMetrics",
    "OODScores",
    "Objects",
    "PairScorer",
    "PopeReport",
    "Reconstruction",
    "Sparsity",
    "TopN",
    "TopTable",
    "auroc",
    "both_ways",
    "chair",
    "concept_report",
    "concept_similarity",
    "content_rows",
    "cross_correlation",
    "density_histogram",
    "derangement",
    "entries",
    "fvu",
    "groups_of",
    "intra_inter",
    "load_evidence",
    "max_pool",
    "modality_class",
    "modality_index",
    "modality_score",
    "ood_metrics",
    "pair_report",
    "pair_weight",
    "parse_answer",
    "pope_report",
    "recall_at",
    "sample_scores",
    "save_evidence",
    "score_answers",
    "sparsity",
    "text_keys",
    "top_evidence",
    "warnings_of",
]
