"""Experts across VRAM, RAM and disk: which one lies where, and running those a step has chosen.

`store.ExpertStore` is what the model sees; `policy` decides and knows no tensors; `ram`, `disk` and
`vram` are the tiers. Import from the modules: `policy` and `meters` need no torch.
"""
