"""Weights and tokenizers, from a folder or the Hub.

In: a name and a revision. Out: a tokenizer, or a causal language model in eval mode, an adapter merged into its base.
Open first: `loading`, then `stop_tokens` (what ends an answer), `precision` and `hub`.
Change this and you change what is trusted: safetensors only, no code that a model brings along.
"""
