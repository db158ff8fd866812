"""HDR pictures (PQ and HLG, BT.2100) as a standard screen shows them: BT.709 primaries, sRGB transfer.

Diffuse white is 203 nits (BT.2408), and is 1 in the linear light below. What is darker comes out as it is; from four
fifths of it on, the brightest channel is bent towards 1 and the others with it, so that no hue changes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PQ, HLG = 16, 18  # ITU-T H.273, transfer characteristics
WHITE = 203.0  # nits
HLG_PEAK, HLG_GAMMA = 1000.0, 1.2  # the reference screen of BT.2100, table 5
KNEE = 0.8
LUMA = np.array([0.2627, 0.6780, 0.0593], np.float32)  # of BT.2020
TO_BT709 = np.array(
    [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]], np.float32
)  # from BT.2020, ITU-R BT.2087


def to_sdr(picture: NDArray[np.uint16], transfer: int) -> NDArray[np.uint8]:
    """(height, width, 3) RGB, full range, BT.2020; `transfer` is PQ or HLG. The same picture in eight bits."""
    codes = np.linspace(0.0, 1.0, 1 << 16)
    linear = (_pq if transfer == PQ else _hlg)(codes).astype(np.float32)[picture]
    if transfer == HLG:
        linear *= (linear @ LUMA)[..., None] ** np.float32(HLG_GAMMA - 1) * np.float32(HLG_PEAK / WHITE)
    light = np.maximum(linear @ TO_BT709.T, 0)
    brightest = light.max(axis=2, keepdims=True)
    bent = KNEE + (1 - KNEE) * -np.expm1(-(np.maximum(brightest, KNEE) - KNEE) / (1 - KNEE))
    light *= np.where(brightest > KNEE, bent / np.maximum(brightest, KNEE), 1)
    shown = np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 0.0031308) ** (1 / 2.4) - 0.055)
    return np.asarray(np.rint(255 * shown), np.uint8)


def _pq(codes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Light in units of WHITE: the EOTF of SMPTE ST 2084."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = codes ** (1 / m2)
    return np.asarray(10_000 / WHITE * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1))


def _hlg(codes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Light of the scene, 0 to 1: the inverse OETF of ARIB STD-B67."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(codes <= 0.5, codes**2 / 3, (np.exp((codes - c) / a) + b) / 12)
