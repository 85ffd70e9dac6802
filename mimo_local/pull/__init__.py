"""From the hub to a pack: fetched and converted layer by layer, so that little disk is needed.

`remote` reads what a repository holds, `order` decides what comes when, `fetch` brings files
through `hub` into a `staging` folder, `run` converts them as they land. Called by the command line.
"""
