"""Policy and reference side by side in the browser.

In: both models in memory. Out: a page on 127.0.0.1, and votes as pairs that `--dataset_name` reads. First to open:
`side_by_side` (what is computed), then `page` (what is shown).
Nothing else imports this room: change it freely.
"""
