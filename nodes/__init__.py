"""What a user drags: the pack's nodes, and what stands behind those that the run itself does not need."""
