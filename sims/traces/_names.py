"""The usual names of arrivals and lengths, in CSV headers and JSON objects.

Of several that fit, a JSON object's earliest listed is read; a CSV header may have one.
"""

ARRIVAL_S = ("arrival_s", "timestamp_s", "arrival_time", "arrived_at", "arrival")
"""Arrival in seconds, or as a date."""
ARRIVAL_MS = ("arrival_ms", "timestamp_ms")
"""Arrival in milliseconds."""
TIME = ("timestamp", "time", "start_time", "datetime", "date")
"""Arrival in seconds, or as a date, where nothing is called an arrival."""
PROMPT = (
    "prompt_tokens",
    "input_tokens",
    "input_len",
    "input_length",
    "prompt_len",
    "prompt_length",
    "num_prefill_tokens",
    "num_prompt_tokens",
    "num_input_tokens",
    "prefill_tokens",
    "input",
    "prompt",
)
"""Prompt length in tokens."""
OUTPUT = (
    "output_tokens",
    "output_len",
    "output_length",
    "num_decode_tokens",
    "num_output_tokens",
    "num_completion_tokens",
    "num_generated_tokens",
    "decode_tokens",
    "generated_tokens",
    "completion_tokens",
    "output",
)
"""Output length in tokens."""
MOONCAKE = ("timestamp", "input_length", "output_length")
"""Mooncake's keys; its timestamp is in milliseconds."""
