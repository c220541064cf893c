"""Element types of checkpoint files: names, sizes, and what may be done with each.

Names are those of the safetensors specification (``BF16``, ``F32``, ...).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    ``largest`` is the largest finite magnitude, ``significand`` the number of explicitly stored significand bits
    (so that one unit in the last place of ``x`` is ``2**(exponent(x) - significand)``), and ``tiny`` the smallest
    positive normal magnitude; all three are 0 for types that are not floating point.
    """

    name: str
    bits: int
    floating: bool = False
    largest: float = 0.0
    significand: int = 0
    tiny: float = 0.0

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return self.bits // 8

    @property
    def mergeable(self) -> bool:
        """Whether arithmetic on values of this type is a merge (integers and 8-bit floats are not)."""
        return self.floating and self.bits >= 16


_TABLE = (
    DType("F64", 64, True, 1.7976931348623157e308, 52, 2.0**-1022),
    DType("F32", 32, True, 3.4028234663852886e38, 23, 2.0**-126),
    DType("F16", 16, True, 65504.0, 10, 2.0**-14),
    DType("BF16", 16, True, 3.3895313892515355e38, 7, 2.0**-126),
    DType("F8_E4M3", 8, True, 448.0, 3, 2.0**-6),
    DType("F8_E5M2", 8, True, 57344.0, 2, 2.0**-14),
    DType("F8_E8M0", 8, True, 2.0**127, 0, 2.0**-127),
    DType("C64", 64),
    DType("I64", 64),
    DType("I32", 32),
    DType("I16", 16),
    DType("I8", 8),
    DType("U64", 64),
    DType("U32", 32),
    DType("U16", 16),
    DType("U8", 8),
    DType("BOOL", 8),
)
DTYPES: dict[str, DType] = {dtype.name: dtype for dtype in _TABLE}

#: The spellings people use in recipes and configs, and the table's name for each.
ALIASES: dict[str, str] = {
    "float64": "F64",
    "double": "F64",
    "float32": "F32",
    "float": "F32",
    "fp32": "F32",
    "float16": "F16",
    "half": "F16",
    "fp16": "F16",
    "bfloat16": "BF16",
    "bf16": "BF16",
}

#: The name ``config.json`` uses for each type that an output may have.
TORCH_NAMES: dict[str, str] = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
