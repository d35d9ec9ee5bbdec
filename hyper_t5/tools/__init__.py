"""Commands around the core: quickstart, data inspection, dataset builds, SeqIO registration."""
