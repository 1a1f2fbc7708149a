"""Preference rows in any of the usual forms, to pairs of tokens that fit the budget.

In: a dataset's name. Out: `pairs.FittedSplit`s, in Arrow on disk. One way through: `sources` (records) → `records` (a
row) → `forms` (what was asked, what answered) → `dialogues` (texts) → `fitting` (tokens) → `pairs` (all of it in one
call).
First to open: `fitting`, whose `fit_pair` is the rule about 128 tokens.
Change this and every run sees other rows: caches are made again, and no figure from before can be compared.
"""

CACHE_VERSION = 1  # part of every cache key here; raise it when what is cached changes
