"""Sparse autoencoders in pure torch: normalise -> encode -> select -> dictionary."""

from mmsae.lazy import lazy
from mmsae.moved import earlier

__all__, _get = lazy(
    __name__,
    {
        "dictionary": "Dictionary",
        "encoder": "AffineEncoder DistanceEncoder PerModalityEncoder SAEEncoder",
        "latents": "append_concepts match_latents matching prune_latents select_latents",
        "losses": "AuxK CodeCosine LossContext LossTerm Reconstruction total",
        "normaliser": "Normaliser",
        "part": "Part",
        "precodes": "DensePreCodes PreCodes PursuitCodes",
        "random_control": "random_control",
        "sae": "SAE fit_rows",
        "selector": "Pursued Ranked ReLU SelectContext Selector TopK",
        "transform": "calibrate_scale fold_decoder_norm to_jumprelu truncate with_pursuit",
        "usage": "UsageTracker",
        "variants.afa": "EnergyTopK NormMatch",
        "variants.archetypal": "ArchetypalDictionary",
        "variants.batch_topk": "BatchTopK",
        "variants.gated": "GateAux GatedEncoder",
        "variants.energy_match": "EnergyMatch",
        "variants.feature_choice": "AuxZipf FeatureChoice",
        "variants.gba": "GroupBias ScaledDictionary",
        "variants.group_sparse": "GroupSparse PairMask",
        "variants.itda": "GrowingDictionary",
        "variants.gradient": "GradientTopK",
        "variants.group_max": "GroupMax",
        "variants.jumprelu": "JumpReLU L0 PreActRevive TanhL0",
        "variants.relu_l1": "L1",
        "variants.matryoshka": "NestedReconstruction NestedTopK",
        "variants.matching_pursuit": "PursuitEncoder",
        "variants.pursuit_at_l0": "PursuitAtL0",
        "variants.vsae": "GaussianEncoder KLGaussian",
        "variants.sparc": "CrossReconstruction JointTopK",
        "variants.usae": "UniversalReconstruction",
        "variants.csr": "CodeInfoNCE",
        "variants.mono_loss": "MonoScore",
        "variants.cb_sae": "ConceptTopK",
        "variants.splice": "FrozenDictionary LassoEncoder",
        "words": "splice word_atoms",
    },
)

__getattr__ = earlier(__name__, _get)
