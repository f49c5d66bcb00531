"""Measures of SAEs on codes and plain tensors; streaming ones are torchmetrics, exact over batches and ranks."""

from mmsae.lazy import lazy
from mmsae.moved import earlier

__all__, _get = lazy(
    __name__,
    {
        "concepts.concepts": "concept_report",
        "concepts.dictionaries": "Similarity dictionary_similarity",
        "concepts.evidence": "TopN TopTable text_keys top_evidence",
        "concepts.similarity": "concept_similarity intra_inter",
        "error_decomposition": "ErrorDecomposition ErrorReport error_from_sites predictable_share",
        "host.chair": "ChairReport Objects chair",
        "host.hallucination": "PopeReport parse_answer pope_report score_answers",
        "host.ood": "OODMetrics OODScores ood_metrics",
        "norms": "CodeNorms code_norms epsilon_lbo",
        "pairs.correlation": "CrossCorrelation PairScorer cross_correlation",
        "pairs.cross_modal": "CrossModal CrossModalWeights pair_weight",
        "pairs.item_codes": "ItemCodes content_rows entries max_pool",
        "pairs.modality": "CoActivation Lift modality_class modality_index",
        "pairs.pairs": "derangement modality_score pair_report warnings_of",
        "pairs.retrieval": "both_ways groups_of recall_at",
        "pairs.sample_scores": "SCORES sample_scores",
        "reconstruction": "FVU ReconstructionMetrics fvu",
        "sparsity": "Sparsity",
        "statistics": "auroc bootstrap_mean interval spearman wilson",
    },
)

__getattr__ = earlier(__name__, _get)
