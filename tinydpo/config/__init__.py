"""From a YAML recipe and flags to checked dataclasses, and one line on what runs.

Start with `arguments` (the flags beyond TRL's), then `recipe` (YAML and command line), `launch` (device, precision,
batch) and `flags` (what is refused because it would mislead).
"""
