"""The ways of storing weights that the fit knows, by name.

Decides their bits a weight. It must not know files.
"""

from __future__ import annotations

from typing import Final

from potluck_coordinator.domain.fit.architecture import UNQUANTIZED, Quantization

SCALE_BITS: Final = 16
GROUP_SIZE_DEFAULT: Final = 128
FP8: Final = Quantization("fp8", 8)
INT8: Final = Quantization("int8", 8 + SCALE_BITS / GROUP_SIZE_DEFAULT)
MXFP4: Final = Quantization("mxfp4", 4 + 8 / 32, covers_experts_only=True)
"""Four bits, and one byte of scale for every 32 of them (the OCP microscaling format)."""
GGUF_MXFP4: Final = Quantization("gguf:MXFP4", 4 + 8 / 32, covers_experts_only=True, other_bits_per_weight=8.5)
"""As llama.cpp's converter writes gpt-oss: the experts as they come, everything else in Q8_0."""
NF4: Final = Quantization("bitsandbytes", 4 + 8 / 64 + 32 / (64 * 256))
"""NF4 with its doubly quantised scales: one byte for 64 weights, and four more for 256 of those (the QLoRA paper, section 3)."""
GGUF_BITS: Final = {
    "F32": 32.0,
    "F16": 16.0,
    "BF16": 16.0,
    "Q8_0": 8.50,
    "Q6_K": 6.56,
    "Q5_K_M": 5.66,
    "Q5_K_S": 5.52,
    "Q4_1": 5.0,
    "Q4_K_M": 4.82,
    "Q4_K_S": 4.58,
    "Q4_0": 4.54,
    "IQ4_NL": 4.54,
    "IQ4_XS": 4.30,
    "Q3_K_L": 4.21,
    "Q3_K_M": 3.89,
    "Q3_K_S": 3.51,
    "Q2_K": 2.99,
}
"""Over a whole file, mixed tensor types and tables included: sizes of Llama 3 70B in its 70.55e9 parameters, as dranger003 listed them in
llama.cpp pull request 6745; Q4_0 as llama.cpp lists Llama 2 7B, Q4_1 by its block of 32. Small models come out up to 8 % larger."""
_NAMED: Final = {"none": UNQUANTIZED, "fp8": FP8, "int8": INT8, "mxfp4": MXFP4, "bitsandbytes": NF4}


def grouped(name: str, bits: int, group_size: int = GROUP_SIZE_DEFAULT) -> Quantization:
    """Weights in groups, each with a half-precision scale and a zero point of as many bits; -1 or 0 is one group a column."""
    return Quantization(name, bits + ((SCALE_BITS + bits) / group_size if group_size > 0 else 0.0))


def gguf_quantization(file_type: str) -> Quantization:
    """The quantisation that a GGUF file type such as "Q4_K_M" stands for; raises ValueError where it is not known."""
    if file_type.upper() == "MXFP4":
        return GGUF_MXFP4
    bits = GGUF_BITS.get(file_type.upper())
    if bits is None:
        raise ValueError(f"{file_type} is no quantisation that the fit knows: {', '.join(known_quantizations())}")
    return Quantization(f"gguf:{file_type.upper()}", bits, covers_embeddings=True)


def quantization_named(name: str) -> Quantization:
    """Those of `known_quantizations`, GGUF's also as "gguf:Q4_K_M"; raises ValueError for a name that is not known."""
    lowered = name.lower()
    if lowered in {"awq", "gptq"}:
        return grouped(lowered, 4)
    return _NAMED.get(lowered) or gguf_quantization(name.split(":", 1)[-1])


def known_quantizations() -> tuple[str, ...]:
    """All names that `quantization_named` takes."""
    return (*_NAMED, "awq", "gptq", *GGUF_BITS)
