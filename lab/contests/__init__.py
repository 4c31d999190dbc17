"""The contest of decoders: peers, interleaved rounds, the memory's speed, page and picture."""
