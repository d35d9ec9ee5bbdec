"""Parts that hypermodels share: readers, heads, adapter specs."""
