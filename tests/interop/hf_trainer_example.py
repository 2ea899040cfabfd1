"""ReLoRA with the Hugging Face Trainer: deepspeed --num_gpus 2 hf_trainer_example.py"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import relora_ds
from relora_ds import ReLoRACallback, ReLoRAConfig

config = ReLoRAConfig(r=8, lora_alpha=16, restart_every=10, restart_warmup_steps=2)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
)
relora_ds.wrap(model, config)  # before TrainingArguments: there DeepSpeed stage 3 would split the model
rows = (torch.rand(256, 16, generator=torch.Generator().manual_seed(0)).square() * 128).long()
args = TrainingArguments(
    output_dir="out",
    deepspeed="ds_configs/zero1.json",
    bf16=torch.cuda.is_available(),
    use_cpu=not torch.cuda.is_available(),
    learning_rate=1e-2,
    lr_scheduler_type="cosine_with_min_lr",
    lr_scheduler_kwargs={"min_lr_rate": 0.1},
    warmup_steps=4,
    max_steps=30,
    per_device_train_batch_size=4,
    save_steps=15,
    logging_steps=5,
    report_to="none",
)
trainer = Trainer(model=model, args=args, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
trainer.add_callback(ReLoRACallback(trainer, config))
trainer.train()  # restarts after steps 10 and 20
trainer.train(resume_from_checkpoint="out/checkpoint-15")  # or True: the newest; also in a new process
trainer.save_model("out/merged")  # for AutoModelForCausalLM.from_pretrained
