"""Phantom heads: skull, cortex, ventricles and a lesion, as the modalities of an acute stroke dataset show them."""

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np


# Labels of the tissue map.
AIR, SCALP, SKULL, GREY, WHITE, VENTRICLE, VESSEL, LESION = range(8)

# Modality -> value of each tissue: CT in Hounsfield units, CBF in ml/100 g/min, CBV in ml/100 g, MTT and Tmax in s,
# ADC in 1e-6 mm2/s, DWI in arbitrary units.
INTENSITIES = {
    "ncct": (-1000, 40, 1100, 38, 30, 6, 45, 22),
    "cta": (-1000, 40, 1100, 42, 34, 6, 320, 24),
    "ctp": (-1000, 40, 1100, 40, 32, 6, 150, 26),
    "cbf": (0, 0, 0, 60, 25, 0, 110, 6),
    "cbv": (0, 0, 0, 4, 2, 0, 9, 1),
    "mtt": (0, 0, 0, 4, 5, 0, 4, 14),
    "tmax": (0, 0, 0, 1, 2, 0, 1, 11),
    "dwi": (0, 60, 10, 260, 220, 90, 200, 700),
    "adc": (0, 500, 100, 850, 750, 3000, 900, 380),
}


@dataclass(frozen=True)
class Head:
    """One subject's head. World coordinates are mm in RAS: +x right, +y anterior, +z superior.

    Args:
        seed (`int`): shape of the head, place and size of the lesion, noise
    """

    seed: int

    def tissue(self, shape: tuple[int, int, int]) -> np.ndarray:
        """Tissue labels (uint8) of a volume with `shape` that the head fills."""
        random = np.random.default_rng(self.seed)
        x, y, z = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij")
        width, depth, height = 0.72 + 0.06 * random.random(3)
        radius = np.sqrt((x / width) ** 2 + (y / (depth + 0.14)) ** 2 + (z / (height + 0.1)) ** 2)
        angle = np.arctan2(y, x)
        folds = 0.05 * np.sin(14 * angle + 5 * z) * np.cos(9 * z)
        tissue = np.zeros(shape, np.uint8)
        tissue[radius < 1.0] = SCALP
        tissue[radius < 0.93] = SKULL
        tissue[radius < 0.84] = GREY
        tissue[radius < 0.68 + folds] = WHITE
        tissue[(np.abs(x) < 0.02) & (radius < 0.84) & (z > 0)] = VENTRICLE  # the fissure between the hemispheres
        for side in (-1, 1):
            horn = ((x - side * 0.13) / 0.07) ** 2 + ((y + 0.05) / 0.3) ** 2 + ((z - 0.05) / 0.14) ** 2
            tissue[horn < 1] = VENTRICLE
            artery = ((y - 0.1 - 0.1 * np.abs(x)) ** 2 + (z + 0.25 - 0.2 * np.abs(x)) ** 2) < 0.03**2
            tissue[artery & (radius < 0.8) & (side * x > 0.05)] = VESSEL
        side = 1 if random.random() < 0.5 else -1
        centre = np.array([side * (0.3 + 0.1 * random.random()), 0.3 * random.random() - 0.1, 0.3 * random.random()])
        extent = 0.1 + 0.12 * random.random(3)
        lesion = (
            sum(((axis - c) / e) ** 2 for axis, c, e in zip((x, y, z), centre, extent, strict=True)) < 1 + folds * 8
        )
        tissue[lesion & np.isin(tissue, (GREY, WHITE))] = LESION
        return tissue

    def image(self, modality: str, shape: tuple[int, ...]) -> nib.Nifti1Image:
        """A modality of `INTENSITIES` (4-D for `ctp`: x, y, z, time), or a mask: `lesion-msk`, `lvo-msk`, `cow-msk`."""
        tissue = self.tissue(shape[:3])
        random = np.random.default_rng([self.seed, sum(modality.encode())])
        if modality.endswith("-msk"):
            label = {"lesion-msk": LESION}.get(modality, VESSEL)
            data = (tissue == label).astype(np.uint8)
            if modality == "lvo-msk":
                data[: shape[0] // 2] = 0
        else:
            data = np.array(INTENSITIES[modality], np.float32)[tissue]
            if len(shape) == 4:
                bolus = np.exp(-(((np.arange(shape[3]) - shape[3] / 3) / (shape[3] / 8)) ** 2)).astype(np.float32)
                enhancement = np.array((0, 0, 0, 18, 9, 0, 220, 3), np.float32)[tissue]
                data = data[..., None] + enhancement[..., None] * bolus
            noise = 0.01 * max(abs(value) for value in INTENSITIES[modality] if value > -1000)
            inside = tissue.reshape(*tissue.shape, *[1] * (len(shape) - 3)) != AIR
            data = (data + inside * random.normal(0, min(noise, 3), data.shape).astype(np.float32)).round()
            data = data.astype(np.int16)
        size = 200.0  # mm, edge of the field of view
        steps = [size / n for n in shape[:3]]
        affine = np.diag([*steps, 1.0])
        affine[:3, 3] = [-size / 2 + step / 2 for step in steps]
        image = nib.Nifti1Image(data, affine)
        image.header.set_xyzt_units("mm", "sec")
        return image

    def save(self, path: Path, modality: str, shape: tuple[int, ...]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(self.image(modality, shape), path)
