"""The language of data: samples, tokens, packing; numpy only."""
