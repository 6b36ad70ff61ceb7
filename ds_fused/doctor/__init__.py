"""Does a model train with ds_fused as without? Stock against fused, on a tiny random copy of its architecture."""
