"""Traces: rows in CSV and JSON lines, their order and units, and what is refused of them."""

import csv
import gzip
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_samples import SAMPLES

from pagedkv.errors import ConfigError, TraceFormatError
from pagedkv.sims.traces import Trace, read_lengths, read_trace

EXAMPLES = {
    "azure-csv": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,396,109\n"
        "2023-11-16 18:16:00.6805900,879,55\n"
    ),
    **{name: SAMPLES[name] for name in ("generic-csv", "mooncake-jsonl")},
}


def azure(*rows: str) -> str:
    return "\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n"


def generic(*rows: str) -> str:
    return "\n".join(["arrival_s,prompt_tokens,output_tokens", *rows]) + "\n"


def assert_valid(trace: Trace) -> None:
    assert len(trace) >= 1
    arrays = (trace.arrival_s, trace.prompt_tokens, trace.output_tokens, trace.line_numbers)
    assert [len(a) for a in arrays] == [len(trace)] * 4
    assert [a.dtype for a in arrays] == [np.float64, np.int64, np.int64, np.int64]
    assert trace.arrival_s[0] == 0
    assert np.isfinite(trace.arrival_s).all()
    assert (np.diff(trace.arrival_s) >= 0).all()
    assert min(trace.prompt_tokens.min(), trace.output_tokens.min(), trace.line_numbers.min()) >= 1


VARIANTS: dict[str, Callable[[str], bytes]] = {
    "plain": str.encode,
    "gzip": lambda text: gzip.compress(text.encode()),
    "crlf": lambda text: text.replace("\n", "\r\n").encode(),
    "bom": lambda text: text.encode("utf-8-sig"),
    "no final newline": lambda text: text.rstrip().encode(),
    "blank lines at the end": lambda text: (text + "\n \r\n\n").encode(),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_file_reads_the_same_however_it_is_stored(name: str, variant: str, write: Callable[[str | bytes], Path]) -> None:
    trace = read_trace(write(VARIANTS[variant](EXAMPLES[name])))
    assert_valid(trace)
    assert trace.format == name
    assert trace.arrival_s == pytest.approx([0, 4.314579, 14])
    assert trace.prompt_tokens.tolist() == [374, 396, 879]
    assert trace.output_tokens.tolist() == [44, 109, 55]
    first_row = 1 if name == "mooncake-jsonl" else 2
    assert trace.line_numbers.tolist() == [first_row, first_row + 1, first_row + 2]


@pytest.mark.parametrize(
    "text",
    [
        "ARRIVAL_MS,Input_Len,OUTPUT_LEN\n0,1,1\n1500,7,8",
        "timestamp_ms , prompt_len, generated_tokens\n0,1,1\n1500, 7, 8",
        "id,num_decode_tokens,num_prefill_tokens,arrived_at\nx,1,1,0\ny,8,7,1.5",
        '"note","input_tokens","output_length","timestamp_s"\n"a, ""b""",1,1,0\n"c\nd",7,8,15e-1',
        "arrival_time,input_length,my_output,output_tokens\n0,1,9,1\n1.5,7,9,8",
        "timestamp,prompt_tokens,completion_tokens\n100,1,1\n101.5,7,8",
        "timestamp,prompt_tokens,completion_tokens\n2026-11-30T09:00:00Z,1,1\n2026-11-30T10:00:01.5+01:00,7,8",
        "time,num_prefill_tokens,num_decode_tokens\n2026-11-30 09:00:00,1,1\n2026-11-30 09:00:01.500,7,8",
        "arrival,input_tokens,output_tokens\n2026-11-30T09:00,1,1\n2026-11-30T09:00:01.5,7,8",
        "timestamp,arrival_s,num_prompt_tokens,num_output_tokens\n7,3,1,1\n7,4.5,7,8",
        "timestamp,input_length,output_length\n2026-11-30T09:00:00,1,1\n2026-11-30T09:00:01.5,7,8",
    ],
)
def test_generic_csv_takes_the_usual_names(text: str, write: Callable[[str], Path]) -> None:
    trace = read_trace(write(text))
    assert trace.format == "generic-csv"
    assert trace.arrival_s.tolist() == [0, 1.5]
    assert trace.prompt_tokens.tolist() == [1, 7]
    assert trace.output_tokens.tolist() == [1, 8]


@pytest.mark.parametrize(
    ("header", "same"),
    [
        ("arrival_s,prompt_tokens,prompt_tokens,output_tokens", "'prompt_tokens' and 'prompt_tokens'"),
        ("arrival_s,prompt_tokens,Input_Tokens,output_tokens", "'prompt_tokens' and 'Input_Tokens'"),
        ("arrival_s,arrival_ms,input,output", "'arrival_s' and 'arrival_ms'"),
        ("arrival,input,output,completion_tokens", "'output' and 'completion_tokens'"),
    ],
)
def test_two_columns_of_one_meaning_are_not_guessed_between(header: str, same: str, write: Callable[[str], Path]) -> None:
    with pytest.raises(TraceFormatError, match=f"line 1: the columns {same} say the same thing.*remove all but one"):
        read_trace(write(f"{header}\n0,5,6,7\n"))


def test_a_timestamp_whose_unit_nobody_can_know_is_no_arrival_but_lengths_are_read(write: Callable[[str], Path]) -> None:
    path = write("timestamp,input_length,output_length\n0,5,6\n3000,7,8\n")
    with pytest.raises(TraceFormatError, match="name the column timestamp_ms or timestamp_s"):
        read_trace(path)
    assert [array.tolist() for array in read_lengths(path)] == [[5, 7], [6, 8]]


def test_columns_that_are_not_read_and_texts_beside_lengths_may_be_there_twice(write: Callable[[str], Path]) -> None:
    trace = read_trace(write("note,arrival,prompt,prompt_tokens,output,output_tokens,note\na,0,Why?,5,Because.,7,b\n"))
    assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ([5], [7])


def test_offsets_of_dates_count(write: Callable[[str], Path]) -> None:
    trace = read_trace(write(azure("2024-05-10 02:00:01.5+02:00,1,1", "2024-05-10 00:00:00.009930+00:00,2,2")))
    assert trace.arrival_s == pytest.approx([0, 1.49007])
    assert trace.prompt_tokens.tolist() == [2, 1]


def test_rows_are_sorted_by_time_and_ties_keep_their_order(write: Callable[[str], Path]) -> None:
    trace = read_trace(write(generic("9,1,1", "-3,2,1", "9,3,1", "", "-3,4,1", "0,5,1")))
    assert trace.arrival_s.tolist() == [0, 0, 3, 12, 12]
    assert trace.prompt_tokens.tolist() == [2, 4, 5, 1, 3]
    assert trace.line_numbers.tolist() == [3, 6, 7, 2, 4]
    trace = read_trace(write(generic(*(f"{i % 3},{i + 1},1" for i in range(300)))))
    assert trace.prompt_tokens.tolist() == [*range(1, 301, 3), *range(2, 301, 3), *range(3, 301, 3)]


def test_scaled_and_first(write: Callable[[str], Path]) -> None:
    trace = read_trace(write(generic("0,1,2", "4,3,4", "10,5,6")))
    assert trace.scaled(0.5).arrival_s.tolist() == [0, 8, 20]
    assert trace.scaled(4).arrival_s.tolist() == [0, 1, 2.5]
    assert trace.arrival_s.tolist() == [0, 4, 10]
    head = trace.first(2)
    assert (head.arrival_s.tolist(), head.prompt_tokens.tolist(), head.output_tokens.tolist()) == (
        [0, 4],
        [1, 3],
        [2, 4],
    )
    assert len(trace.first(7)) == 3
    for rate in (0, -1, float("nan"), float("inf"), 5e-324):
        with pytest.raises(ConfigError, match="positive number"):
            trace.scaled(rate)
    with pytest.raises(ConfigError, match="take 1 or more"):
        trace.first(0)


def test_real_traces_agree_with_a_plain_reading(shared_data: Path) -> None:
    path = shared_data / "azure_conv_2023.csv.gz"
    with gzip.open(path, "rt") as file:
        rows = list(csv.DictReader(file))
    trace = read_trace(path)
    assert_valid(trace)
    # strptime knows six digits.
    start, end = (datetime.strptime(rows[i]["TIMESTAMP"][:26], "%Y-%m-%d %H:%M:%S.%f") for i in (0, -1))
    assert len(trace) == len(rows) == 19_366
    assert trace.arrival_s[-1] == pytest.approx((end - start).total_seconds(), abs=1e-6)
    assert trace.prompt_tokens.tolist() == [int(row["ContextTokens"]) for row in rows]
    assert trace.output_tokens.tolist() == [int(row["GeneratedTokens"]) for row in rows]

    path = shared_data / "mooncake_synthetic.jsonl.gz"
    with gzip.open(path, "rt") as file:
        objects = [json.loads(line) for line in file]
    trace = read_trace(path)
    assert_valid(trace)
    assert trace.arrival_s == pytest.approx([o["timestamp"] / 1000 for o in objects])
    assert trace.prompt_tokens.tolist() == [o["input_length"] for o in objects]


def test_lengths_need_no_times(write: Callable[[str], Path], shared_data: Path) -> None:
    prompt, output = read_lengths(shared_data / "sharegpt_lengths.csv.gz")
    assert (len(prompt), prompt[0], output[0]) == (58_787, 42, 285)
    for text in ("input_len,output_len\n5,6\n", '{"input_length": 5, "output_length": 6}\n'):
        path = write(text)
        assert [x.tolist() for x in read_lengths(path)] == [[5], [6]]
        with pytest.raises(TraceFormatError, match="serves as a length distribution and not as a trace"):
            read_trace(path)
    with pytest.raises(TraceFormatError, match=r"line 2, column TIMESTAMP: 'XXX' is not a date.*not as a trace"):
        read_trace(shared_data / "sharegpt_lengths.csv.gz")


DATE = "2023-11-16 18:15:46.68"
NOT_TOKENS = r"is not a whole number of tokens \(needed: 1 or more"
BAD_LENGTHS = ["abc", "", "0", "-3", "12.5", "12.0", "nan", "inf", "1_000", "１２", "1e3", "0x10", "9" * 12, "9" * 5000]


@pytest.mark.parametrize("value", BAD_LENGTHS)
def test_a_bad_length_is_named_with_file_line_and_column(value: str, write: Callable[[str], Path]) -> None:
    for column, row in (("ContextTokens", f"{DATE},{value},1"), ("GeneratedTokens", f"{DATE},1,{value}")):
        with pytest.raises(TraceFormatError, match=f"trace, line 3, column {column}: '{value[:70]}.* {NOT_TOKENS}"):
            read_trace(write(azure(f"{DATE},1,1", row)))
    with pytest.raises(TraceFormatError, match=f"trace, line 3, column prompt_tokens: '{value[:70]}.* {NOT_TOKENS}"):
        read_lengths(write(generic("1,1,1", f"1,{value},1")))


@pytest.mark.parametrize("value", ["0", "-3", "12.5", "NaN", "Infinity", "true", "null", '"x"', "[1]", "{}", "1e400"])
def test_a_bad_json_length_is_named(value: str, write: Callable[[str], Path]) -> None:
    good = '{"timestamp": 0, "input_length": 1, "output_length": 1}\n'
    path = write(good + good.replace('"output_length": 1', f'"output_length": {value}'))
    with pytest.raises(TraceFormatError, match=r"trace, line 2, column output_length: .* " + NOT_TOKENS):
        read_trace(path)


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "true", "null", "[]", '"soon"', "9" * 400, "1e300"])
def test_a_bad_json_time_is_named(value: str, write: Callable[[str | bytes], Path]) -> None:
    path = write(EXAMPLES["mooncake-jsonl"].replace("14100", value))
    with pytest.raises(TraceFormatError, match=r"line 3, column timestamp: .* is not a finite number of milliseconds"):
        read_trace(path)


BAD_FILES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "no requests in it"),
    "blank": (" \n\r\n", "no requests in it"),
    "azure header only": (azure(), "no requests in it"),
    "generic header only": (generic(), "no requests in it"),
    "unknown": (
        "a;b;c\n1;2;3\n",
        r"unknown format.*'a;b;c'(?s:.*)azure-csv: TIMESTAMP,(?s:.*)generic-csv: .*prompt_len",
    ),
    "too few columns": (azure(f"{DATE},1"), r"line 2: 2 columns where the header has 3, 'TIMESTAMP,"),
    "too many columns": (generic("1,1,1", "1,1,1,1"), r"line 3: 4 columns where the header has 3"),
    "no such date": (azure(f"{DATE},1,1", "2023-13-01 00:00:00,1,1"), r"line 3, column TIMESTAMP: '2023-13-01"),
    "nan time": (generic("1,1,1", "nan,1,1"), r"line 3, column arrival_s: 'nan' is not a finite number of seconds"),
    "endless time": (generic("1,1,1", "1e999,1,1"), r"line 3, column arrival_s: '1e999' is not a finite"),
    "no time": (generic("1,1,1", ",1,1"), r"line 3, column arrival_s: '' is not a finite"),
    "grouped time": (generic("1,1,1", "1_0,1,1"), r"line 3, column arrival_s: '1_0' is not a finite"),
    "mixed times": (
        generic("1,1,1", f"{DATE},1,1"),
        r"line 3, column arrival_s: '2023.*' is not a finite number of seconds",
    ),
    "mixed dates": (
        generic(f"{DATE},1,1", "noon,1,1"),
        r"line 3, column arrival_s: 'noon' is not a date and time such as 2023-11-16 18:15:46",
    ),
    "open quote": (generic('1,"1,1'), "not CSV"),
    "json ends early": (EXAMPLES["mooncake-jsonl"] + '{"timestamp": 1,', "line 4: not JSON"),
    "json nests": ('{"input_length": ' + "[" * 100_000, "line 1: not JSON"),
    "json list": (
        EXAMPLES["mooncake-jsonl"] + "[1, 2]",
        r"line 4: no key input_length and output_length in '\[1, 2\]'",
    ),
    "json key": ('{"timestamp": 1, "input_length": 3}\n', "line 1: no key output_length"),
    "junk": (bytes(range(128, 256)), r"line 1: not UTF-8 text \(byte 0x80\)"),
    "late junk": (EXAMPLES["generic-csv"].encode() + b"1,\xff,1\n", r"line 5: not UTF-8 text \(byte 0xff\)"),
    "cut gzip": (gzip.compress(EXAMPLES["generic-csv"].encode())[:-9], "broken or incomplete gzip"),
    "damaged gzip": (gzip.compress(b"a" * 99)[:12] + b"\xff" * 20, "broken or incomplete gzip"),
    "not gzip": (b"\x1f\x8bno", "broken or incomplete gzip"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_with_the_reason(case: str, write: Callable[[str | bytes], Path]) -> None:
    content, message = BAD_FILES[case]
    with pytest.raises(TraceFormatError, match=message) as error:
        read_trace(write(content))
    assert len(str(error.value)) < 1500


def test_unreadable_paths(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.csv", tmp_path, tmp_path / "a\0b", tmp_path / ("x" * 5000)):
        with pytest.raises(TraceFormatError, match="cannot be read"):
            read_trace(path)


def test_a_forced_format_is_kept(write: Callable[[str], Path]) -> None:
    path = write(EXAMPLES["azure-csv"])
    with pytest.raises(TraceFormatError, match=r"line 1: no column prompt_tokens or input_tokens .* in the header"):
        read_trace(path, format="generic-csv")
    with pytest.raises(TraceFormatError, match="line 1: not JSON"):
        read_trace(path, format="mooncake-jsonl")
    with pytest.raises(ConfigError, match="unknown trace format 'azure_csv': did you mean azure-csv"):
        read_trace(path, format="azure_csv")
    with pytest.raises(TraceFormatError, match="no requests in it"):
        read_trace(write('""\n'), format="generic-csv")


EDITS = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 3),
        st.binary(max_size=3) | st.sampled_from([b"\n", b"\r", b",", b'"', b"-", b"0", b"1e9", b"nan", b"\0", b"{", b"9999"]),
    ),
    min_size=1,
    max_size=6,
)


@given(name=st.sampled_from(sorted(EXAMPLES)), edits=EDITS, packed=st.booleans(), forced=st.booleans())
def test_damaged_files_parse_or_are_refused(
    name: str,
    edits: list[tuple[float, int, bytes]],
    packed: bool,
    forced: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    content = EXAMPLES[name].encode()
    content = gzip.compress(content, mtime=0) if packed else content
    for where, removed, inserted in edits:
        at = int(where * len(content))
        content = content[:at] + inserted + content[at + removed :]
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    format = name if forced else None
    try:
        trace = read_trace(path, format=format)
    except TraceFormatError:
        return
    assert_valid(trace)
    prompt, _ = read_lengths(path, format=format)
    assert sorted(prompt) == sorted(trace.prompt_tokens)
