"""Run configurations, one file per kind of run; installed and imported as `hyper_t5.configs`."""
