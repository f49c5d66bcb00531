"""What ``mmsae bench filter`` fine-tunes on: all data, and halves by every score."""

PAPER = {"result": 1.10, "data": 0.50}
SAE_V = ("cos_code", "cos_algorithm", "cos_mean", "l0", "l1", "co_l0", "co_l1")
PAIR = ("pair_code", "pair_weighted", "clip", "clip_centred")
BLIND = "cos_code/question"
LIKELIHOOD = "answer_likelihood"
CONTROLS = ("all", "random", "oracle")
ARMS = (*CONTROLS, LIKELIHOOD, *PAIR, *SAE_V, BLIND)
QUICK = ("all", "random", "cos_code", "oracle")
