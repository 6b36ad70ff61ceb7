"""Whatever multiplies or reads a weight with a row for each token of the vocabulary: losses from hidden states, and the
embedding; of a whole weight, of slabs, of the ranks' shards.
"""
