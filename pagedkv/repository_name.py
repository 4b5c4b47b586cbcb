"""What the name of a model's repository says: whose weights it has, and how they are stored."""

import re
from dataclasses import dataclass

_STORED = re.compile(
    r"(.+?)[-_.](?:quantized\.)?"
    r"((?:ud-|qat-)?i?q\d_\w+|gguf|mxfp[48]|nvfp4|fp4|fp8|awq|gptq|auto-?round|int[48]|w[48]a16|[48]bit"
    r"|(?:unsloth-)?bnb-4bit|bf16|fp16|f16)(?:[-_.:].*)?"
)
"""The first word of a format ends the model's name; what follows says more of the format: "FP8-dynamic", "AWQ-4bit"."""
_FORMATS = (
    (re.compile("mxfp4"), "mxfp4"),
    (re.compile("mxfp8"), "mxfp8"),
    (re.compile("(nv)?fp4"), "nvfp4"),
    (re.compile("fp8"), "fp8"),
    (re.compile("int8|w8a16|8bit"), "int8"),
    (re.compile("awq|gptq|auto-?round|int4|w4a16|4bit"), "int4"),
    (re.compile("bf16"), "bf16"),
    (re.compile("f16|fp16"), "fp16"),
)
"""The first of these that is found in those words says the format of PyTorch's files."""
_GGUF_FORMAT = re.compile(r"(?:^|[-_.:])(?:ud-)?(q8_0|q6_k|q5_k_m|q4_k_m|q4_0)(?=$|[-_.:])")
_GGUF = re.compile(r"gguf|(?:^|[-_.:])(?:ud-)?i?q\d_\w+")


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryName:
    """The parts of a name such as "RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8-dynamic", in lower case."""

    model: str
    """The name without owner and format: "meta-llama-3.1-8b-instruct"."""
    weight_format: str | None
    """How its weights are stored, a name of `WEIGHT_FORMATS`; None: it does not say, or it is a format of GGUF not known here."""
    gguf: bool
    """Whether its files are llama.cpp's."""


def read_repository_name(name: str) -> RepositoryName:
    """Return the parts of a repository's name; one that speaks of no format is a model's name all through.

    A tag after a colon says which of several files, as for `llama-server -hf`: "unsloth/Qwen3-8B-GGUF:Q4_K_M".
    """
    text = name.rpartition("/")[2].lower()
    match = _STORED.fullmatch(text)
    if match is None:
        return RepositoryName(model=text, weight_format=None, gguf=False)
    how = text[match.end(1) :]
    if _GGUF.search(how):
        found = _GGUF_FORMAT.search(how)
        return RepositoryName(model=match[1], weight_format=found[1] if found else None, gguf=True)
    weight_format = next(known for pattern, known in _FORMATS if pattern.search(how))
    return RepositoryName(model=match[1], weight_format=weight_format, gguf=False)
