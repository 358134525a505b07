"""Model spec, layers, shard, KV cache, sampling, tokenizer and import: the only room that knows torch; no trio."""
