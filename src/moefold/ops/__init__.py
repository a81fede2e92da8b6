"""Operations on plain tensors: selection, transport plans, grouped products."""
