"""Purposes of random draws: each draw is seeded with `(seed, its purpose)`.

Draws for one purpose say nothing about draws for another.
"""

ORDER = 0  # of the training samples, by epoch
FLIP = 1  # the images of a batch that are mirrored, by step
CLEAN = 2  # the samples whose labels are taken for granted
CHECK = 3  # the samples on which a reference is checked
INDEPENDENT = 4  # the batch that comes with each batch
SHARDS = 5  # the order of shards, by epoch
WINDOW = 6  # the order within a window of a stream, by epoch and place
SHAPES = 7  # the pictures of shapes, by split
CAPTIONS = 8  # the captions that are wrong, and the noise in them
TEXTS = 9  # the texts that are wrong, and the noise in them
HELD_OUT = 10  # the sequences that are taken, by split
CROP = 11  # the parts of images that a batch shows, by step
PARTS = 12  # the folds of a cross-fitting, or those whose labels are known
