"""Operations on tensors, with their gradients. They know nothing of adapters or models."""
