"""Many threads, one model: their sequences share its steps and its pages."""
