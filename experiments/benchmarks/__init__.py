"""What steps, loops and selections cost, and how right they are."""
