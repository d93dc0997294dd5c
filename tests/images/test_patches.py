from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from encoder_svc.images.patches import cut_into, patchify


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.sampled_from([2, 7, 14]), st.booleans())
def test_a_device_cuts_as_the_host_does(rows: int, columns: int, merge: int, patch: int, in_planes: bool) -> None:
    height, width = rows * merge * patch, columns * merge * patch
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    _, wanted = patchify(pixels_HWC, patch_size=patch, merge_size=merge)
    planes_CHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1)
    patches = torch.empty((len(wanted), wanted[0].size), dtype=torch.uint8)
    cut_into(patches, planes_CHW.contiguous() if in_planes else planes_CHW, patch_size=patch, merge_size=merge)
    np.testing.assert_array_equal(patches.view(wanted.shape).numpy(), wanted)
