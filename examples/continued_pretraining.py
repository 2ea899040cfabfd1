"""Continue the pre-training of a Hugging Face model on your own text with ReLoRA.

The pretrained weights are the warm start that ReLoRA needs. The recipe `continued` does the same with the trainer of
relora_ds, which also evaluates, resumes and streams large corpora; here is how in a loop of your own.

    python examples/continued_pretraining.py --model HuggingFaceTB/SmolLM2-135M --text 'docs/**/*.md'
"""

import argparse
import glob
import os

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import relora_ds
from relora_ds import ReLoRAConfig

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True, help="a Hugging Face id, or a directory")
parser.add_argument("--text", required=True, help="a pattern of text files, each a document")
parser.add_argument("--out", default="out")
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
parser.add_argument("--batch", type=int, default=16, help="sequences of a step, over all ranks")
parser.add_argument("--rank", type=int, default=64, help="r, of the low-rank updates")
parser.add_argument("--lr", type=float, default=4e-4, help="well below pre-training's, or the model forgets")
parser.add_argument("--local_rank", help="passed by DeepSpeed's launcher, not needed")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)  # values for the fp32 masters

# Documents one after the other, cut into rows. The last twentieth is for validation.
paths = sorted(glob.glob(os.path.expanduser(args.text), recursive=True))
ids = []
for path in paths:
    with open(path, encoding="utf-8") as file:
        ids += [*tokenizer(file.read(), add_special_tokens=False).input_ids, tokenizer.eos_token_id]
rows = torch.tensor(ids[: len(ids) // args.length * args.length]).view(-1, args.length)
num_validation = max(1, len(rows) // 20)
if len(rows) <= num_validation:
    raise SystemExit(
        f"--text: {args.text} has {len(ids)} tokens in {len(paths)} files; give more than {args.length * 2}"
    )
train, validation = rows[:-num_validation], rows[-num_validation:]

every = max(10, args.steps // 4)  # three restarts
relora_ds.wrap(
    model,
    ReLoRAConfig(
        r=args.rank,
        lora_alpha=args.rank,
        restart_every=every,
        restart_warmup_steps=max(1, every // 10),
        trainable_modules=["norms"],  # beside A and B; the default trains embeddings and head, too, and forgets more
    ),
)
engine, *_ = relora_ds.initialize(
    model,
    "zero1",
    lr=args.lr,
    total_steps=args.steps,
    warmup_steps=args.steps // 20,
    min_lr_ratio=0.1,
    betas=(0.9, 0.95),
)
rank, world_size = dist.get_rank(), dist.get_world_size()


def validation_loss() -> float:
    """Return the mean loss of the validation rows; every rank computes all of it."""
    engine.eval()
    with torch.no_grad():
        losses = [engine(input_ids=row[None], labels=row[None]).loss.item() for row in validation]
    engine.train()
    return sum(losses) / len(losses)


before = validation_loss()
order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
for step in range(args.steps):
    mine = (torch.arange(args.batch) + step * args.batch)[rank::world_size] % len(train)
    batch = train[order[mine]]
    engine.backward(engine(input_ids=batch, labels=batch).loss)
    engine.step()
after = validation_loss()

engine.save_merged(args.out)
if rank == 0:
    tokenizer.save_pretrained(args.out)
    print(f"validation loss {before:.4f} -> {after:.4f} after {args.steps} steps and {len(engine.restarts)} restarts")
    print(f"{args.out}: for AutoModelForCausalLM.from_pretrained, or relora_ds.load_run({args.out!r}).merged()")
dist.barrier()
dist.destroy_process_group()
