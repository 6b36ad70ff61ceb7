"""ZeRO-3: heads and embeddings that are never whole, and how the weights of all other layers come and go."""
