"""What a result folder has, and how it is read."""

import json
from pathlib import Path
from typing import Any

FILES = {"config.toml", "summary.json", "requests.csv", "timeline.csv", "metrics.prom", "trace.json"}
CLOSED = "--users 9 --think-time 2s --duration 20s --warmup 5s --repeats 2 --goodput ttft:150 tpot:90 --watermark 0.01".split()
REPORT = "pagedkv.sims.report.html"


def one_line(results: Any) -> str:
    """Stand in for the report where nobody looks at it: drawing it takes several times what these short runs take."""
    return "<title>drawn elsewhere</title>\n"


def documents() -> list[dict[str, Any]]:
    """Return both summaries without the proposals, which are not results."""
    both = [json.loads(Path(folder, "summary.json").read_text("utf-8")) for folder in ("first", "second")]
    for document in both:
        for result in document["results"]:
            del result["verdict"]["next_command"]
    return both
