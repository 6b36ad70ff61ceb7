"""Scores along rows: softmax and sparsemax, and the attentions made of them."""
