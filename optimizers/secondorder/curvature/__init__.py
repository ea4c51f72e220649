"""Statistics: what a method observes of a block's curvature, one kind a file."""
