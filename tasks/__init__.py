"""One file a stage: load from the store, call the core once, store, return a reference. Ray lives here."""
