"""Random streams of one seed: each draw is seeded with `(seed, its number)`.

What is drawn for one purpose says nothing about what is drawn for another.
"""

ORDER = 0  # of the training samples, by epoch
FLIP = 1  # which images of a batch are mirrored, by step
CLEAN = 2  # the samples whose labels are taken for granted
CHECK = 3  # the samples on which a reference is checked
INDEPENDENT = 4  # the batch that comes with each batch
