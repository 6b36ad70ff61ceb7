"""What stands between a layer's linear products: gated units, experts, LoRA's pair."""
