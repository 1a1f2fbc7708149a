"""What a policy has learned against its reference: held-out pairs, sampled answers, rewards, a judge, a frontier.

In: two models and held-out pairs. Out: figures with intervals, as JSON and as text. Start with scripts/evaluate.py,
then `metrics` (the arithmetic, without a model) and `table` (what each figure means, in words).
"""
