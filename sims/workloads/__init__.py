"""Workloads that come along: one TOML file each, read by `pagedkv.sims.workload_file`."""
