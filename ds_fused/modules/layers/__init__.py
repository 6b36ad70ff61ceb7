"""What a layer computes otherwise than before: mix-ins of ops, and forwards with a part of them exchanged."""
