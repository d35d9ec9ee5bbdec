"""From text and rows to batches of token ids: rows, templates, episodes, packing, vocabularies."""
