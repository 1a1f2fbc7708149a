"""What a recipe asks for, and what the machine makes of it.

In: a YAML recipe and flags. Out: checked dataclasses, and one line on what runs: processes, device, precision, batch.
Open first: `arguments` (the flags beyond TRL's), then `recipe` (from YAML and the command line to dataclasses),
`launch` (device, precision, batch) and `flags` (what is refused because it would mislead).
"""
