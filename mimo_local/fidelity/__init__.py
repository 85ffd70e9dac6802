"""How far a pack is from its source: errors of its weights, and both models reading the same texts.

`run.measure` is what to call; `mimo measure` and `mimo quantize --measure` do.
"""
