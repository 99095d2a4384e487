"""A tour: a long document with questions that a model answers right under its context scaling, and wrong without."""
