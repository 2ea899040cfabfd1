import shutil, pytest, torch
from tests.training.runs import lines, losses, run
from tests.training.test_resume import _compare
@pytest.mark.parametrize("settings", [("deepspeed=zero1","precision=bf16"),("deepspeed=zero0","precision=bf16"),("deepspeed=zero3","precision=bf16"),("deepspeed=zero2","precision=fp32","relora.frozen_dtype=int8")])
def test_exact(tmp_path, settings):
    whole=tmp_path/"whole"
    run(whole,"checkpoint.every=5","checkpoint.keep_last=99",*settings)
    for step in (5,10,15,20,25):
        d=tmp_path/f"from-{step}"
        run(d,f"resume={whole}/checkpoints/step_{step:08d}",*settings)
        _compare(d,whole,step+1)
