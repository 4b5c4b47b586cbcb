"""The usual names of arrivals and lengths, in CSV headers and JSON objects.

Of several that fit, a JSON object's earliest listed is read; a CSV header may have one.
"""

ARRIVAL_S = ("arrival_s", "timestamp_s", "arrival_time", "arrived_at", "arrival")
"""Arrival in seconds."""
ARRIVAL_MS = ("arrival_ms", "timestamp_ms")
"""Arrival in milliseconds."""
PROMPT = ("prompt_tokens", "input_tokens", "input_len", "input_length", "prompt_len", "num_prefill_tokens", "input", "prompt")
"""Prompt length in tokens."""
OUTPUT = ("output_tokens", "output_len", "output_length", "num_decode_tokens", "generated_tokens", "completion_tokens", "output")
"""Output length in tokens."""
