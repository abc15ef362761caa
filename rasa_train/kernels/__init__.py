"""Operations on tensors, with their gradients. They do not depend on adapters or models."""
