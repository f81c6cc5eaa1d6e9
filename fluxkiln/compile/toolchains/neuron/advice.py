"""What to do about the Neuron compiler's error codes, as data.

Source: AWS Neuron documentation, "Neuron Compiler Error Codes" (compiler/error-codes), for what a code means; the
remedies are in terms of this project. F codes are the command's own, for a compiler process that died.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_TOO_LARGE = (
    "the program has more instructions than the compiler allows (5,000,000): use granularity block, a larger tp, or a "
    "smaller SIZE"
)
_NO_MEMORY = "its tensors do not fit the core's memory: use a larger tp, granularity block, or a smaller SIZE"
_OPERATOR = (
    "it uses an operator that the compiler does not have (`neuronx-cc list-operators --framework XLA` lists them): "
    "lower it again with the frontend of this version, and report the kind"
)
_CUSTOM_CALL = "it calls a function outside of HLO: lower it again, the check of a module refuses custom calls"
_DATA_TYPE = "it has a data type that the compiler cannot take: lower it again in bfloat16 or float32"
_INVALID = "the module itself is not valid HLO: lower it again with the frontend of this version, and report the kind"
_BUG = "the compiler itself broke down: report it to AWS with the log, or use another SDK version"
_HOST_MEMORY = (
    "the compiler was killed, most often because this machine's memory ran out: use fewer jobs (JOBS=1), granularity "
    "block, or a machine with more memory"
)

# Code without the prefix NCC_ -> one sentence.
ADVICE: Mapping[str, str] = {
    "EARG001": "trn1 and inf2 have no logical cores of two: compile with lnc 1, or without the flag",
    "EBIR023": "a feed-forward is wider on each core than the compiler's kernel takes (4096): use a larger tp",
    "EBVF030": _TOO_LARGE,
    "EVRF007": _TOO_LARGE,
    "EXTP004": _TOO_LARGE,
    "LUR015": _TOO_LARGE,
    "EOOM001": _NO_MEMORY,
    "EOOM002": _NO_MEMORY,
    "EVRF009": _NO_MEMORY,
    "EXSP001": _NO_MEMORY,
    "EUOC002": _OPERATOR,
    "EVRF001": _OPERATOR,
    "EHCA005": _CUSTOM_CALL,
    "EVRF015": _CUSTOM_CALL,
    "EMOD025": "it has a dynamic shape: lower it again for fixed SIZE and TOKENS",
    "ESFH002": "it has a 64-bit constant that 32 bits do not hold: lower it again in bfloat16 or float32",
    "ESPP004": _DATA_TYPE,
    "ESPP047": _DATA_TYPE,
    "EVRF004": "it has complex numbers: lower it again, rotary cos and sin are inputs and computed on the host",
    "EVRF005": _DATA_TYPE,
    "EVRF051": _DATA_TYPE,
    "EVRF010": _OPERATOR,
    "EVRF011": _OPERATOR,
    "EVRF035": "it multiplies integer matrices: lower it again in bfloat16 or float32",
    "EVRF056": "a gather reads outside of its table: token ids must be smaller than the vocabulary",
    "EVRF061": "it sums integers over ranks: lower it again in bfloat16 or float32",
    "EVRF064": _INVALID,
    "F134": _BUG,
    "F137": _HOST_MEMORY,
    "F139": _BUG,
}
KILLED = "F137"

# Errors of the user (E) and of the compiler (I), older codes, and those of the command itself.
_CODE = re.compile(r"\bNCC_([A-Z]{4}\d{3})\b|\b(E[A-Z]{3}\d{3}|LUR015)\b|\[(F1\d\d)\]")
_PAGE = "the page 'Neuron Compiler Error Codes' of the AWS Neuron documentation"


def find_codes(text: str) -> tuple[str, ...]:
    """The error codes in a compiler's output, without the prefix NCC_, each once, in order."""
    return tuple(dict.fromkeys(next(filter(None, match.groups())) for match in _CODE.finditer(text)))


def advise(text: str) -> str:
    """One sentence for each error code in a compiler's output; empty when there is none."""
    sentences = []
    for code in find_codes(text):
        label = code if code.startswith(("F1", "LUR")) else f"NCC_{code}"
        sentences.append(f"{label}: {ADVICE.get(code) or _unknown(code)}")
    return "; ".join(sentences)


def _unknown(code: str) -> str:
    return _BUG if code.startswith("I") else f"no advice is known here; see {_PAGE}"
