"""Weights and tokenizers, from a folder or the Hub. Only safetensors are read, and no model's own code is run unasked.

Start with `loading`, then `stop_tokens` (what ends an answer), `precision` and `hub`.
"""
