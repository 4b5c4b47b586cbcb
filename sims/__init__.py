"""The simulator: users, a serving engine on a virtual clock, and the report."""

if __name__ == "sims":
    raise ImportError("import this package as 'pagedkv.sims': a top-level 'sims' would shadow other people's packages")
