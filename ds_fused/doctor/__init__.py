"""Does a model train with ds_fused as it does without? Stock against fused on a tiny random copy of its architecture."""
