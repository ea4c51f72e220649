"""From parameters to blocks, buckets and `state[p]`: where state lives. Knows shapes and options, no mathematics."""
