"""Language modelling: the next token of sequences, one loss a sequence."""
