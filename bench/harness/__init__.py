"""What the commands share: optimizers, shapes, time, memory, tables and records."""
