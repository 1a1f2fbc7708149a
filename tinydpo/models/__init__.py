"""Weights and tokenizers, from a folder or the Hub.

In: a name and a revision. Out: a tokenizer, or a causal language model in eval mode, an adapter put into its base.
First to open: `loading` (what policy and reference are), then `ending` (what ends an answer), `pretrained`,
`adapters`, `hub`.
Change this and you change what is trusted (safetensors only, no code of a model's own) and how long a failing Hub is
waited for.
"""
