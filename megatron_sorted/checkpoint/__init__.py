"""Checkpoints of a run: their layout on disk, and how they are saved, published and loaded.

``sharding`` describes the state of a network that many ranks share; ``saver`` writes it in the
background; ``publishing`` gives a complete checkpoint its name; ``candidates`` finds the one to
continue from.
"""
