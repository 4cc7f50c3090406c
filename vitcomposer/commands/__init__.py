"""One file per verb of ``vitcomposer``."""
