"""Named shapes: folders that load and run, the same each time; sizes of Wan's are the released ones."""

import pytest
import torch

from longvid.models.dit import DiT
from pipelines.configure import configure
from pipelines.generate import generate
from pipelines.shapes import SHAPES, find_shape, save_shape


def test_a_shape_is_a_folder_that_runs_and_is_the_same_each_time(tmp_path):
    folders = [save_shape("micro@16x24", tmp_path / name) for name in ("a", "b")]
    run = configure(model=folders[0], num_frames=5, num_steps=2, seed=0, device="cpu")
    assert (run.height, run.width) == (16, 24)
    assert [frames.shape for frames in generate(run)] == [(1, 16, 24, 3), (4, 16, 24, 3)]
    files = [sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors")) for folder in folders]
    assert files[0] == files[1] and len(files[0]) == 3
    assert all((folders[0] / file).read_bytes() == (folders[1] / file).read_bytes() for file in files[0])


@pytest.mark.parametrize("name, billions", [("wan-1.3b", 1.42), ("wan-14b", 14.29)])
def test_wan_has_as_many_parameters_as_released(name, billions):
    """The released folders hold 5.7 and 57 GB of float32."""
    with torch.device("meta"):
        dit = DiT(SHAPES[name].dit)
    assert sum(p.numel() for p in dit.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.parametrize("name, said", [
    ("wan-2b", "shape 'wan-2b' is unknown; use wan-1.3b,"),
    ("wan-1.3b@480", "shape 'wan-1.3b@480' is unknown"),
    ("wan-1.3b@481x840", "must be multiples of 16; try wan-1.3b@480x832"),
    ("micro@0x32", "must be multiples of 8; try micro@8x32"),
])  # fmt: skip
def test_what_is_no_shape(name, said):
    with pytest.raises(ValueError, match=said):
        find_shape(name)
