"""CRC-32 of joined bytes from the CRC-32s of its parts, as polynomials over GF(2).

Reflected: bit 31 is x^0. Appending n bytes multiplies by x^(8n).
"""

from __future__ import annotations

from functools import lru_cache

from zlib_ng.zlib_ng import crc32

_POLYNOMIAL = 0xEDB88320


def crc32_combine(crc_a: int, crc_b: int, length_b: int) -> int:
    """The CRC-32 of A followed by B, from theirs and the length of B in bytes, as zlib's ``crc32_combine``."""
    if length_b < 0:
        raise ValueError(f"a length cannot be negative: {length_b}")
    return _multiply(_shift_by_bytes(length_b), crc_a) ^ crc_b


@lru_cache(maxsize=1024)
def crc_of_zeros(nbytes: int) -> int:
    """The CRC-32 of that many zero bytes, without looking at them."""
    crc, power, length = 0, crc32(b"\0"), 1  # power is the CRC of length zeros
    while nbytes:
        if nbytes & 1:
            crc = crc32_combine(crc, power, length)
        power, length, nbytes = crc32_combine(power, power, length), 2 * length, nbytes >> 1
    return crc


def _multiply(a: int, b: int) -> int:
    product = 0
    while a:
        if a & 0x80000000:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = b >> 1 ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


@lru_cache(maxsize=1024)
def _shift_by_bytes(count: int) -> int:
    power = 0x80000000  # x^0
    square = 0x00800000  # x^8
    while count:
        if count & 1:
            power = _multiply(square, power)
        square = _multiply(square, square)
        count >>= 1
    return power
