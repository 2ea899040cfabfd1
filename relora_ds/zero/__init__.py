"""ReLoRA on ZeRO: the engine, the shard view and the restart. The only folder that touches DeepSpeed's internals."""
