"""The variants that are measured, in the order of the table."""

from tests.lab.experiments.levers.chain import Settings

RESIDUAL = dict(residual_every=20, residual_lr=0.08)
VARIANTS = {
    "full rank": Settings(method="full"),
    "GaLore": Settings(),
    "lr of the dense part 2e-3": Settings(lr=2e-3, lr_low=4e-3),
    "lr of the dense part 2e-3, of B 8e-3": Settings(lr=2e-3, lr_low=8e-3),
    "β₂ 0.99": Settings(betas=(0.9, 0.99)),
    "r 8": Settings(r=8),
    "r 4": Settings(r=4),
    "a restart every 50": Settings(restart_every=50),
    "a restart every 50, growing to 1,000": Settings(restart_every=50, restart_every_end=1000),
    "r shrinks from 24 to 8": Settings(r=24, r_end=8),
    "sides alternate": Settings(alternates=True),
    "warm sketch, rotated": Settings(basis="warm_sketch", moments="rotated"),
    "random basis every 50, rotated": Settings(basis="random", moments="rotated", restart_every=50),
    "half of the basis at random": Settings(basis="mixed"),
    "basis sampled": Settings(basis="sampled"),
    "basis of the moving average": Settings(basis="momentum"),
    "basis of the cycle's sum": Settings(basis="accumulated"),
    "full rank for 500 steps": Settings(full_steps=500),
    "full rank for 1,000 steps": Settings(full_steps=1000),
    "full rank for 2,000 steps": Settings(full_steps=2000),
    "both factors from step 5,000": Settings(both_from=5000),
    "Fira for 2,000 steps": Settings(fira_steps=2000),
    "Fira": Settings(fira_steps=8000),
    "residual every 20, lr 0.01": Settings(residual_every=20, residual_lr=0.01),
    "residual every 20, lr 0.02": Settings(residual_every=20, residual_lr=0.02),
    "residual every 20, lr 0.04": Settings(residual_every=20, residual_lr=0.04),
    "residual every 20, lr 0.08": Settings(**RESIDUAL),
    "residual every 20, lr 0.16": Settings(residual_every=20, residual_lr=0.16),
    "residual every 50, lr 0.16": Settings(residual_every=50, residual_lr=0.16),
    "residual every 200, lr 0.16": Settings(residual_every=200, residual_lr=0.16),
    "residual every 20, r 4": Settings(**RESIDUAL, r=4),
    "residual every 20, r 1": Settings(**RESIDUAL, r=1),
}
