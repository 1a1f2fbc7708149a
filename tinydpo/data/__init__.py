"""Preference rows in any of the usual forms, to pairs of tokens that fit the budget.

In: a dataset's name. Out: `pairs.FittedSplit`s, in Arrow on disk. One way through: `splits` (files to parsed rows,
which `rows` reads) → `text` (rows to texts) → `fitting` (texts to tokens); `pairs` does it all in one call.
Open `fitting` first: `fit_pair` is the rule about 128 tokens.
"""

CACHE_VERSION = 5  # part of every cache key here; raise it when what is cached changes
