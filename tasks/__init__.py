"""SeqIO Tasks and Mixtures, one file per family; installed and imported as `hyper_t5.tasks`."""
