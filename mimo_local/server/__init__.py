"""An OpenAI-compatible server: requests in, translated to the engine; events out, translated back.

`run.serve` is its one entry, called by `mimo serve`. Importing the package loads nothing.
"""
