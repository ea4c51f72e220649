"""Reference implementations of others, quirks included, as rows built from our vocabulary."""
