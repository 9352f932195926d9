"""Forms of an export: one file, one entry. `(source, folder) -> Written`, and how it is read back as a network."""
