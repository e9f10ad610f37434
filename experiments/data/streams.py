"""Random streams of one seed: each draw is seeded with `(seed, its number)`.

What is drawn for one purpose says nothing about what is drawn for another.
"""

ORDER = 0  # of the training samples, by epoch
FLIP = 1  # which images of a batch are mirrored, by step
CLEAN = 2  # the samples whose labels are taken for granted
CHECK = 3  # the samples on which a reference is checked
INDEPENDENT = 4  # the batch that comes with each batch
SHARDS = 5  # the order of shards, by epoch
WINDOW = 6  # the order within a window of a stream, by epoch and place
SHAPES = 7  # what the pictures of shapes show, by split
CAPTIONS = 8  # which captions are wrong, and how
TEXTS = 9  # which texts are wrong, and how
HELD_OUT = 10  # which of the sequences are taken, by split
