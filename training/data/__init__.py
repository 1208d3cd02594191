"""Training data: texts, tokenised once into shards on disk, and the rows that a run takes from them."""
