"""What the bytes on disk are: weight formats, checkpoints, packs, and the way between them."""
