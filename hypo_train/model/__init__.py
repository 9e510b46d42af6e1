"""The policy and its reference: loaded, checked and made ready to train; and what of the reference is shared."""
