"""Policy and reference side by side in the browser.

In: both models in memory. Out: a page on 127.0.0.1, and votes as pairs that `--dataset_name` reads. `side_by_side`
computes, `app` shows.
"""
