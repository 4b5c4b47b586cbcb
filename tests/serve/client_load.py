"""Clients by the hundred, over bare sockets, each a connection per answer: for tests, and for any server of `pagedkv serve`.

python tests/serve/client_load.py http://127.0.0.1:8000 --seconds 120 --clients 200
"""

import argparse
import asyncio
import json
import random
import re
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def resident_bytes(process: int | str = "self") -> int:
    """Resident memory of a process. Source: proc(5), statm counts pages."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()


async def stream(
    url: str,
    rng: random.Random,
    leave_after: int | None = None,
    *,
    output: tuple[int, int] = (100, 200),
    n: int = 1,
    gaps_s: list[float] | None = None,
) -> int:
    """Read a request's answers over a connection of its own, or so many tokens of them, and return their tokens.

    Fails unless all that was asked for came. `gaps_s` receives the time to the first token, and those between reads.
    """
    asked = rng.randrange(*output)
    prompt = [rng.randrange(4)] * rng.randrange(20, 200)
    body = {"prompt": prompt, "max_tokens": asked, "n": n, "stream": True, "stream_options": {"include_usage": True}}
    body["ignore_eos"] = True  # or a model that really runs may end before
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    content = json.dumps(body)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    writer.write((head + content).encode())
    seen, said, before_s = 0, b"", time.perf_counter()
    while part := await reader.read(1 << 16):
        said += part
        new = part.count(b"data: {")
        seen += new
        if new and gaps_s is not None:
            now_s = time.perf_counter()
            gaps_s.append(now_s - before_s)
            before_s = now_s
        if leave_after is not None and seen >= leave_after:
            writer.transport.abort()
            return seen
    writer.close()
    assert said.startswith(b"HTTP/1.1 200"), said[:200]
    assert said.count(b"data: [DONE]") == 1, "no end"
    assert said.count(b'"finish_reason":"length"') == n, "not all answers came to their end"
    (usage,) = re.findall(rb'"completion_tokens":(\d+)', said)
    assert int(usage) == said.count(b'"text":"') + _joined(said) == asked * n, "tokens are lost"
    (counted,) = re.findall(rb'"prompt_tokens":(\d+)', said)
    assert int(counted) == len(prompt)
    return asked * n


def _joined(said: bytes) -> int:
    """Tokens that came in an event with others: drafts that were accepted. As ids, a text has them side by side."""
    texts = re.findall(rb'"text":"([0-9 ]+)"', said)
    return sum(max(len(text.split()) - 1, 0) for text in texts)


@dataclass
class Load:
    """What clients saw."""

    seconds: float
    answers: int = 0
    tokens: int = 0
    num_left: int = 0
    """Clients that went away in mid-stream."""
    first_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """Return it in figures."""

        def shares(times_s: list[float]) -> dict[str, float]:
            ordered = sorted(times_s)
            return {f"p{q}_ms": round(ordered[min(len(ordered) * q // 100, len(ordered) - 1)] * 1e3, 1) for q in (50, 99)}

        return {
            "seconds": round(self.seconds, 1),
            "answers": self.answers,
            "tokens": self.tokens,
            "tokens_per_s": round(self.tokens / self.seconds, 1),
            "clients_that_left": self.num_left,
            "failures": self.failures,
            "time_to_first_token": shares(self.first_s) if self.first_s else {},
            "gaps": shares(self.gaps_s) if self.gaps_s else {},
        }


async def run_load(url: str, *, seconds: float, clients: int, most_answers: int, output: tuple[int, int]) -> Load:
    """Let `clients` ask one request after the other, of 1 to `most_answers` answers, for so long; every tenth leaves early."""
    load, begin_s = Load(seconds), time.perf_counter()

    async def client(number: int) -> None:
        rng = random.Random(number)
        while time.perf_counter() - begin_s < seconds:
            n, gaps_s = rng.randint(1, most_answers), list[float]()
            leave_after = rng.randrange(1, 60) if number % 10 == 0 else None
            try:
                tokens = await stream(url, rng, leave_after, output=output, n=n, gaps_s=gaps_s)
            except (AssertionError, OSError, ValueError) as error:
                load.failures.append(repr(error)[:200])
                await asyncio.sleep(1.0)
                continue
            load.tokens += tokens
            load.first_s += gaps_s[:1]
            load.gaps_s += gaps_s[1:]
            if leave_after is None:
                load.answers += n
            else:
                load.num_left += 1

    await asyncio.gather(*map(client, range(clients)))
    load.seconds = time.perf_counter() - begin_s
    return load


async def scraped(url: str) -> dict[str, float]:
    """Return some gauges of /metrics by name."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET /metrics HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    text = (await reader.read(-1)).decode()
    writer.close()
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total")
    return {name: float(re.findall(rf"^vllm:{name}\{{.*\}} (\S+)$", text, re.MULTILINE)[0]) for name in names}


async def _main(given: argparse.Namespace) -> dict[str, Any]:
    before = resident_bytes(given.pid) if given.pid else 0
    output = (given.min_tokens, given.max_tokens + 1)
    load = await run_load(given.url, seconds=given.seconds, clients=given.clients, most_answers=given.answers, output=output)
    await asyncio.sleep(2.0)  # whoever left is taken out at the end of the step in flight
    more = {"server_grew_mib": round((resident_bytes(given.pid) - before) / 2**20, 1)} if given.pid else {}
    return {**load.document(), "then": await scraped(given.url), **more}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the load and print what came out; 1 if something failed, or stayed behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--answers", type=int, default=1, help="each request asks for 1 up to so many")
    parser.add_argument("--min-tokens", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=199)
    parser.add_argument("--pid", type=int, help="of the server, whose memory is looked at")
    document = asyncio.run(_main(parser.parse_args(arguments)))
    sys.stdout.write(json.dumps(document, indent=1) + "\n")
    stayed = [document["then"][name] for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")]
    return int(bool(document["failures"]) or any(stayed))


if __name__ == "__main__":
    sys.exit(main())
