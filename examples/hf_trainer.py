"""Pre-train with ReLoRA and the Hugging Face Trainer.

torchrun --nproc_per_node 1 examples/hf_trainer.py                  # or deepspeed --num_gpus 8 examples/hf_trainer.py
torchrun --nproc_per_node 2 examples/hf_trainer.py --stage 3 --steps 60 --resume
"""

import argparse
from pathlib import Path

import torch
from text import VOCAB_SIZE, Bytes
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import relora_ds
from relora_ds import ReLoRAConfig, ReLoRATrainer

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--stage", type=int, default=1, help="of ZeRO: 0, 1, 2 or 3")
parser.add_argument("--out", default="out")
parser.add_argument("--resume", action="store_true", help="resume from the newest checkpoint in --out")
parser.add_argument("--local_rank", help="passed by DeepSpeed's launcher, not needed")
options = parser.parse_args()

model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4
    )
)
# Before the TrainingArguments: with those of stage 3, transformers would split a model that is loaded after them.
relora_ds.wrap(model, ReLoRAConfig(r=16, lora_alpha=32, restart_every=10, restart_warmup_steps=2))

args = TrainingArguments(
    output_dir=options.out,
    deepspeed=str(Path(__file__).parents[1] / "ds_configs" / f"zero{options.stage}.json"),
    bf16=torch.cuda.is_available(),
    use_cpu=not torch.cuda.is_available(),
    learning_rate=5e-3,
    lr_scheduler_type="cosine_with_min_lr",  # what ReLoRA restarts; or "cosine", which ends at 0
    lr_scheduler_kwargs={"min_lr_rate": 0.1},
    warmup_steps=4,
    max_steps=options.steps,
    per_device_train_batch_size=8,
    save_steps=15,
    logging_steps=5,
    report_to="none",
)
# Where other code makes the Trainer: trainer.add_callback(relora_ds.ReLoRACallback(trainer)).
trainer = ReLoRATrainer(model=model, args=args, train_dataset=Bytes(length=64))
trainer.train(resume_from_checkpoint=options.resume)  # each restart is a line of the log
trainer.save_model(f"{options.out}/merged")  # the plain model, for AutoModelForCausalLM.from_pretrained
