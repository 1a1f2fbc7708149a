"""What a policy has learned against its reference: held-out pairs, sampled answers, rewards, a judge, a frontier.

In: two models and held-out pairs. Out: figures with intervals, as JSON and as text. First to open: `metrics` (the
arithmetic, no model), then `table` (what each figure means, in words) and `sampling`.
Change this and you change what is claimed of a policy; training does not know of it.
"""
