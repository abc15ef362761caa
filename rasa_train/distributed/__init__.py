"""Ways for workers to share a model and exchange tensors. All code for DeepSpeed and FSDP is here."""
