"""Bad and damaged files of every trace format: what is wrong is named with its place."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_samples import AIPERF, GUIDELLM, SAMPLES, SHAREGPT, VLLM, Write, aiperf, guidellm, lines

from pagedkv.errors import TraceFormatError
from pagedkv.sims.traces import read_lengths, read_trace


def changed(value: object, *keys: str | int, document: Any) -> str:
    """Return `document` as JSON with `value` under `keys`."""
    copy = json.loads(json.dumps(document))
    place = copy
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return json.dumps(copy)


REPORT = guidellm(*GUIDELLM)
FIRST = ("benchmarks", 0, "requests", "successful", 1)
TOKENS = r" is not a whole number of tokens"
BAD: dict[str, tuple[str, str]] = {
    "burstgpt negative": (SAMPLES["burstgpt-csv"].replace("396", "-396"), r"line 3, column Request tokens: '-396'" + TOKENS),
    "burstgpt time": (
        SAMPLES["burstgpt-csv"].replace("19,", "noon,"),
        "line 4, column Timestamp: 'noon' is not a finite number of sec",
    ),
    "burstgpt header": ("Timestamp,Request tokens,Response tokens,Model\n", "no requests in it"),
    "aiperf negative": (lines(AIPERF[0], aiperf(1, 5, -3, 4)), r"line 2, column metrics.input_sequence_length.value: -3" + TOKENS),
    "aiperf no metrics": (
        lines(AIPERF[0], {**AIPERF[1], "metrics": None}),
        r"line 2, column metrics.input_sequence_length.value: None",
    ),
    "aiperf list": (lines(AIPERF[0], [1]), r"line 2: no key metadata in '\[1\]'"),
    "aiperf time": (
        lines(aiperf(0, True, 3, 4)),
        "line 1, column metadata.request_start_ns: True is not a finite number of nanosec",
    ),
    "generic key": (lines({"prompt_tokens": 1, "output_tokens": 2}, {"prompt_tokens": 1}), "line 2: no key output_tokens in"),
    "generic type": (
        lines({"arrival": 1, "prompt_tokens": "text", "output_tokens": 2}),
        r"line 1, column prompt_tokens: 'text'" + TOKENS,
    ),
    "generic float": (lines({"arrival": 1, "prompt": 1, "output": 2.0}), r"line 1, column output: 2.0" + TOKENS),
    "generic value": ('{"prompt_tokens": 1, "output_tokens": 2}\n3\n', "line 2: '3' is no JSON object"),
    "generic cut": ('{"prompt_tokens": 1, "output_tokens": 2}\n{"prompt', "line 2: not JSON"),
    "vllm negative": (changed(-1, "output_lens", 1, document=VLLM), r"line 1, output_lens\[1\]: -1" + TOKENS),
    "vllm type": (
        changed("soon", "start_times", 2, document=VLLM),
        r"line 1, start_times\[2\]: 'soon' is not a finite number of sec",
    ),
    "vllm shorter": (changed([1, 2], "output_lens", document=VLLM), "output_lens has 2 entries where input_lens has 3"),
    "vllm no list": (changed(7, "output_lens", document=VLLM), "output_lens: 7 is not a list"),
    "vllm key": (json.dumps({k: v for k, v in VLLM.items() if k != "output_lens"}), "no output_lens"),
    "vllm summary": (
        json.dumps({k: v for k, v in VLLM.items() if not isinstance(v, list)}),
        "no input_lens and output_lens in .*writes them with --save-detailed",
    ),
    "vllm empty": (json.dumps(VLLM | {"input_lens": [], "output_lens": [], "start_times": [], "errors": []}), "no requests in it"),
    "vllm cut": (SAMPLES["vllm-bench-json"][:-30], r"line 1: not JSON"),
    "guidellm negative": (
        changed(-5, *FIRST, "output_metrics", "total_tokens", document=REPORT),
        r"benchmarks\[0\].requests.successful\[1\], output tokens: -5" + TOKENS,
    ),
    "guidellm time": (
        changed("soon", *FIRST, "info", "timings", "request_start", document=REPORT),
        r"benchmarks\[0\].requests.successful\[1\], start time: 'soon' is not a finite number of seconds",
    ),
    "guidellm no object": (changed(3, *FIRST, document=REPORT), r"requests.successful\[1\], prompt tokens: None" + TOKENS),
    "guidellm no requests": (changed({}, "benchmarks", 0, document=REPORT), r"no benchmarks\[0\].requests.successful"),
    "guidellm no list": (changed(3, "benchmarks", document=REPORT), "benchmarks: 3 is not a list"),
    "guidellm empty": (json.dumps(guidellm()), "no requests in it"),
    "guidellm cut": (SAMPLES["guidellm-json"][:-9], "not JSON"),
    "guidellm twice": (SAMPLES["guidellm-json"] + "\n{}", r"one JSON document is needed, and \{\} begins another"),
    "sharegpt type": (
        changed(5, 1, "conversations", 0, "value", document=SHAREGPT),
        r"\[1\].conversations\[0\].value: 5 is not a text",
    ),
    "sharegpt key": (
        changed("hi", 1, "conversations", 1, document=SHAREGPT),
        r"\[1\].conversations\[1\].value: None is not a text",
    ),
    "sharegpt entry": (changed(None, 1, document=SHAREGPT), r"no \[1\].conversations"),
    "sharegpt no list": (changed("hi", 2, "conversations", document=SHAREGPT), r"\[2\].conversations: 'hi' is not a list"),
    "sharegpt nests": ('[{"conversations": ' + "[" * 100_000, "line 1: not JSON"),
    "a list of others": ('[{"input_length": 3, "output_length": 4}]', "unknown format"),
    "an object of others": ('{"prompts": 3}', r"unknown format(?s:.*)guidellm-json: (?s:.*)sharegpt-json: "),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_entry_is_named_with_its_place(case: str, write: Write) -> None:
    text, message = BAD[case]
    path = write(text)
    read = read_lengths if case.startswith("sharegpt") else read_trace
    with pytest.raises(TraceFormatError, match=f"trace.*{message}") as error:
        read(path)
    assert len(str(error.value)) < 1700


@given(
    name=st.sampled_from(sorted(SAMPLES)),
    edits=st.lists(
        st.tuples(
            st.floats(0, 1, exclude_max=True),
            st.integers(0, 3),
            st.sampled_from([b"", b"\n", b",", b'"', b"-", b"0", b"null", b"{", b"}", b"[", b"]", b"\\", b"\xff", b"9" * 20]),
        ),
        min_size=1,
        max_size=6,
    ),
    forced=st.booleans(),
)
def test_damaged_files_are_read_or_refused(
    name: str, edits: list[tuple[float, int, bytes]], forced: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = SAMPLES[name].encode()
    for where, removed, inserted in edits:
        start = int(where * len(content))
        content = content[:start] + inserted + content[start + removed :]
    path = tmp_path_factory.getbasetemp() / "damaged-format"
    path.write_bytes(content)
    try:
        prompt, output = read_lengths(path, format=name if forced else None)
    except TraceFormatError:
        return
    assert len(prompt) == len(output) >= 1
    assert min(prompt.min(), output.min()) >= 1
