"""What a policy is worth on rows it was not trained on: during training, and of a finished run or any model."""
