"""The method's arithmetic: each prompt computed once, nothing padded, under TRL's own trainers.

In: fitted pairs and a causal LM. Out: TRL's `DPOTrainer`, `SFTTrainer` and `RewardTrainer` on packed rows, and
log-probs for evaluation. First to open: `packing` (the rows), then `shared_prefix` (how TRL comes to compute them) and
`check` (for which models that is right).
Change this and you change every number: the tests hold each loss, metric and gradient to TRL's.
"""
