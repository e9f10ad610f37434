"""From a run's ledger to selections and filters."""
