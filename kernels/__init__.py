"""Paged attention kernels that read the KV cache through block tables."""

if __name__ == "kernels":
    raise ImportError("import this package as 'pagedkv.kernels': a top-level 'kernels' would shadow other people's packages")
