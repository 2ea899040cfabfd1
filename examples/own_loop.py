"""Pre-train a small language model with ReLoRA in a training loop of your own: wrap, initialize, step.

python examples/own_loop.py                                         # one process, on a GPU if there is one
torchrun --nproc_per_node 8 examples/own_loop.py --stage 3          # several; also deepspeed --num_gpus 8 ...
python examples/own_loop.py --steps 120 --resume                    # resume, on any number of ranks, at any stage
"""

import argparse

import torch.distributed as dist
from text import VOCAB_SIZE, Bytes
from transformers import LlamaConfig, LlamaForCausalLM

import relora_ds
from relora_ds import ReLoRAConfig

BATCH, LENGTH = 16, 64  # sequences of an optimizer step over all ranks, and their tokens

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--stage", type=int, default=1, help="of ZeRO: 0, 1, 2 or 3")
parser.add_argument("--out", default="out")
parser.add_argument("--resume", action="store_true", help="resume from the newest checkpoint in --out")
parser.add_argument("--local_rank", help="passed by DeepSpeed's launcher, not needed")
args = parser.parse_args()

# Any causal language model of transformers, or another module with linear layers. Give it to `wrap` on the CPU in fp32:
# its values become the fp32 masters, whatever precision you train in.
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4
    )
)

# 1. Every linear layer gets a frozen weight W and a low-rank update: y = (W + s·B·A) x. The fields are PEFT's, and the
#    restarts': every 20 steps B·A is merged into W, and starts anew.
relora_ds.wrap(model, ReLoRAConfig(r=16, lora_alpha=32, restart_every=20, restart_warmup_steps=4))

# 2. DeepSpeed's engine, optimizer, loader (None here) and scheduler. "zero0" to "zero3", or a configuration of yours.
engine, _, _, scheduler = relora_ds.initialize(
    model,
    f"zero{args.stage}",
    lr=5e-3,
    total_steps=args.steps,
    warmup_steps=5,
    min_lr_ratio=0.1,
)
rank, world_size = dist.get_rank(), dist.get_world_size()
if rank == 0:
    model.print_trainable_parameters()
if args.resume:
    engine.load_checkpoint(f"{args.out}/checkpoints")

# 3. The loop. engine.t counts the steps that were applied, and is part of a checkpoint.
data = Bytes(LENGTH)
for step in range(engine.t, args.steps):
    batch = data.batch(step * world_size + rank, BATCH // world_size)
    loss = engine(**batch).loss
    engine.backward(loss)
    engine.step()  # restarts happen here
    if rank == 0 and (step + 1) % 10 == 0:
        print(f"step {step + 1:4}  loss {loss.item():.4f}  lr {scheduler.get_last_lr()[0]:.1e}", flush=True)

engine.save_checkpoint(f"{args.out}/checkpoints")  # to resume from: on all ranks
engine.save_merged(f"{args.out}/model")  # to use: a plain transformers model without a trace of the low-rank layers

if rank == 0:
    plain = relora_ds.load_run(f"{args.out}/model").merged().eval()
    print(f"{len(engine.restarts)} restarts; the merged model's loss: {plain(**data.batch(0, BATCH)).loss:.4f}")
dist.barrier()
dist.destroy_process_group()
