"""The loss of any causal LM from its hidden states: the head's call waits until the loss is known."""
