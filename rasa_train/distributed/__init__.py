"""How workers share a model and exchange tensors. Everything of DeepSpeed and FSDP is here."""
